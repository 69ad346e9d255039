"""From the members of a tar to the samples of a shard: one after the other as they come, or all at once as columns.

For the columns the headers of a plain local tar are followed as fast as Python can and taken apart by numpy and arrow. Where
anything about them is unusual they are followed one by one; so only that way has to know every oddity, and tells every error.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .tars import BLOCK, LONGEST, REGULAR, WITHOUT_BODY, ZEROS, Member, Tar, summed
from .types import BadInput

Raw = dict[str, Any]
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
IMAGE_FIELDS = tuple(FORMATS)
FIELDS = frozenset((*IMAGE_FIELDS, "txt", "json", "cls"))
WINDOW, WINDOWS = 2048, 1024
"""Bytes that are read from a header on, in which the next header often lies; and how many such readings are gone through together."""
NAME = r"(?s)^(?P<key>(?:.*/)?[^./]+)\.(?P<field>[^/]*)$"
WITHOUT_FOLDER = r"(?s)^(?P<key>[^.]+)\.(?P<field>.*)$"
PLAIN, USUAL = np.frombuffer(REGULAR, np.uint8), np.frombuffer(REGULAR + WITHOUT_BODY, np.uint8)


# ---- one after the other


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the base name; the extension is lower-cased. Hidden files have none."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return folder + slash + stem, field.lower() if stem else ""


@lru_cache(maxsize=1024)
def is_field(field: str) -> bool:
    """Whether members of this extension are read."""
    return field in FIELDS or ("." in field and field.rsplit(".", 1)[1] in FIELDS)


def group(url: str, members: Iterable[Member], value: Callable[[Member], Any] = lambda member: member) -> Iterator[Raw]:
    """Members of one shard -> samples that hold the `value` of each that is read. The members of a sample must be neighbours, each
    field once; what is not read may stand anywhere."""
    seen: set[str] = set()
    sample: Raw = {}
    last = None
    for member in members:
        key, field = split_name(member.name)
        if not (member.regular and is_field(field)):
            continue
        key = key.removeprefix("./")
        if key != last:
            if sample:
                yield sample
            if key in seen:
                raise BadInput(f"{url}: key {key} occurs twice, or its members are not neighbours; write the shard again")
            seen.add(key)
            sample, last = {"__key__": key, "__url__": url}, key
        if field in sample:
            raise BadInput(f"{url}: member {member.name} occurs twice; write the shard again")
        sample[field] = value(member)
    if sample:
        yield sample


# ---- all at once


@dataclass(frozen=True)
class Table:
    """The samples of a shard as columns: keys one a sample, the rest one for each member that is read, in order."""

    keys: pa.StringArray
    at: np.ndarray
    """(samples + 1,) where the members of each sample begin."""
    fields: pa.StringArray
    names: pa.StringArray
    starts: np.ndarray
    """Bytes from the beginning of the tar, as in `Member`."""
    offsets: np.ndarray
    sizes: np.ndarray
    texts: list[bytes]
    """The bodies of the members "txt", if they were asked for."""

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Collection[str]) -> list[int]:
        """The numbers of the samples with these keys, in order."""
        return np.flatnonzero(pc.is_in(self.keys, value_set=pa.array(sorted(keys), pa.string()))).tolist() if keys else []

    def sample(self, url: str, i: int) -> Raw:
        """The i-th sample with its members for values, as `group` gives it."""
        rows = range(int(self.at[i]), int(self.at[i + 1]))
        return {"__key__": self.keys[i].as_py(), "__url__": url} | {
            self.fields[j].as_py(): Member(self.names[j].as_py(), int(self.starts[j]), int(self.offsets[j]), int(self.sizes[j]), True)
            for j in rows}


def table(tar: Tar, texts: bool = False) -> Table:
    """All samples of a shard. Raises BadInput as `group` and `Tar.members` do, and for a name that is not UTF-8."""
    return at_once(tar, texts) or one_by_one(tar, texts)


def one_by_one(tar: Tar, texts: bool) -> Table:
    keys: list[str] = []
    at, fields, members, bodies = [0], list[str](), list[Member](), list[bytes]()

    def with_text(member: Member) -> tuple[Member, bytes | None]:
        return member, tar.body(member) if texts and split_name(member.name)[1] == "txt" else None

    for sample in group(tar.url, tar.members(), with_text):
        keys.append(sample.pop("__key__"))
        del sample["__url__"]
        fields += sample
        members += [member for member, _ in sample.values()]
        bodies += [body for _, body in sample.values() if body is not None]
        at.append(len(fields))
    starts, offsets, sizes = (np.array([getattr(m, k) for m in members], np.int64) for k in ("start", "data", "size"))
    try:
        columns = [pa.array(values, pa.string()) for values in (keys, fields, [m.name for m in members])]
    except UnicodeEncodeError as error:
        raise BadInput(f"{tar.url}: the name {error.object[:100]!r} is not UTF-8; write the shard again") from None
    return Table(columns[0], np.array(at), columns[1], columns[2], starts, offsets, sizes, bodies)


def at_once(tar: Tar, texts: bool) -> Table | None:
    """None where the tar is not plain and local, or not of the usual kind."""
    found = columns(tar, texts) if tar.file else None
    if found is None:
        return None
    names, starts, sizes, regular, bodies = found
    try:
        named = pa.array(names, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        return None
    parts = pc.extract_regex(named, NAME if pc.any(pc.match_substring(named, "/")).as_py() else WITHOUT_FOLDER)  # thrice as fast
    coded = pc.utf8_lower(parts.field("field")).dictionary_encode()
    known = np.array([*(is_field(f) for f in coded.dictionary.to_pylist()), False])
    codes = coded.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(regular & known[codes])
    if not len(rows):
        return None
    take = pa.array(rows)
    keys, codes = parts.field("key").take(take), codes[rows]
    if pc.any(pc.starts_with(keys, "./")).as_py():
        keys = pc.replace_substring_regex(keys, r"^\./", "")
    new = np.concatenate(([True], pc.not_equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy(zero_copy_only=False)))
    first = np.flatnonzero(new)
    own = keys.take(pa.array(first))
    each = (np.cumsum(new) - 1) * len(known) + codes  # a number for each field of each sample
    if pc.count_distinct(own).as_py() < len(own) or len(np.unique(each)) < len(each):
        return None
    fields = coded.dictionary.take(pa.array(codes))
    texts_of = [bodies[i] for i in rows[codes == pc.index(coded.dictionary, "txt").as_py()].tolist()] if texts else []
    return Table(own, np.append(first, len(rows)), fields, named.take(take), starts[rows], starts[rows] + BLOCK, sizes[rows], texts_of)


def columns(tar: Tar, texts: bool) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray, dict[int, bytes]] | None:
    """Names, starts and sizes of all members, which of them are regular, and the bodies of texts by number."""
    assert tar.file is not None
    fd, at, ended = tar.file.fileno(), 0, False
    names: list[bytes] = []
    starts: list[int] = []
    sizes: list[int] = []
    regular: list[np.ndarray] = []
    bodies: dict[int, bytes] = {}
    while not ended:
        windows: list[bytes] = []
        rows: list[int] = []
        while len(windows) < WINDOWS and not ended:
            window = os.pread(fd, WINDOW, at)
            i, row, last = 0, len(windows) * WINDOW, len(window) - BLOCK
            while i <= last:
                if not window[i] and window[i : i + BLOCK] == ZEROS:
                    ended = True
                    break
                try:
                    size = 0 if window[i + 156] in WITHOUT_BODY else int(window[i + 124 : i + 135], 8)
                except ValueError:
                    return None
                if not 0 <= size <= LONGEST:
                    return None
                rows.append(row + i)
                starts.append(at + i)
                sizes.append(size)
                i += BLOCK + (size + 511 & -512)
            if not i and not ended:
                return None
            windows.append(window.ljust(WINDOW, b"\0"))
            at += i
        heads = np.frombuffer(b"".join(windows), np.uint8).reshape(-1, BLOCK)[np.array(rows, np.int64) // BLOCK]
        here = usual(heads)
        if here is None:
            return None
        if texts:
            for n in [n for n, name in enumerate(here, len(names)) if name[-4:].lower() == b".txt"]:
                k, i = divmod(rows[n - len(names)], WINDOW)
                end = i + BLOCK + sizes[n]
                bodies[n] = windows[k][i + BLOCK : end] if end <= WINDOW else tar.at(starts[n] + BLOCK, sizes[n])
        names += here
        regular.append(np.isin(heads[:, 156], PLAIN))
    tar.nothing_after(at)
    return names, np.array(starts), np.array(sizes), np.concatenate(regular), bodies


def usual(heads: np.ndarray) -> list[bytes] | None:
    """The names in header blocks (n, 512), if all are right and of the usual kind."""
    odd = ((heads[:, 124:135] ^ ord("0")) > 7).any() or (heads[:, 135] & ~np.uint8(32)).any() or heads[:, 345].any()
    if odd or not summed(heads).all() or not np.isin(heads[:, 156], USUAL).all():
        return None
    names = heads[:, :100].copy().view("S100").ravel().tolist()
    joined = b"\0".join(names)
    return None if joined.count(b"\0") >= max(len(names), 1) or b"/\0" in joined + b"\0" else names
