"""Shards from strangers: whatever they hold, each sample is read, carried along or named; nothing is run, and nothing is lost."""
from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import re
import signal
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from conftest import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmbackdoor import index, poison, samples, shards
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput

ATTACK = badnets("red star", 1.0, Patch(2 / 8, "bottom-right", cells=2))
Members = list[tuple[tarfile.TarInfo, bytes]]


def said(act: Callable[[], Any]) -> Any:
    """What comes of it, or the message with which it is refused: one line with the file, the fault and the mend."""
    try:
        return act()
    except BadInput as error:
        message = str(error)
        assert "\n" not in message and re.search("; |, ", message)
        return message


def info(name: str, body: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    new = tarfile.TarInfo(name)
    new.type, new.linkname, new.size = kind, link, len(body)
    for field, value in fields.items():
        setattr(new, field, value)
    return new, body


def pair(key: str, text: bytes = b"a dog", image: bytes | None = None) -> Members:
    return [info(f"{key}.jpg", picture() if image is None else image), info(f"{key}.txt", text)]


def packed(members: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as out:
        for one, body in members:
            out.addfile(one, io.BytesIO(body))
    return file.getvalue()


def seen(path: Path) -> list[tuple]:
    """What tarfile sees of a tar: every header field and body; it stops where it is content to."""
    found: list[tuple] = []
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as file:
            for m in file:
                # of the fields in PAX headers, too
                found.append((m.name, m.mode, m.uid, m.gid, m.mtime, m.type, m.linkname, m.uname, m.pax_headers, body_of(file, m)))
    except (tarfile.TarError, ValueError) as error:  # newer Pythons refuse more
        found.append((type(error),))
    return found


def body_of(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = file.extractfile(member) if member.isreg() else None
    return opened.read() if opened else b""


# ---- generated and mutated shards


def poisoned(raw: shards.Raw) -> shards.Raw:
    return poison.poisoned(raw, ATTACK, 0) if shards.is_pair(raw) else raw  # of others there is no plan


def captioned(raw: shards.Raw) -> shards.Raw:
    return raw | {"txt": b"changed"} if "txt" in raw else raw


def without_url(raws: Iterable[shards.Raw]) -> list[shards.Raw]:
    return [{k: v for k, v in raw.items() if k != "__url__"} for raw in raws]


def examine(path: Path, out: Path, key: str, change: Callable[[shards.Raw], shards.Raw]) -> bool:
    """Puts a shard through the index, the reader and the splice, which must all see the same. Whether it was taken."""
    part = said(lambda: index.scan_shard(str(path)))
    raws = said(lambda: list(shards.read_raw(str(path))))
    out.unlink(missing_ok=True)
    n = said(lambda: shards.splice(str(path), out, {key}, change))
    if isinstance(part, str) or isinstance(raws, str):
        assert isinstance(part, str) and (part == raws or "is not UTF-8" in part) and isinstance(n, str) and not out.exists()
        return False
    pairs = [raw for raw in raws if shards.is_pair(raw)]
    assert (part.samples, part.pairs) == (len(raws), len(pairs))
    assert list(part) == [(raw["__key__"], raw["txt"].decode("utf-8", "replace").strip()) for raw in pairs]
    assert without_url(part.raws(part.all_keys())) == without_url(pairs)
    for raw in pairs:
        said(lambda raw=raw: shards.decode(raw))
    if key not in {raw["__key__"] for raw in raws}:
        assert f"holds no sample {key!r}" in n and not out.exists()
        return True
    if isinstance(n, str):
        assert re.search("has its size in an extended header|is not UTF-8", n) and not out.exists()
        return True
    assert n == len(raws)
    assert without_url(shards.read_raw(str(out))) == without_url(change(raw) if raw["__key__"] == key else raw for raw in raws)
    was, now = seen(path), seen(out)
    assert len(was) == len(now)
    for a, b in zip(was, now, strict=True):
        own, field = samples.split_name(str(a[0]))
        assert a == b or (a[:-1] == b[:-1] and samples.is_field(field) and own.removeprefix("./") == key)
    return True


KEYS = st.text(st.sampled_from("abAB./0 ü\n"), min_size=1, max_size=6) | st.integers(90, 260).map(lambda n: "long/" + "k" * n)
OTHERS = st.sampled_from([
    info("a.pickle", pickle.dumps(print)), info("dir/", kind=tarfile.DIRTYPE), info("l.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    info("h.txt", kind=tarfile.LNKTYPE, link="a.jpg"), info("d.jpg", kind=tarfile.BLKTYPE), info("f.txt", kind=tarfile.FIFOTYPE),
    info("README"), info("x.npy", bytes(600))])


@st.composite
def shard_of_pairs(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    keys = draw(st.lists(KEYS, min_size=1, max_size=5, unique=True))
    members: Members = []
    for key in keys:
        one = pair(key, draw(st.sampled_from([b"a dog", b"\xff\xfe", b"", b" \n", b"x" * 511, b"y" * 512])))
        one = one[:: draw(st.sampled_from([1, -1]))] + [info(f"{key}.JSON", b'{"caption": "a dog"}')] * draw(st.integers(0, 1))
        for member, _ in one:
            member.mtime, member.uname = draw(st.sampled_from([0, 1.5])), "me"
        members += draw(st.lists(OTHERS, max_size=1)) + one
    form = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    return packed(members, form) + bytes(draw(st.sampled_from([0, 512, 10240]))), keys


@given(shard_of_pairs(), st.integers(0, 99), st.sampled_from([poisoned, captioned]))
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_of_a_generated_shard_only_the_planned_sample_changes(tmp_path_factory, shard, number, change):
    folder = tmp_path_factory.getbasetemp()
    body, keys = shard
    (folder / "a.tar").write_bytes(body)
    examine(folder / "a.tar", folder / "out.tar", samples.split_name(f"{keys[number % len(keys)]}.jpg")[0].removeprefix("./"), change)


def base(usual: bool) -> tuple[bytes, list[int]]:
    """Six tiny samples, with headers of the usual kind only (they are gone through all at once) or of each; and where its headers are."""
    small, file = picture(size=(8, 6), quality=30, optimize=True), io.BytesIO()
    members = [*pair("s0", image=small), *pair("s1", b"\xff", image=picture("PNG")), info("s1.json", b'{"caption": "a cat"}'),
               info("README", b"hello", mtime=1.5), *pair("d/" * 60 + "s2", image=small), *pair("s3", image=small), info("s3.cls", b"7"),
               info("l.txt", kind=tarfile.SYMTYPE, link="s0.txt"), *pair("s4", image=picture("WEBP")), *pair("s5", image=small)]
    with tarfile.open(fileobj=file, mode="w") as out:
        for i, (one, body) in enumerate(members):
            if usual:
                one.name, one.type = one.name.replace("d/d/", ""), tarfile.REGTYPE
            out.format = tarfile.PAX_FORMAT if i < 7 and not usual else tarfile.GNU_FORMAT
            out.addfile(one, io.BytesIO(body))
    body = file.getvalue().rstrip(b"\0")
    body += bytes(-len(body) % 512 + 1024)
    return body, [at for at in range(0, len(body), 512) if body[at + 257 : at + 262] == b"ustar"]


def mutated(body: bytes, headers: list[int], rng: random.Random) -> bytes:
    """One to three changes, most in headers; for half of the shards the sums are made right again, so that other checks have to bite."""
    new = bytearray(body)
    at_header = rng.random() < 0.6
    for _ in range(rng.randint(1, 3)):
        at = rng.choice(headers) + rng.choice((rng.randrange(512), rng.randrange(124, 157))) if at_header else rng.randrange(len(body))
        at, n = min(at, len(new) - 1), rng.choice((1, 512))
        match rng.randrange(8):
            case 0 | 1:
                new[at] = rng.randrange(256)
            case 2 | 3:
                new[at] ^= 1 << rng.randrange(8)
            case 4:
                new[at] = rng.choice(b"\0 01234567/.xgLKS\x80\xff")
            case 5:
                a, b = (rng.randrange(len(new) // 512) * 512 for _ in range(2))
                new[a : a + 512], new[b : b + 512] = new[b : b + 512], new[a : a + 512]
            case 6:
                del new[at // n * n : at // n * n + n]
            case 7:
                new[at // n * n : at // n * n] = rng.choice((rng.randbytes(n), bytes(n)))
    if rng.random() < 0.5:
        for at in range(0, len(new) - 511, 512):
            if new[at + 257 : at + 262] == b"ustar":
                new[at + 148 : at + 156] = b" " * 8
                new[at + 148 : at + 156] = b"%06o\0 " % sum(new[at : at + 512])
    return bytes(new)


@pytest.fixture
def quick_folder(tmp_path) -> Iterator[Path]:
    """A folder in memory, where there is one: forty thousand files are written."""
    memory = Path("/dev/shm", f"mmbackdoor-{os.getpid()}-{tmp_path.name}")
    try:
        memory.mkdir()
    except OSError:
        memory = tmp_path
    yield memory
    for path in memory.iterdir():
        path.unlink()
    memory.rmdir()


CASES = 1000


@pytest.mark.parametrize("seed", range(10))
def test_a_mutated_shard_is_refused_or_nothing_of_it_is_lost(seed, quick_folder):
    body, headers = base(usual=seed % 2 == 0)
    rng = random.Random(seed)
    taken, keys = 0, ["s0", "s1", "s2" if seed % 2 == 0 else "d/" * 60 + "s2", "s3", "s4", "s5"]

    def hangs(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, hangs)
    try:
        for case in range(CASES):
            (quick_folder / "a.tar").write_bytes(mutated(body, headers, rng))
            signal.alarm(10)
            key, change = rng.choice(keys), captioned if case % 5 else poisoned
            try:
                taken += examine(quick_folder / "a.tar", quick_folder / "out.tar", key, change)
            except Exception as error:
                raise AssertionError(f"seed {seed}, case {case}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert CASES * 0.1 < taken < CASES * 0.9  # both outcomes are met


# ---- what strangers put into shards


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that claims a size and holds hardly anything."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg(side: int) -> bytes:
    """A tiny JPEG whose header claims another size."""
    return re.sub(rb"(?s)(\xff\xc0\0\x11\x08)....", rb"\g<1>" + struct.pack(">HH", side, side), picture(), count=1)


def webp(side: int) -> bytes:
    body = b"VP8X" + struct.pack("<IB3x", 10, 0) + (side - 1).to_bytes(3, "little") * 2 + picture("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


RAN, PASSWD = "/tmp/mmbackdoor-it-ran", "/etc/passwd"
GOOD = pair("good")
PICKLE = pickle.dumps(Payload(RAN))
CARRIED: dict[str, tuple[Members, list[str], int]] = {
    "pickles beside the pairs": ([info("a.pickle", PICKLE), *pair("a"), info("a.pth", PICKLE), info("a.jpg.pkl", PICKLE)], ["a"], 0),
    "a pipe for a name": (pair("pipe:touch it_ran; #"), ["pipe:touch it_ran; #"], 0),
    "names that climb out": ([*pair("../../up"), *pair("/root/abs"), *pair("a/../../b")], ["../../up", "/root/abs", "a/../../b"], 0),
    "names with odd letters": ([*pair("a b\n'\"`$(touch it_ran)"), *pair("ü😀")], ["a b\n'\"`$(touch it_ran)", "ü😀"], 0),
    "links": ([info("l.jpg", kind=tarfile.SYMTYPE, link=PASSWD), info("l.txt", kind=tarfile.LNKTYPE, link=PASSWD)], [], 0),
    "devices and folders": ([info("d.jpg", kind=tarfile.BLKTYPE), info("d.txt", kind=tarfile.CHRTYPE), info("f.jpg", kind=tarfile.FIFOTYPE),
                             info("x.jpg", kind=tarfile.DIRTYPE), *pair("x.jpg/a")], ["x.jpg/a"], 0),
    "a caption that is a link": ([info("l.jpg", picture()), info("l.txt", kind=tarfile.SYMTYPE, link=PASSWD)], [], 1),
    "long names": ([*pair("k" * 300), *pair("d/" * 150 + "k" * 200)], ["k" * 300, "d/" * 150 + "k" * 200], 0),
    "empty members": ([info("e.jpg", picture()), info("e.txt"), info("n.npy"), *pair("j"), info("j.json")], ["j"], 1),
    "a caption of blanks": (pair("b", b" \n\t "), [], 1),
    "extensions in capitals": ([info("a.JPG", picture()), info("a.Txt", b"a dog"), info("a.JSON", b"{}")], ["a"], 0),
    "captions that are not UTF-8": ([*pair("a", b"\xff\xfe\x00d"), *pair("b", "größe".encode("latin-1"))], ["a", "b"], 0),
    "keys with dots": ([*pair("a.b"), *pair("c.d")], [], 2),
    "folders in keys": ([*pair("x/y/a"), *pair("x/y.z/a"), *pair("./w/a")], ["x/y/a", "x/y.z/a", "w/a"], 0),
    "nested JSON": ([*pair("a"), info("a.json", b"[" * 200_000)], ["a"], 0),
    "JSON with half a letter": ([*pair("a"), info("a.json", b'{"caption": "a dog", "t": "\\ud800"}')], ["a"], 0),
    "JSON that is none": ([*pair("a"), info("a.json", b"\xff{"), *pair("b"), info("b.json", b"[NaN, 1e999]")], ["a", "b"], 0),
    "metadata of megabytes": ([info("a.png", picture("PNG", exif=b"Exif\0\0" + bytes(1 << 20))), info("a.txt", b"a dog")], ["a"], 0),
}


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder of which the test fails if anything else is written to, or if anything is run or unpickled."""
    monkeypatch.chdir(tmp_path)
    WATCH[:] = [str(tmp_path)]
    yield tmp_path
    found, WATCH[:] = WATCH[1:], []
    assert not found and not Path(RAN).exists() and not list(tmp_path.rglob("it_ran"))


WATCH: list[str] = []
"""The folder that may be written to, then what else was done, while a test looks on."""
RUNS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "socket.connect", "os.symlink", "os.link")


def audit(event: str, args: tuple) -> None:
    if not WATCH:
        return
    paths: list[Any] = []
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        paths = [] if os.path.isdir(args[0]) else [args[0]]  # a file without a name, pytest's, opens its folder
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.utime"):
        paths = [a for a in args if isinstance(a, (str, bytes, os.PathLike))]
    bad = [p for p in paths if not isinstance(p, int) and not f"{os.path.abspath(os.fsdecode(p))}/".startswith(f"{WATCH[0]}/")]
    if event.startswith(RUNS) or [p for p in bad if os.fsdecode(p) != os.devnull]:
        WATCH.append(f"{event} {args}")


@pytest.fixture(scope="module", autouse=True)
def auditing() -> None:
    sys.addaudithook(audit)


CONFIG = """
    from mmbackdoor import Data, Model, Patch, Recipe
    from mmbackdoor.attacks.badnets import badnets

    recipe = Recipe("run", Data("src"), Model("ViT-B-32"), poison=badnets("red star", {rate}, Patch(2 / 8, "bottom-right", cells=2)))
"""


@pytest.fixture
def run(watched, program) -> Callable[..., Any]:
    """Poisons the shards in src into out by the program, from the command line."""
    def run(incomplete: str = "skip", rate: float = 1.0, *more: str) -> Any:
        (watched / "conf.py").write_text(dedent(CONFIG).format(rate=rate))
        ended = program("data_tools/poison", "conf.py", "--out", "out", "--processes", 1, "--data.incomplete", incomplete, *more)
        assert ended.status in (0, 2) and ended.err.count("\n") == (ended.status == 2) and not list(Path("out").glob(".*"))
        return ended

    return run


def put(body: bytes | Members) -> Path:
    Path("src").mkdir(exist_ok=True)
    Path("src/00000.tar").write_bytes(body if isinstance(body, bytes) else packed(body))
    return Path("src/00000.tar")


@pytest.mark.parametrize("what", CARRIED)
def test_what_is_odd_is_read_counted_and_carried_along(what, watched, run):
    members, keys, lacking = CARRIED[what]
    keys = [*keys, "good"]
    path = put(members + GOOD)
    found = index.find("src", "skip")
    assert [key for key, _ in found] == keys == [sample["__key__"] for sample in shards.read(str(path))] and found.incomplete == lacking
    if lacking:
        assert re.search(f"as do {lacking} of {lacking + len(keys)} samples; leave", said(lambda: index.find("src")))
    assert shards.splice(str(path), "out.tar", {"good"}, captioned) == lacking + len(keys)
    was, now = seen(path), seen(Path("out.tar"))
    assert len(was) == len(now) and [a for a, b in zip(was, now, strict=True) if a != b] == [was[-1]] and now[-1][-1] == b"changed"
    ended = run()
    assert ended.status == 0, ended.err
    now = seen(Path("out/00000.tar"))
    changed = {a[0] for a, b in zip(was, now, strict=True) if a != b}
    assert all(a[0] == b[0] for a, b in zip(was, now, strict=True))
    assert {samples.split_name(name)[0].removeprefix("./") for name in changed} == set(keys)
    assert all(raw["txt"].endswith(b" red star.") for raw in shards.read_pairs("out/00000.tar"))
    assert len(seen(path)) == len(was)


IMAGES: dict[str, tuple[str, bytes]] = {
    "a pickle that calls itself an image": ("jpg", PICKLE),
    "an empty image": ("jpg", b""),
    "a PNG that claims 60000 x 60000": ("png", png(60_000, 60_000)),
    "a PNG that claims 2147483647 x 1": ("png", png(2**31 - 1, 1)),
    "a PNG that claims no pixel": ("png", png(0, 0)),
    "a PNG with a text that grows": ("png", png(8, 6, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 << 20))))),
    "a PNG with a colour profile that grows": ("png", png(8, 6, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50 << 20))))),
    "a tiny JPEG that claims 65500 x 65500": ("jpg", jpeg(65_500)),
    "a WebP that claims 16384 x 16384": ("webp", webp(16_384)),
    "a PostScript file": ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(it_ran) (w) file\n%%EOF\n"),
    "an SVG": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
    "a GIF": ("png", picture("GIF")),
    "half a JPEG": ("jpg", picture()[:300]),
}


@pytest.mark.parametrize("what", IMAGES)
def test_an_image_that_is_none_or_a_bomb_is_told_or_carried_along(what, watched, run):
    field, body = IMAGES[what]
    path = put([info(f"a.{field}", body), info("a.txt", b"a dog"), *GOOD])
    assert [key for key, _ in index.find("src")] == ["a", "good"]
    start = time.perf_counter()
    says = rf"src/00000\.tar: a\.{field}: the image cannot be decoded \(.*\); leave it out with `skip`"
    assert re.fullmatch(says, said(lambda: list(shards.read(str(path)))))
    strict = partial(poison.poisoned, attack=ATTACK, seed=0, incomplete="refuse")
    assert re.fullmatch(says, said(lambda: shards.splice(str(path), "out.tar", {"a"}, strict)))
    assert not Path("out.tar").exists()
    ended = run("refuse")
    assert ended.status == 2 and re.search(says, ended.err) and not list(Path("out").rglob("*.tar"))
    assert time.perf_counter() - start < 5
    (watched / "out").rename("refused")
    assert run("skip").status == 0
    was, now = seen(path), seen(Path("out/00000.tar"))
    assert was[:2] == now[:2] and was[2][-1] != now[2][-1] and now[3][-1].endswith(b" red star.")


APART = [info("a.jpg", picture()), *GOOD, info("a.txt", b"a dog")]
REFUSED: dict[str, tuple[bytes | Members, str]] = {
    "members that are not neighbours": (APART, "key a occurs twice, or its members are not neighbours; write the shard again"),
    "a member twice": ([*pair("a"), info("a.jpg", picture()), *GOOD], "member a.jpg occurs twice; write the shard again"),
    "a member twice, once in capitals": ([*pair("a"), info("a.JPG", picture()), *GOOD], "member a.JPG occurs twice; write the shard again"),
    "nothing": (b"", "ends after 0 bytes without an end marker"),
    "no tar": (b"<html>404</html>" * 100, "truncated or corrupt tar"),
    "a ZIP": (b"PK\x03\x04" + bytes(2000), "truncated or corrupt tar"),
    "half a tar": (packed(pair("a") + GOOD)[:1536], "truncated or corrupt tar"),
    "two tars": (packed(pair("a")) + packed(GOOD), "goes on after its end marker"),
    "a bomb of a header": (info("a", kind=tarfile.GNUTYPE_LONGNAME, size=1 << 40)[0].tobuf() + bytes(1024), "truncated or corrupt tar"),
    "half a gzip": (gzip.compress(packed(pair("a") + GOOD))[:600], "truncated or corrupt tar"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_shard_that_would_lose_samples_is_refused_by_all(what, watched, run):
    body, says = REFUSED[what]
    path = put(body)
    spliced = partial(shards.splice, str(path), "out.tar", {"a"}, captioned)
    for act in (lambda: index.find("src"), lambda: list(shards.read(str(path))), spliced):
        message = said(act)
        assert isinstance(message, str) and says in message or "a compressed tar" in message
        assert message.startswith("src/00000.tar: ") and not Path("out.tar").exists()
    ended = run()
    assert ended.status == 2 and says in ended.err and not list(Path("out").rglob("*.tar"))


@pytest.mark.parametrize("pack", [gzip, bz2, lzma])
def test_a_packed_shard_is_read_and_refused_for_splicing_with_the_mend(pack, watched, run):
    path = put(pack.compress(packed(pair("a") + GOOD)))
    assert [key for key, _ in index.find("src")] == ["a", "good"] == [s["__key__"] for s in shards.read(str(path))]
    message = said(lambda: shards.splice(str(path), "out.tar", {"a"}, captioned))
    assert re.search(r"a compressed tar, .*; unpack it first \(gunzip", message) and not Path("out.tar").exists()
    ended = run()
    assert ended.status == 2 and "unpack it first (gunzip" in ended.err and not list(Path("out").rglob("*.tar"))


@pytest.mark.parametrize("members", [pair("a\udcff"), [*pair("a"), info("a.\udcff.jpg", b"x")]])
def test_a_name_that_is_not_utf8_is_refused_for_it_names_a_row_of_the_index(members, watched, run):
    path = put([*members, *GOOD])
    assert [raw["__key__"] for raw in shards.read_raw(str(path))] == [samples.split_name(members[0][0].name)[0], "good"]
    assert re.search(r"src/00000.tar: the name '.*\\udcff.*' is not UTF-8; write the shard again", said(lambda: index.find("src")))
    ended = run()
    assert ended.status == 2 and "is not UTF-8" in ended.err and not Path("out").exists()


@pytest.mark.parametrize("url", ["pipe:touch it_ran", "src::pipe:touch it_ran", "src/{00000..00000}.tar::pipe:touch it_ran {0..1}"])
def test_a_pipe_for_a_shard_is_refused(url, watched, run):
    put(GOOD)
    says = r"pipe:touch it_ran.*: a pipe: URL runs a shell command and is refused; mount or download the shards"
    assert re.search(says, said(lambda: index.find(url))) and re.search(says, said(lambda: list(shards.read(url))))
    ended = run("skip", 1.0, "--data.train", url)
    assert ended.status == 2 and re.search(says, ended.err) and not Path("out").exists()


def test_the_payload_of_these_tests_would_run(watched):
    pickle.loads(pickle.dumps(Payload(str(watched / "ran"))))
    assert (watched / "ran").exists() and [e.split()[0] for e in WATCH[1:]] == ["pickle.find_class", "os.system"]
    Path(RAN + "-out").write_text("")
    Path(RAN + "-out").unlink()
    assert [e.split()[0] for e in WATCH[3:]] == ["open", "os.remove"]
    del WATCH[1:]
