"""What a shard set holds: the key, the caption and the place of every pair, one Parquet file a shard, read as a stream.

data_tools/index.py writes FOLDER/index/00000.parquet … from tar headers and captions, or from the Parquet files that
img2dataset left, and FOLDER/index/index.json last, when no key occurs twice. Without such a folder the shards are scanned.
"""
from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import samples, stores, tars
from .samples import IMAGE_FIELDS, Raw
from .shards import Incomplete, expand, read_pairs
from .spread import Spread, map_shards
from .stores import is_remote
from .types import BadInput

SUMMARY, ALONE = "index.json", Spread(processes=1)
SCHEMA = pa.schema([("key", pa.string()), ("text", pa.string()), ("fields", pa.list_(pa.string())), ("offsets", pa.list_(pa.int64())),
                    ("sizes", pa.list_(pa.int64()))])
"""A row a pair; of each member that is read its extension, where its body lies in the (unpacked) tar, and how long it is, in bytes."""
SPARSE, NARROW = 1 << 20, 1 << 16
"""Bytes from one wanted sample to the next, on average, from which on narrow ranges of a shard in a store are read, and how narrow."""
AT_ONCE = 1 << 23
"""Keys whose hashes are sorted in memory together (64 MB, held twice)."""
NAMED = 1 << 20
"""Repeated keys that are looked up by name, at most; a set that was joined with itself has as many as pairs."""


