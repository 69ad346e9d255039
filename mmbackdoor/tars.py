"""Tars as bytes: where the headers and bodies of their members lie, and members exchanged without touching the others.

Python's tarfile reads a header in some 30 microseconds and takes a damaged one for the end of the file; here the headers are
followed in about one, each checked. tests/test_tars.py holds every answer to tarfile's.
"""
from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np

from .stores import is_remote, open_read
from .types import BadInput

BLOCK = 512
WINDOW = 4096
"""Bytes of a local file that are read at once: the headers of small members come with those before them."""
AHEAD = 512
"""Headers of a local file that are checked together."""
LONGEST = 1 << 28
"""Bytes of a body that are read, and of 256 extended headers: what claims more is a bomb."""
PAGE, BUFFER = 4096, 1 << 20
NOT_HERE = frozenset((errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY))
"""What a way of copying answers between file systems, or on one, that it does not serve."""
ZEROS = bytes(BLOCK)
PACKED: dict[bytes, Callable[..., Any]] = {rb"\x1f\x8b\x08": gzip.open, rb"BZh[1-9]1AY&SY": bz2.open, rb"\xfd7zXZ\0": lzma.open}
"""How compressed files begin, and what reads them. A plain tar begins with a name, which may well be BZhivago.jpg."""
EXTENDED = tarfile.GNUTYPE_LONGNAME + tarfile.GNUTYPE_LONGLINK + tarfile.XHDTYPE + tarfile.SOLARIS_XHDTYPE + tarfile.XGLTYPE
WITHOUT_BODY = b"".join((tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE))
REGULAR = b"".join((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE))


class Member(NamedTuple):
    """Where a member of a tar lies, in bytes from the tar's beginning."""

    name: str
    start: int
    """Of its headers, extended ones included, but for global ones: those are of all members."""
    data: int
    """Of its body; its own header is the block before."""
    size: int
    """Of its body, without the padding to whole blocks."""
    regular: bool

    @property
    def end(self) -> int:
        return self.data + padded(self.size)


def padded(size: int) -> int:
    return -size % BLOCK + size


def broken(url: str, why: object) -> BadInput:
    return BadInput(f"{url}: a truncated or corrupt tar ({(str(why).splitlines() or [''])[0].rstrip(':')}); fetch or write it again")


