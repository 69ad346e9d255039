"""Tars as bytes: every answer of the walk is that of Python's tarfile, or a refusal."""
from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tar
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmbackdoor import index, shards, stores, tars
from mmbackdoor.tars import Member, header, open_tar
from mmbackdoor.types import BadInput

END = bytes(1024)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def oracle(body: bytes) -> list[tuple[Member, bytes]]:
    """The members and their bodies, as tarfile sees them."""
    with tarfile.open(fileobj=io.BytesIO(body)) as file:
        found = []
        for m in file:
            size = m.size if m.isreg() or m.type not in tarfile.SUPPORTED_TYPES else 0
            name = m.name if m.isreg() else m.name.rstrip("/")
            found.append((Member(name, m.offset, m.offset_data, size, m.isreg()), body[m.offset_data : m.offset_data + size]))
        return found


def walked(path: Path) -> list[tuple[Member, bytes]]:
    with open_tar(str(path)) as file:
        return [(m if m.regular else m._replace(name=m.name.rstrip("/")), file.body(m)) for m in file.members()]


def put(folder: Path, body: bytes) -> Path:
    (folder / "a.tar").write_bytes(body)
    return folder / "a.tar"


def refused(path: Path) -> str:
    """The message with which a tar is refused: one line that names it."""
    with pytest.raises(BadInput) as error, open_tar(str(path)) as file:
        list(file.members())
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and "; " in str(error.value)
    return str(error.value)


# ---- made by tarfile

LETTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\udc80\udcc3\udcff/.=\n 7")
NAMES = st.text(LETTERS, min_size=1, max_size=12) | st.integers(90, 300).flatmap(lambda n: st.text(LETTERS, min_size=n, max_size=n))
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1023, 1024, 1025, 4096, 5000])
BODIED = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, b"Z"]
TYPES = [*BODIED, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]


@st.composite
def infos(draw: st.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(draw(NAMES))
    info.type, info.size = draw(st.sampled_from(TYPES)), draw(SIZES)
    if info.type == tarfile.AREGTYPE:  # whether a long name makes a directory is told otherwise by each Python
        info.name = draw(st.sampled_from(["v7", "old/v7.jpg", "v7/"]))
        info.size = 0 if info.name[-1] == "/" else info.size
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        info.linkname = draw(NAMES)
    info.mtime = draw(st.integers(0, 2**33 - 1) | st.floats(0, 2e9))
    info.uname, info.uid = draw(st.sampled_from(["", "größe", "\udcff"])), draw(st.sampled_from([0, 1000, 2**21 - 1]))
    return info


@given(st.lists(infos(), min_size=1, max_size=6), st.sampled_from(list(FORMATS)), st.booleans())
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_walk_sees_what_tarfile_sees(tmp_path_factory, members, form, told):
    file = io.BytesIO()
    more = {"pax_headers": {"comment": "x size", "größe": "ü"}} if told and form == "pax" else {}
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form], encoding="utf-8", errors="surrogateescape", **more) as out:
        for i, info in enumerate(members):
            try:
                out.addfile(info, io.BytesIO(bytes([65 + i]) * info.size) if info.type in BODIED else None)
            except ValueError:
                assume(False)  # a name too long for USTAR
    body = file.getvalue()
    want = oracle(body)
    assert len(want) == len(members)
    assert walked(put(tmp_path_factory.getbasetemp(), body)) == want


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_tar_is_read_as_a_plain_one(pack, form, tmp_path):
    plain = sample_tar(FORMATS[form])
    assert walked(put(tmp_path, PACK[pack](plain))) == oracle(plain)
    with open_tar(str(tmp_path / "a.tar")) as file:
        assert file.file is None


def test_a_plain_tar_that_begins_like_a_packed_one_is_read(tmp_path):
    assert [m.name for m, _ in walked(tar(tmp_path / "a.tar", {"BZhivago.jpg": b"1"}))] == ["BZhivago.jpg"]