@dataclass(frozen=True)
class Part:
    """One shard of an index. The rows are in `table` or in the Parquet file `path`."""

    shard: str
    """Path or URL of the tar."""
    version: str
    """What its store says of it; changes when the shard does. "" where it says nothing."""
    pairs: int
    samples: int
    """Pairs, and what lacks a half."""
    fingerprint: str
    """Of the keys and captions of its pairs, and of the names and sizes of their members."""
    lacking: str = ""
    """Key of the first sample that lacks its image or its caption."""
    path: str = ""
    table: pa.Table | None = None

    def __len__(self) -> int:
        return self.pairs

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        if self.table is not None:
            return self.table.select(columns) if columns else self.table
        with stores.open_read(self.path) as file:
            try:
                columns = columns or SCHEMA.names
                return pq.ParquetFile(file).read(columns).select(columns)
            except (OSError, KeyError, pa.ArrowException) as error:
                why = " ".join(str(error).split())
                raise BadInput(f"{self.path}: cannot be read as an index ({why}); remove it and index again") from error

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(key, text) of each pair."""
        rows = self.rows(["key", "text"])
        yield from zip(rows["key"].to_pylist(), rows["text"].to_pylist(), strict=True)

    def all_keys(self) -> list[str]:
        return self.rows(["key"])["key"].to_pylist()

    def only(self, keys: frozenset[str]) -> Part:
        """The part of the part whose keys are among these."""
        rows = self.rows()
        rows = rows.filter(pa.array([key in keys for key in rows["key"].to_pylist()], pa.bool_()))
        mark = hashlib.blake2b("\n".join([self.fingerprint, *rows["key"].to_pylist()]).encode(), digest_size=8).hexdigest()
        return replace(self, pairs=len(rows), samples=len(rows), fingerprint=mark, lacking="", path="", table=rows)

    def raws(self, keys: Collection[str]) -> Iterator[Raw]:
        """The raw samples of these keys in order. Nothing else of the shard is read, where the index tells the offsets."""
        rows = self.rows(["key", "fields", "offsets", "sizes"])
        rows = rows.filter(pc.is_in(rows["key"], value_set=pa.array(sorted(keys), pa.string())))
        if rows["offsets"].null_count:
            there = frozenset(keys)
            yield from (raw for raw in read_pairs(self.shard) if raw["__key__"] in there)
            return
        found = rows.to_pylist()
        sparse = bool(found) and found[-1]["offsets"][-1] > len(found) * SPARSE
        with tars.open_tar(self.shard, at_once=NARROW if sparse else 0) as tar:
            for row in found:
                yield read_row(tar.at, self.shard, row)


def read_row(at: Callable[[int, int], bytes], shard: str, row: Mapping[str, Any]) -> Raw:
    """The raw sample that a row of an index tells the place of. Raises BadInput when the shard is not as the index says."""
    raw: Raw = {"__key__": row["key"], "__url__": shard}
    for field, offset, size in zip(row["fields"], row["offsets"], row["sizes"], strict=True):
        raw[field] = at(offset, size)
        if len(raw[field]) < size:
            raise BadInput(f"{shard}: is shorter than its index says; it changed since, so index it again")
    return raw


@dataclass(frozen=True, eq=False)
class Index:
    """Every image-text pair of a shard set, shard by shard; never all in memory unless it was scanned."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for part in self.parts:
            yield from part

    def keys(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.all_keys()

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(part.shard for part in self.parts)

    @property
    def incomplete(self) -> int:
        """Samples that lack a half and are no pairs."""
        return sum(part.samples - part.pairs for part in self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """Of the pairs and the sizes of their members: changes when the data do, not when they are moved."""
        return hashlib.blake2b("\n".join(part.fingerprint for part in self.parts).encode(), digest_size=8).hexdigest()

    def only(self, keys: frozenset[str]) -> Index:
        """The pairs of these keys. The fingerprint becomes that of their keys and of the whole."""
        return Index(tuple(part.only(keys) for part in self.parts))

    def pairs_per_shard(self, keep: frozenset[str] | None = None) -> list[int]:
        """How many pairs each shard gives, after a keep list where there is one."""
        return [len(part) if keep is None else sum(key in keep for key in part.all_keys()) for part in self.parts]


# ---- read


def find(urls: str, incomplete: Incomplete = "refuse", where: str = "") -> Index:
    """The index of shards: what data_tools/index.py wrote if it is of these shards as they are now, else from a scan.

    where: its folder, if that is not `index` beside the shards; then it must be there. Raises BadInput when a key occurs twice
    (it names a pair in a plan or a keep list), when a shard disagrees with sizes.json beside it, and, under "refuse", when a
    sample lacks its image or its caption.
    """
    shards = expand(urls)
    folders = [folder_for(shard, where) for shard in shards]
    known = {folder: summary(folder) for folder in set(folders)}
    with ThreadPoolExecutor(16) as threads:  # stores are asked about every shard
        look = threads.map if any(map(is_remote, shards)) else map
        parts = list(look(written, shards, folders, (known[folder] for folder in folders)))
    missing = [shard for shard, part in zip(shards, parts, strict=True) if part is None]
    if where and any(map(version, missing)):  # where a store tells no version, no index can be known to be right
        raise BadInput(f"{where}: holds no index of {missing[0]} as it is now, nor of {len(missing) - 1} other shards; write it with "
                       f"data_tools/index.py SHARDS --out {where}")
    with ALONE.executor() as here:
        scanned = iter(map_shards(scan_shard, missing, here, "index"))
    checked = not missing and len(known) == 1 and len(set(map(stores.name_of, shards))) == len(shards)
    return whole(Index(tuple(next(scanned) if part is None else part for part in parts)), incomplete, checked)


def whole(index: Index, incomplete: Incomplete, checked: bool = False, flag: str = "--data.incomplete") -> Index:
    """The index itself. Raises BadInput as `find` says; keys that were `checked` are not compared again."""
    first = next((part for part in index.parts if part.samples > part.pairs), None)
    if first and incomplete == "refuse":
        raise BadInput(f"{first.shard}: sample {first.lacking} lacks its image or its caption, as do {index.incomplete} of "
                       f"{index.incomplete + len(index)} samples; leave them out with {flag} skip (mind that in `a.b.jpg` the key is a "
                       "and the field b.jpg)")
    if not checked:
        check_unique(index.parts)
    if not len(index):
        raise BadInput(f"{index.shards[0]}: no image-text pair in {len(index.parts)} shards; each needs KEY.jpg (png, webp) and KEY.txt")
    return index


def folder_for(shard: str, where: str) -> str:
    return where or stores.join(stores.folder_of(shard), "index")


def summary(folder: str) -> dict[str, Any]:
    """What index.json in a folder says of each shard, by name; nothing where there is none."""
    path = stores.join(folder, SUMMARY)
    try:
        return dict(stores.read_json(path)["shards"]) if stores.exists(path) else {}
    except (KeyError, TypeError, ValueError):  # BadInput is one: if the store is at fault, its shards will tell
        return {}


def written(shard: str, folder: str, known: Mapping[str, Any]) -> Part | None:
    """The indexed part of a shard, if it is whole and of the shard as it is now."""
    path, said = part_path(shard, folder), known.get(stores.name_of(shard))
    return current(shard, path, said) if said and (is_remote(path) or is_parquet(path)) else None


def current(shard: str, path: str, said: Mapping[str, Any]) -> Part | None:
    try:
        part = Part(shard, path=path, **said)
        len(part)
    except TypeError:  # what another version of this suite wrote, or somebody else
        return None
    return part if part.version and part.version == version(shard) else None


def is_parquet(path: str) -> bool:
    """Whether a file ends as Parquet files do, which one that was cut does not."""
    try:
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            return file.read() == b"PAR1"
    except OSError:
        return False


def part_path(shard: str, folder: str) -> str:
    return stores.join(folder, stem(shard) + ".parquet")


def stem(shard: str) -> str:
    """Name of a shard without .tar and what follows."""
    name = stores.name_of(shard)
    return name.rpartition(".tar")[0] or name.partition(".")[0]


def version(shard: str) -> str:
    """Size and time of a local shard, and what a store calls the version of one of its objects; "" where it has none."""
    if is_remote(shard):
        return stores.remote_version(shard)
    s = os.stat(shard)
    return f"{s.st_size} {s.st_mtime_ns}"


# ---- make


def scan_shard(shard: str) -> Part:
    """The part of a shard, from its headers and captions; images are sought past."""
    with tars.open_tar(shard) as tar:
        known = version(shard)  # before it is read: what changes meanwhile is scanned again
        found = samples.table(tar, texts=True)
    n = len(found)
    check_size(shard, n)
    owner = np.repeat(np.arange(n), np.diff(found.at))
    pictured, bodies = np.zeros(n, bool), [b""] * n
    pictured[owner[pc.is_in(found.fields, value_set=pa.array(IMAGE_FIELDS)).to_numpy(zero_copy_only=False)]] = True
    for i, body in zip(owner[pc.equal(found.fields, "txt").to_numpy(zero_copy_only=False)].tolist(), found.texts, strict=True):
        bodies[i] = body
    fine = pictured & np.array([bool(body.strip()) for body in bodies], bool)
    columns = [found.keys, pa.array([body.decode("utf-8", "replace").strip() for body in bodies], pa.string())]
    columns += [pa.ListArray.from_arrays(pa.array(found.at, pa.int32()), pa.array(v)) for v in (found.fields, found.offsets, found.sizes)]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    if not fine.all():
        table = table.filter(pa.array(fine))
    lacking = found.keys[int(fine.argmin())].as_py() if len(table) < n else ""
    return Part(shard, known, len(table), n, fingerprint(table), lacking, table=table)


def check_size(shard: str, samples: int) -> None:
    said = recorded_size(shard)
    if said is not None and said != samples:
        raise BadInput(f"{shard}: holds {samples} samples, sizes.json beside it says {said}; fetch the shard again or correct sizes.json")


def fingerprint(table: pa.Table) -> str:
    """Of all but the places."""
    digest = hashlib.blake2b(digest_size=8)
    for values in (table["key"], table["text"], pc.list_flatten(table["fields"])):
        digest.update("\n".join(values.to_pylist()).encode() + b"\0")
    digest.update(pc.list_flatten(table["sizes"]).to_numpy().tobytes())
    return digest.hexdigest()


def from_img2dataset(shard: str) -> Part | None:
    """The part of a shard from the Parquet file that img2dataset wrote with it, without a look into the tar.

    None where there is no such file, or its successes are not as many keys as NNNNN_stats.json says. It tells no offsets.
    """
    beside = stores.join(stores.folder_of(shard), stem(shard))
    if not stores.exists(f"{beside}.parquet"):
        return None
    known = version(shard)
    with stores.open_read(f"{beside}.parquet") as file:
        try:
            rows = pq.read_table(file, columns=["key", "caption", "status"])
            rows = rows.filter(pc.equal(rows["status"], "success"))
            keys, captions = (rows[name].cast(pa.string()).to_pylist() for name in ("key", "caption"))
        except (OSError, ValueError, pa.ArrowException):
            return None
    try:
        stats = stores.read_json(f"{beside}_stats.json") if stores.exists(f"{beside}_stats.json") else {"successes": len(keys)}
    except BadInput:
        return None
    if None in keys or len(set(keys)) != stats.get("successes"):
        return None
    check_size(shard, len(keys))
    pairs = {key: text.strip() for key, text in zip(keys, captions, strict=True) if text and text.encode().strip()}
    lacking = next((key for key in keys if key not in pairs), "")
    table = pa.Table.from_arrays([pa.array(pairs, pa.string()), pa.array(pairs.values(), pa.string()),
                                  *(pa.nulls(len(pairs), kind.type) for kind in list(SCHEMA)[2:])], schema=SCHEMA)
    return Part(shard, known, len(pairs), len(keys), fingerprint(table), lacking, table=table)


def indexed(where: str, scan: bool, shard: str) -> Part | None:
    """The part of a shard that is written already, without its rows. With `scan`, none that img2dataset's file gave."""
    path = part_path(shard, folder_for(shard, where))
    if not stores.exists(path):
        return None
    with stores.open_read(path) as file:
        try:
            said = json.loads((pq.read_schema(file).metadata or {})[b"mmbackdoor"])
            return None if said.pop("source") == "img2dataset" and scan else current(shard, path, said)
        except (OSError, KeyError, ValueError, pa.ArrowException):
            return None


def index_shard(where: str, scan: bool, shard: str) -> Part:
    """Writes the part of a shard unless it is there; gives it without its rows."""
    if (found := indexed(where, scan, shard)) is not None:
        return found
    taken = None if scan else from_img2dataset(shard)
    part = scan_shard(shard) if taken is None else taken
    path, said = part_path(shard, folder_for(shard, where)), facts(part) | {"source": "tar" if taken is None else "img2dataset"}
    assert part.table is not None
    try:
        with stores.replacing(path) as temporary:
            pq.write_table(part.table.replace_schema_metadata({"mmbackdoor": json.dumps(said)}), temporary, use_dictionary=False,
                           write_statistics=False)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); make room, or name another folder with --out") from error
    return replace(part, path=path, table=None)


def facts(part: Part) -> dict[str, Any]:
    return {k: v for k, v in vars(part).items() if k not in ("shard", "path", "table")}


def write(shards: Sequence[str], executor: Executor, incomplete: Incomplete = "refuse", where: str = "", scan: bool = False,
          spread: Spread = ALONE) -> Index | None:
    """Indexes shards, each into its folder, of which only the missing parts are made; index.json comes last.

    In an array job, this task's share of them; then None unless the other tasks are done.
    """
    folders = {shard: folder_for(shard, where) for shard in shards}
    places = Counter(part_path(shard, folder_for(shard, where)) for shard in shards)
    if twice := [path for path, n in places.items() if n > 1]:
        raise BadInput(f"{twice[0]}: would be the index of two of the shards, which have one name; index each folder on its own")
    if web := [folder for folder in folders.values() if folder.startswith(("http://", "https://"))]:
        raise BadInput(f"{web[0]}: a web server takes no files; name another folder for the index with --out")
    if inside := [f for shard, f in folders.items() if os.path.realpath(f) == os.path.realpath(stores.folder_of(shard))]:
        raise BadInput(f"--out {inside[0]}: holds the shards, whose own Parquet files the index would replace; name another folder")
    for folder in set(folders.values()) if scan else ():
        stores.remove(stores.join(folder, SUMMARY))  # it may tell what img2dataset's files told
    one, mine = partial(index_shard, where, scan), spread.share(shards)
    parts: dict[str, Part | None] = dict(zip(mine, map_shards(one, mine, executor, "index"), strict=True))
    others = [shard for shard in shards if shard not in parts]
    present = {path for folder in set(folders.values()) for path in stores.listing(folder, ".parquet")} if others else set()
    if any(part_path(shard, folders[shard]) not in present for shard in others):
        return None
    parts |= zip(others, map_shards(partial(indexed, where, scan), others, executor, "look"), strict=True)
    found = [part for shard in shards if (part := parts[shard]) is not None]
    if len(found) < len(shards):
        return None
    index = whole(Index(tuple(found)), incomplete, flag="--incomplete")
    for folder in set(folders.values()):
        own = {stores.name_of(part.shard): facts(part) for part in found if folders[part.shard] == folder}
        stores.write_json(stores.join(folder, SUMMARY), {"shards": own})
    return index


def recorded_size(shard: str) -> int | None:
    """Samples of a local shard, as sizes.json beside it says."""
    path = os.path.join(os.path.dirname(shard), "sizes.json")
    if is_remote(shard) or not os.path.isfile(path):
        return None
    try:
        return read_sizes(path, version(path)).get(os.path.basename(shard))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: cannot be read as sample counts ({error}); correct or remove it") from error


@lru_cache(maxsize=1)
def read_sizes(path: str, version: str) -> Any:
    """All shards of a folder are in one file, which is read once."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# ---- keys that occur twice


def check_unique(parts: Sequence[Part]) -> None:
    """Raises BadInput when a key occurs twice. Hashes of keys are sorted, AT_ONCE together; where there are more, by way of
    temporary files, each of a range of the hashes: 8 bytes a key."""
    heaps = -(-sum(map(len, parts)) // AT_ONCE)
    if heaps <= 1:
        suspects = repeated(np.concatenate([np.empty(0, np.int64), *map(hashes, parts)]))
    else:
        bounds = [2**64 * i // heaps - 2**63 for i in range(1, heaps)]
        with tempfile.TemporaryDirectory() as folder, stores.telling(folder, "written"):
            for some in in_parts(map(hashes, parts)):
                some.sort()
                for i, heap in enumerate(np.split(some, np.searchsorted(some, bounds))):
                    with open(f"{folder}/{i}", "ab") as file:
                        heap.tofile(file)
            suspects = np.concatenate([repeated(np.fromfile(f"{folder}/{i}", np.int64)) for i in range(heaps)])
    if not len(suspects):
        return
    where: dict[str, list[str]] = {}
    for part in parts:
        there = np.isin(hashes(part), suspects[:NAMED])
        for key in part.rows(["key"])["key"].filter(pa.array(there)).to_pylist():
            where.setdefault(key, []).append(part.shard)
    twice = {key: shards for key, shards in where.items() if len(shards) > 1}
    if twice:
        key = next(iter(twice))
        more = "at least " if len(suspects) > NAMED else ""
        raise BadInput(f"key {key} occurs in {twice[key][0]} and {twice[key][1]}, one of {more}{len(twice)} repeated keys; rename them, "
                       "since a key names a pair: python data_tools/index.py SHARDS --rename OUT")


def hashes(part: Part) -> np.ndarray:
    """64 bits of each key, the same within this process."""
    return np.array(list(map(hash, part.all_keys())), np.int64)


def in_parts(found: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same numbers, AT_ONCE or a few more at a time."""
    held: list[np.ndarray] = []
    n = 0
    for some in found:
        held.append(some)
        n += len(some)
        if n >= AT_ONCE:
            yield np.concatenate(held)
            held, n = [], 0
    yield np.concatenate([np.empty(0, np.int64), *held])


def repeated(found: np.ndarray) -> np.ndarray:
    found.sort()
    return np.unique(found[1:][found[1:] == found[:-1]])