@dataclass(frozen=True, eq=False)
class Tar:
    """A tar that is open for reading."""

    url: str
    at: Callable[[int, int], bytes]
    """(offset, number of bytes) -> those bytes, fewer at the end of the file."""
    file: IO[bytes] | None = None
    """The file itself, when the tar is a plain local one: bytes can be copied from it in runs."""

    def members(self) -> Iterator[Member]:
        """All members in order. Raises BadInput where a header is damaged, or the tar does not end as it should."""
        window, ahead = (WINDOW, AHEAD) if self.file else (BLOCK, 1)
        found: list[Member] = []
        blocks: list[bytes] = []
        known: dict[str, Any] = {}
        start = offset = begin = 0
        held = b""
        while True:
            here = offset - begin
            if here + BLOCK > len(held):
                held, begin, here = self.at(offset, window), offset, 0
            block = held[here : here + BLOCK]
            if len(block) < BLOCK:
                raise broken(self.url, f"it ends after {offset + len(block)} bytes without an end marker")
            if not block[0] and block == ZEROS:
                break
            blocks.append(block)
            try:
                size = int(block[124:136].rstrip(b"\0"), 8)
            except ValueError:
                size = number(self.url, block[124:136], offset)
            if not 0 <= size < 1 << 60:
                raise broken(self.url, f"an impossible size at byte {offset}")
            kind = block[156:157]
            offset += BLOCK
            name, regular = file_name(block), True
            if known or kind != tarfile.REGTYPE:
                if kind in EXTENDED:
                    body = held[here + BLOCK : here + BLOCK + size]
                    self.extend(known, kind, body if len(body) == size else self.at(offset, min(size, LONGEST >> 8)), size)
                    alone = kind == tarfile.XGLTYPE and start == offset - BLOCK
                    offset += padded(size)
                    start = offset if alone else start
                    continue
                if kind == tarfile.AREGTYPE and name[-1:] == "/" and "name" not in known:
                    kind = tarfile.DIRTYPE
                name, size, regular = known.get("name", name), known.get("size", size), kind in REGULAR
                if kind == tarfile.GNUTYPE_SPARSE or "sparse" in known:
                    raise BadInput(f"{self.url}: member {name} is a sparse file, which only GNU tar reads; write the shard again")
                if kind in WITHOUT_BODY:
                    size = 0
                known = {}
            found.append(Member(name, start, offset, size, regular))
            start = offset = offset + size + -size % BLOCK
            if len(blocks) >= ahead:
                check(self.url, blocks)
                yield from found
                found, blocks = [], []
        if blocks:
            check(self.url, blocks)
        if offset != start:
            raise broken(self.url, "it ends after an extended header")
        self.nothing_after(offset)
        yield from found

    def body(self, member: Member) -> bytes:
        if member.size > LONGEST:
            raise BadInput(f"{self.url}: member {member.name} says that it has {member.size} bytes, more than any image or caption; "
                           "write the shard again without it")
        found = self.at(member.data, member.size)
        if len(found) < member.size:
            raise broken(self.url, f"it ends within {member.name}")
        return found

    def rewritten(self, member: Member, body: bytes, field: str = "") -> bytes:
        """A member with another body: its headers, of which the size and the sum change and nothing else, the body, its padding.

        With `field` its name gets another extension. Raises BadInput for a member whose size stands in an extended header.
        """
        before = self.at(member.start, member.data - member.start)
        name = member.name
        if field:
            name = f"{name[: len(name) - len(name.rpartition('/')[2].partition('.')[2])]}{field}"
            try:
                info = tarfile.TarInfo.frombuf(before[-BLOCK:], "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise broken(self.url, f"the header of {member.name}: {error}") from error
            info.name = name
            before = info.tobuf(tarfile.GNU_FORMAT)
        new = before[:-BLOCK] + header(before[-BLOCK:], len(body)) + body + bytes(-len(body) % BLOCK)
        if len(before) > BLOCK and b"size=" in before:
            again = next(Tar(self.url, lambda offset, n: (new + ZEROS)[offset : offset + n]).members())
            if again.size != len(body):
                raise BadInput(f"{self.url}: member {name} has its size in an extended header, which stays as it is; write the shard again")
        return new

    def extend(self, known: dict[str, Any], kind: bytes, body: bytes, size: int) -> None:
        """Adds what an extended header says of the member after it. Where two of them speak, the first counts, as for tarfile."""
        if len(body) < size:
            raise broken(self.url, f"an extended header of {size} bytes")
        said: dict[bytes, bytes] = {}
        if kind == tarfile.GNUTYPE_LONGNAME:
            said = {b"path": body.partition(b"\0")[0]}
        elif kind != tarfile.GNUTYPE_LONGLINK and (b"path=" in body or b"size=" in body or b"GNU.sparse" in body):
            said = dict(self.records(body))
            if kind == tarfile.XGLTYPE and (b"path" in said or b"size" in said):
                raise BadInput(f"{self.url}: has a global header that names members or their sizes; write the shard again")
            said = {key: value.rstrip(b"/") if key == b"path" else value for key, value in said.items()}
        if b"path" in said:
            known.setdefault("name", said[b"path"].decode("utf-8", "surrogateescape"))
        if b"size" in said:
            if not said[b"size"].isdigit() or len(said[b"size"]) > 18:
                raise broken(self.url, "an impossible size in an extended header")
            known.setdefault("size", int(said[b"size"]))
        if any(key.startswith(b"GNU.sparse") for key in said):
            known["sparse"] = True

    def records(self, body: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The "length keyword=value" lines of a PAX header."""
        while body and body[0]:
            length = body[:20].partition(b" ")[0]
            n = int(length) if length.isdigit() else 0
            key, equals, value = body[len(length) + 1 : n - 1].partition(b"=")
            if not equals or body[n - 1 : n] != b"\n":
                raise broken(self.url, "an invalid extended header")
            yield key, value
            body = body[n:]

    def nothing_after(self, offset: int) -> None:
        """Raises BadInput if anything but zeros follows the end marker: readers would silently lose it."""
        while part := self.at(offset, 1 << 20):
            if part.count(0) != len(part):
                raise BadInput(f"{self.url}: goes on after its end marker, as tars do that were joined by cat, and would lose what "
                               "follows; join them by tar --concatenate, or write the shard again")
            offset += len(part)


def file_name(block: bytes) -> str:
    """Of a header, without a look at extended ones."""
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[156:157] not in tarfile.GNU_TYPES:  # type: ignore[attr-defined]
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def number(url: str, field: bytes, offset: int) -> int:
    """A number of a header as tarfile reads it: octal digits, or base 256."""
    try:
        return tarfile.nti(field)  # type: ignore[attr-defined]
    except tarfile.HeaderError as error:
        raise broken(url, f"{error} at byte {offset}") from error


def check(url: str, blocks: list[bytes]) -> None:
    """Raises BadInput unless the sums of all header blocks are right."""
    table = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, BLOCK)
    for i in np.flatnonzero(~summed(table)):  # none, but where a sum is wrong or written in another way
        said = number(url, blocks[i][148:156], 0)
        if said not in tarfile.calc_chksums(blocks[i]):  # type: ignore[attr-defined]
            raise broken(url, f"a header of {file_name(blocks[i])!r} with a bad checksum")


def summed(blocks: np.ndarray) -> np.ndarray:
    """Of header blocks (n, 512), which have their right sum, written in the usual way."""
    digits = blocks[:, 148:154] ^ ord("0")
    sums = blocks.sum(1, dtype=np.uint32) - blocks[:, 148:156].sum(1, dtype=np.uint32) + 8 * ord(" ")
    return (digits < 8).all(1) & (blocks[:, 154] == 0) & (digits @ 8 ** np.arange(5, -1, -1) == sums)


@contextmanager
def open_tar(path: str, url: str = "", at_once: int = 0) -> Iterator[Tar]:
    """A tar, local or behind a URL, plain or compressed by gzip, bzip2 or xz. Messages name `url` where it is given.
    at_once: as for `open_read`.

    Raises BadInput, here and when it is read, for what cannot be read.
    """
    url = url or path
    with open_read(path, at_once) as file:
        head = file.read(10)
        unpack = next((opener for magic, opener in PACKED.items() if re.match(magic, head)), None)
        inside = unpack(file) if unpack else file
        plain = not unpack and not is_remote(path)
        descriptor = file.fileno() if plain else -1
        file.seek(0)

        def at(offset: int, n: int) -> bytes:
            try:
                if plain:
                    return os.pread(descriptor, n, offset)
                inside.seek(offset)
                return inside.read(n)
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                raise broken(url, error) from error

        yield Tar(url, at, file if plain else None)


# ---- write


def copy(source: IO[bytes], target: IO[bytes], start: int, end: int) -> None:
    """Appends bytes of one local file to another: inside the kernel, where whole pages become whole pages (some file systems then
    share them), else through a buffer, which is faster than the kernel's way with pages that are shifted.

    Raises BadInput for a source that became shorter; OSError for what the disks answer.
    """
    into, out_of = target.fileno(), source.fileno()
    target.flush()
    if (start - target.tell()) % PAGE == 0:
        try:
            while start < end and (sent := os.copy_file_range(out_of, into, end - start, start)):
                start += sent
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
    while start < end and (body := os.pread(out_of, min(end - start, BUFFER), start)):
        start += os.write(into, body)
    if start < end:
        raise broken(source.name, "it became shorter while it was read")


def header(block: bytes, size: int) -> bytes:
    """A member's header block as it was, for a body of another size: its size and its sum change, nothing else."""
    new = bytearray(block)
    new[124:136] = (b"%11o" if block[124:125] == b" " else b"%011o") % size + (block[135:136] if block[135] in b"\0 " else b"\0")
    new[148:156] = b" " * 8
    ended = block[154:156] if block[154:156] in (b"\0 ", b" \0") else b"\0 "
    new[148:156] = (b"%6o" if block[148:149] == b" " else b"%06o") % sum(new) + ended
    return bytes(new)