def sample_tar(form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as out:
        for i, name in enumerate(["a.jpg", "b/" * 40 + "b" * 60 + ".jpg", "größe.txt", "none.txt"]):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode, info.uname = (700, 512, 5, 0)[i], 1e9 + i / 3, 0o640, "somebody"
            out.addfile(info, io.BytesIO(b"x" * info.size))
    return file.getvalue()


# ---- made by hand


def block(name: bytes = b"a.jpg", size: int | bytes = 5, kind: bytes = b"0", signed: bool = False, said: str = "%06o\0 ", v7: bool = False,
          prefix: bytes = b"") -> bytes:
    """One header block with any bytes in its fields."""
    new = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    new[:100] = name.ljust(100, b"\0")
    new[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    new[156:157] = kind
    new[345:500] = prefix.ljust(155, b"\0")
    if v7:
        new[257:] = bytes(255)
    new[148:156] = b" " * 8
    total = sum(b - 256 if signed and b > 127 else b for b in new)
    new[148:156] = (said % total).encode()
    return bytes(new)


def padding(body: bytes) -> bytes:
    return body + bytes(-len(body) % 512)


def member(body: bytes = b"hello", **fields) -> bytes:
    return block(**({"size": len(body)} | fields)) + padding(body)


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records:
        rest = f" {key}={value}\n".encode("utf-8", "surrogateescape")
        n = len(rest) + 1
        n = next(k for k in range(n, n + 5) if k == len(rest) + len(str(k)))
        body += str(n).encode() + rest
    return member(body, name=b"././@PaxHeader", kind=kind)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return member(name + b"\0", name=b"././@LongLink", kind=kind)


HANDMADE = {
    "a size in base 256": member(size=b"\x80" + (5).to_bytes(11, "big")),
    "a size of 12 digits": member(size=b"000000000005"),
    "a size padded by spaces": member(size=b"          5 "),
    "a size that ends early": member(size=b"5\0" + b"7" * 10),
    "a size ended by spaces": member(size=b"5" + b" " * 11),
    "no size at all": member(b"", size=bytes(12)),
    "a size in a PAX header": pax(("size", "5")) + member(size=0),
    "a size and a name in a PAX header": pax(("path", "b/ü.jpg"), ("size", "5")) + member(size=700),
    "a PAX name with a slash at its end": pax(("path", "b.jpg/")) + member(),
    "a PAX name said twice": pax(("path", "b.jpg"), ("path", "c.jpg")) + member(),
    "an empty PAX name": pax(("path", "")) + member(),
    "a PAX name that is not UTF-8": pax(("path", "\udcff\udc80.jpg")) + member(),
    "PAX of another name": pax(("linkpath", "b" * 300), ("mtime", "1.5")) + member(),
    "PAX before PAX": pax(("path", "b.jpg"), ("size", "5")) + pax(("path", "c.jpg"), ("size", "0")) + member(size=700),
    "PAX before GNU": pax(("path", "b.jpg")) + long_name(b"c.jpg") + member(),
    "GNU before PAX": long_name(b"c.jpg") + pax(("path", "b.jpg")) + member(),
    "PAX of Solaris": member(pax(("path", "b.jpg"))[512:][:15], kind=b"X") + member(),
    "a global header": pax(("comment", "size"), kind=b"g") + member() + pax(("mtime", "5"), kind=b"g") + pax(("path", "c")) + member(),
    "a global header within": pax(("path", "c.jpg")) + pax(("mtime", "5"), kind=b"g") + member(),
    "a long GNU name": long_name(b"d/" * 200 + b"\xff.jpg") + member(),
    "a long GNU link": long_name(b"d/" * 200, b"K") + member(b"", kind=b"2"),
    "both": long_name(b"l" * 200, b"K") + long_name(b"n" * 200) + member(b"", kind=b"1", size=77),
    "a prefix": member(prefix=b"some/folder"),
    "a prefix of a folder": member(b"", kind=b"5", name=b"d/", prefix=b"some/folder"),
    "a full prefix": member(prefix=b"p" * 155, name=b"n" * 100),
    "a link that tells a size": member(b"", kind=b"1", size=5),
    "a folder that tells a size": member(b"", kind=b"5", name=b"d/", size=900),
    "a type that nobody knows": member(kind=b"Z"),
    "the old format": member(v7=True, kind=b"\0"),
    "a folder in the old format": member(b"", v7=True, kind=b"\0", name=b"d/"),
    "a sum of signed bytes": member(name=b"\xff\xc3.jpg", signed=True),
    "a sum of 7 digits": member(said="%07o\0"),
    "a sum padded by spaces": member(said="%6o\0 "),
    "a sum without an end": member(said="%08o"),
    "a sum above 16 bits": member(name=b"\xff" * 100, prefix=b"\xff" * 155),
    "an empty name": member(name=b"\0a"),
    "nothing": b"",
}


@pytest.mark.parametrize("what", HANDMADE)
def test_an_odd_header_is_read_as_tarfile_reads_it(what, tmp_path):
    body = member(b"before", name=b"1") + HANDMADE[what] + member(b"after", name=b"2") + END
    want = oracle(body)
    assert [m.name for m, _ in (want[0], want[-1])] == ["1", "2"] and walked(put(tmp_path, body)) == want


def test_a_long_name_that_is_cut_at_a_slash_is_no_folder(tmp_path):
    """Some Pythons take it for one, and then its body for a header."""
    name = b"a" * 99 + b"/b.jpg"
    (found, body), = walked(put(tmp_path, long_name(name) + member(name=name[:100], kind=b"\0") + END))
    assert (found.name, found.regular, body) == (name.decode(), True, b"hello")


DAMAGED = {
    "a negative size": (member(size=b"-0000000001\0"), "size"),
    "a negative size in base 256": (member(size=b"\xff" * 12), "size"),
    "a size beyond all disks": (member(size=b"\x80" + b"\xff" * 11), "size"),
    "a size that is no number": (member(size=b"hello world\0"), "invalid header"),
    "a size in Unicode digits": (member(size="٥".encode().ljust(12, b"\0")), "invalid header"),
    "a wrong sum": (member(said="%06o\0 ").replace(b"a.jpg", b"b.jpg"), "'b.jpg' with a bad checksum"),
    "a sum of which the first six digits are right": (member(said="%06o7 "), "bad checksum"),
    "a sum that is no number": (member(said="%05ox\0 "), "invalid header"),
    "a sparse file of GNU": (member(kind=b"S"), "sparse"),
    "a sparse file of PAX": (pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "b")) + member(), "sparse"),
    "a global name": (pax(("path", "b.jpg"), kind=b"g") + member(), "global header"),
    "a global size": (pax(("size", "7"), kind=b"g") + member(), "global header"),
    "a negative PAX size": (pax(("size", "-5")) + member(), "impossible size"),
    "a PAX size that is no number": (pax(("size", "5.0")) + member(), "impossible size"),
    "a PAX size of 5000 digits": (pax(("size", "9" * 5000)) + member(), "impossible size"),
    "a PAX record of length 0": (member(b"0 path=b\n", kind=b"x") + member(), "invalid extended header"),
    "a PAX record of length 1": (member(b"1 path=b\n", kind=b"x") + member(), "invalid extended header"),
    "a PAX record that is too long": (member(b"99 path=b\n", kind=b"x") + member(), "invalid extended header"),
    "a PAX record that is too short": (member(b"8 path=b\n", kind=b"x") + member(), "invalid extended header"),
    "a PAX length of 5000 digits": (member(b"9" * 5000 + b" path=b\n", kind=b"x") + member(), "invalid extended header"),
    "a long name of terabytes": (block(kind=b"L", size=b"\x80" + (1 << 40).to_bytes(11, "big")) + member(), "extended header of"),
    "an extended header of nothing": (long_name(b"b.jpg"), "after an extended header"),
    "a long link of nothing": (long_name(b"b.jpg", b"K"), "after an extended header"),
}


@pytest.mark.parametrize("pack", ["", "gz"])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_refused(what, pack, tmp_path):
    body, says = DAMAGED[what]
    body = member(b"before", name=b"1") + body + END
    assert says in refused(put(tmp_path, PACK[pack](body) if pack else body))


def test_what_follows_the_end_marker_is_refused_unless_it_is_zeros(tmp_path):
    one = member() + END
    assert "goes on after its end marker" in refused(put(tmp_path, one + one))
    assert "goes on after its end marker" in refused(put(tmp_path, one + bytes(3 << 20) + b"x"))
    assert len(walked(put(tmp_path, one + bytes(3 << 20)))) == 1


@pytest.mark.parametrize("pack", ["", *PACK])
def test_a_tar_that_is_cut_anywhere_is_refused(pack, tmp_path):
    whole = sample_tar()
    last = max(m.end for m, _ in oracle(whole))
    for n in sorted({*range(0, last + 1, 512), *range(1, last + 512, 487)}):
        assert "truncated or corrupt" in refused(put(tmp_path, PACK[pack](whole[:n]) if pack else whole[:n]))
    assert walked(put(tmp_path, whole[: last + 512])) == oracle(whole)  # one block of zeros ends a tar for tarfile, too
    for n in range(0, len(PACK[pack](whole)) if pack else 0, 7):
        assert "truncated or corrupt" in refused(put(tmp_path, PACK[pack](whole)[:n]))


def test_a_member_that_claims_more_than_any_image_is_not_read_into_memory(tmp_path):
    path = put(tmp_path, member(b"x") + END)
    with open_tar(str(path)) as file, pytest.raises(BadInput, match=f"{path}: member a.jpg says that it has {1 << 40} bytes.*; write"):
        file.body(Member("a.jpg", 0, 512, 1 << 40, True))


def test_a_tar_that_shrinks_while_it_is_read_is_told_and_does_not_crash(tmp_path):
    path = put(tmp_path, sample_tar())
    with open_tar(str(path)) as file:
        first = next(file.members())
        os.truncate(path, 600)
        with pytest.raises(BadInput, match="it ends within a.jpg"):
            file.body(first)


# ---- exchanged members


@pytest.mark.parametrize("n", [0, 5, 511, 512, 513, 100_000])
@pytest.mark.parametrize("form", FORMATS)
def test_a_rewritten_member_keeps_all_of_its_headers_but_size_and_sum(form, n, tmp_path):
    whole = sample_tar(FORMATS[form])
    with open_tar(str(put(tmp_path, whole))) as file:
        for m in file.members():
            new = file.rewritten(m, b"y" * n)
            head = m.data - m.start
            was, now = (bytearray(b[head - 512 : head]) for b in (whole[m.start :], new))
            for b in (was, now):
                del b[148:154], b[124:135]  # the terminators of both fields stay, too
            assert now == was and new[: head - 512] == whole[m.start : m.data - 512]
            (found, body), = oracle(new + END)
            assert (found.name, body) == (m.name, b"y" * n) and new[head + n :] == bytes(-n % 512)


@pytest.mark.parametrize("what", [what for what in HANDMADE if b" size=" not in HANDMADE[what]])
def test_an_odd_header_is_rewritten_to_one_that_tarfile_reads(what, tmp_path):
    with open_tar(str(put(tmp_path, HANDMADE[what] + END))) as file:
        for m in file.members():
            if m.regular:
                (found, body), = oracle(file.rewritten(m, b"other body") + END)
                assert (found.name, body) == (m.name, b"other body")


def test_a_size_in_an_extended_header_is_not_contradicted(tmp_path):
    for fine, body in ((False, pax(("size", "5")) + member()), (True, pax(("comment", "a size=5")) + member())):
        with open_tar(str(put(tmp_path, body + END))) as file:
            m, = file.members()
            if fine:
                assert [b for _, b in oracle(file.rewritten(m, b"longer body") + END)] == [b"longer body"]
            else:
                with pytest.raises(BadInput, match="a.tar: member a.jpg has its size in an extended header.*; write the shard again"):
                    file.rewritten(m, b"longer body")


def test_a_member_may_get_another_extension(tmp_path):
    with open_tar(str(put(tmp_path, sample_tar()))) as file:
        for m in file.members():
            with tarfile.open(fileobj=io.BytesIO(file.rewritten(m, b"y", "png") + END)) as new:
                made, = new.getmembers()
            assert made.name == m.name.rpartition(".")[0] + ".png" and (made.mode, made.uname, made.size) == (0o640, "somebody", 1)


def test_a_header_is_as_before_but_for_size_and_sum():
    was = tarfile.TarInfo("größe.jpg")
    was.mtime, was.mode, was.uid, was.size, was.uname = 77, 0o600, 5, 9, "somebody"
    now = tarfile.TarInfo.frombuf(header(was.tobuf(tarfile.USTAR_FORMAT), 123456), "utf-8", "strict")
    assert now.size == 123456 and all(getattr(now, k) == getattr(was, k) for k in ("name", "mtime", "mode", "uid", "uname", "type"))


# ---- bytes in runs


def fails(number: int, after: int = 0) -> Callable[..., int]:
    """A way of copying that does `after` bytes and then fails."""
    left = [after]

    def way(*args):
        if left[0]:
            out_of, into, n, at = args if args[0] < args[1] else (args[1], args[0], args[3], args[2])
            left[0] = 0
            return os.write(into, os.pread(out_of, after, at))
        raise OSError(number, os.strerror(number))

    return way


PIECES = ((7, 2_000_000), (5, 5), (0, 10), (1183, 9000), (2_999_990, 3_000_001))
"""Of which the first and the fourth go to where whole pages become whole pages."""


@pytest.fixture
def file_pair(tmp_path):
    body = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "from").write_bytes(body)
    with open(tmp_path / "from", "rb") as source, open(tmp_path / "to", "wb") as target:
        yield body, source, target


@pytest.mark.parametrize("after", [0, 1000])
@pytest.mark.parametrize("fail", [False, True])
def test_bytes_are_copied_inside_the_kernel_or_through_a_buffer(fail, after, file_pair, monkeypatch, tmp_path):
    body, source, target = file_pair
    if fail:
        monkeypatch.setattr(os, "copy_file_range", fails(errno.EXDEV, after))
    for start, end in PIECES:
        target.write(b"between")
        tars.copy(source, target, start, end)
    target.flush()
    want = b"".join(b"between" + body[a:b] for a, b in PIECES)
    assert (tmp_path / "to").read_bytes() == want


@pytest.mark.parametrize("fail", [False, True])
def test_a_source_that_became_shorter_is_told(fail, file_pair, monkeypatch):
    body, source, target = file_pair
    if fail:
        monkeypatch.setattr(os, "copy_file_range", fails(errno.ENOSYS))
    with pytest.raises(BadInput, match="from: .*it became shorter while it was read.*; fetch or write it again"):
        tars.copy(source, target, 0, len(body) + 1)


def test_a_full_disk_is_told(file_pair, monkeypatch, tmp_path):
    body, source, target = file_pair
    monkeypatch.setattr(os, "copy_file_range", fails(errno.ENOSPC, 1000))
    with pytest.raises(BadInput, match="to: cannot be written .*No space left.*; make room"), stores.replacing(tmp_path / "to"):
        tars.copy(source, target, 0, len(body))


# ---- many members


def many(path: Path, n: int) -> None:
    """A tar of n samples: an empty .jpg and a .txt of seven letters each, made without tarfile, which would take minutes."""
    unit = np.frombuffer(member(b"", name=b"0000000.jpg") + member(b"0000000", name=b"0000000.txt"), np.uint8)
    with open(path, "wb") as file:
        for first in range(0, n, 50_000):
            digits = (np.arange(first, min(n, first + 50_000))[:, None] // 10 ** np.arange(6, -1, -1) % 10 + 48).astype(np.uint8)
            rows = np.tile(unit, (len(digits), 1))
            for at in (0, 512):
                rows[:, at : at + 7] = digits
                total = sum(unit[at : at + 512].tolist()) - sum(unit[at + 148 : at + 156].tolist()) + 256
                sums = total + digits.sum(1, dtype=np.int64) - 7 * 48
                rows[:, at + 148 : at + 154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + 48
            rows[:, 1024:1031] = digits
            rows.tofile(file)
        file.write(END)


@pytest.mark.parametrize("n", [10_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_shard_of_very_many_members_is_read_indexed_and_spliced(n, tmp_path):
    many(tmp_path / "a.tar", n)
    url = str(tmp_path / "a.tar")
    part = index.scan_shard(url)
    assert part.pairs == part.samples == n and list(part)[-1] == (f"{n - 1:07d}",) * 2
    assert sum(raw["__key__"].encode() == raw["txt"] for raw in shards.read_raw(url)) == n
    planned = {f"{i:07d}" for i in (0, n // 2, n - 1)}
    assert shards.splice(url, tmp_path / "b.tar", planned, lambda raw: raw | {"txt": b"changed"}) == n
    was, now = (np.fromfile(tmp_path / name, np.uint8)[: n * 1536].reshape(n, 1536) for name in ("a.tar", "b.tar"))
    assert np.flatnonzero((was != now).any(1)).tolist() == sorted(map(int, planned))


def test_the_walk_is_several_times_as_fast_as_tarfile(tmp_path):
    many(tmp_path / "a.tar", 5_000)

    def seconds(act: Callable[[], int]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            assert act() == 10_000
            times.append(time.perf_counter() - start)
        return min(times)

    def walk() -> int:
        with open_tar(str(tmp_path / "a.tar")) as file:
            return sum(1 for _ in file.members())

    def reference() -> int:
        with tarfile.open(tmp_path / "a.tar") as file:
            return sum(1 for _ in file)

    assert seconds(walk) * 4 < seconds(reference)


def test_numbers_padded_by_spaces_stay_so():
    block = bytearray(member(b"x" * 700)[:512])
    block[124:136], block[148:156] = b"       1274 ", b" " * 8
    block[148:156] = b"%6o\0 " % sum(block)
    new = header(bytes(block), 8)
    assert new[124:136] == b"         10 " and new[148:156] == b"%6o\0 " % (sum(new) - sum(new[148:156]) + 256)
