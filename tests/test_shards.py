"""Shards: what is read, what is refused, and what is written back."""
from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, tar
from PIL import Image, JpegImagePlugin, PngImagePlugin
from stores import http_server, s3_bucket

from mmbackdoor import shards, stores
from mmbackdoor.index import find
from mmbackdoor.types import BadInput


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pairs(*keys: str, body: bytes = b"") -> dict[str, bytes]:
    """Members of complete samples."""
    return {f"{key}.{field}": value for key in keys for field, value in (("jpg", body or picture()), ("txt", f"a {key}".encode()))}


def keys(urls: str | Path) -> list[str]:
    return [key for key, _ in find(str(urls))]


def new_caption(raw: shards.Raw) -> shards.Raw:
    return raw | {"txt": b"new"}


def both(url: Path) -> list[str]:
    """The keys of a shard, after a look at whether the index and the reader agree on them."""
    found = keys(url)
    assert found == [raw["__key__"] for raw in shards.read_pairs(str(url))]
    return found


# ---- what is never run


@pytest.mark.parametrize("field", ["pickle", "pkl", "pyd", "pth", "pt", "jpg.pickle"])
def test_a_pickle_in_a_shard_never_runs(field, tmp_path):
    mark = tmp_path / "it_ran"
    body = pickle.dumps(Payload(mark))
    url = tar(tmp_path / "a.tar", pairs("a") | {f"a.{field}": body} | pairs("b"))
    samples = list(shards.read(str(url)))
    shards.splice(str(url), tmp_path / "b.tar", {"a"}, new_caption)
    assert both(url) == ["a", "b"] and [sorted(s) for s in samples] == [["__key__", "image", "text"]] * 2
    assert not mark.exists()
    pickle.loads(body)
    assert mark.exists()


def test_a_pickle_that_calls_itself_an_image_is_refused(tmp_path):
    mark = tmp_path / "it_ran"
    url = tar(tmp_path / "a.tar", pairs("a", body=pickle.dumps(Payload(mark))))
    with pytest.raises(BadInput, match="a.tar: a.jpg: the image cannot be decoded"):
        list(shards.read(str(url)))
    assert not mark.exists()


@pytest.mark.parametrize("urls", ["pipe:touch it_ran", "a.tar::pipe:touch it_ran", "{pipe:touch it_ran,a}.tar"])
def test_a_pipe_is_refused(urls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "a.tar", pairs("a"))
    with pytest.raises(BadInput):
        find(urls)
    assert not Path("it_ran").exists()


def test_a_pipe_is_told_what_it_would_do():
    with pytest.raises(BadInput, match="runs a shell command and is refused; mount or download"):
        shards.expand("pipe:cat a.tar")


# ---- names of shards


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for i in range(3):
        tar(tmp_path / "set" / f"{i:05d}.tar", pairs(f"{i}a", f"{i}b"))
    return tmp_path / "set"


@pytest.mark.parametrize("pattern, found", [
    ("{root}/{{00000..00002}}.tar", "012"),
    ("{root}/{{00000,00002}}.tar", "02"),
    ("{root}/0000*.tar", "012"),
    ("{root}", "012"),
    ("{root}/", "012"),
    ("{root}/00001.tar", "1"),
    ("{root}/00002.tar::{root}/00000.tar", "20"),
    ("{root}/{{00001..00002}}.tar::{root}/*0.tar", "120"),
])
def test_shards_are_named_by_braces_globs_folders_and_lists(pattern, found, three):
    assert [Path(p).name for p in shards.expand(pattern.format(root=three))] == [f"0000{i}.tar" for i in found]


@pytest.mark.parametrize("pattern, says", [
    ("{root}/{{00000..00004}}.tar", r"00003\.tar: no such shard \(2 of 5"),
    ("{root}/9*.tar", "no file matches"),
    ("{root}/nowhere", "no such shard"),
    ("", "no shards named"),
    ("::", "no shards named"),
    ("{root}/{{00000..", "00000"),
    ("nosuch://bucket/a.tar", "nosuch"),
])
def test_a_pattern_that_names_nothing_is_refused(pattern, says, three):
    with pytest.raises(BadInput, match=says):
        find(pattern.format(root=three))


def test_a_folder_without_shards_and_one_of_an_odd_name(three, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(BadInput, match="bare: the folder holds no .tar"):
        shards.expand(str(tmp_path / "bare"))
    odd = three.rename(tmp_path / "a [1] folder*")
    assert len(shards.expand(str(odd))) == 3


# ---- grouping of members


def test_keys_with_dots_are_told(tmp_path):
    url = tar(tmp_path / "a.tar", {"a.b.jpg": picture(), "a.b.txt": b"x", "c.jpg": picture(), "c.txt": b"y"})
    with pytest.raises(BadInput, match=r"sample a lacks .*1 of 2 samples.*in `a\.b\.jpg` the key is a and the field b\.jpg"):
        find(str(url))
    found = find(str(url), "skip")
    assert [k for k, _ in found] == ["c"] and found.incomplete == 1


def test_extensions_may_be_upper_case(tmp_path):
    url = tar(tmp_path / "a.tar", {"a.JPG": picture(), "a.TXT": b"x", "b.Jpeg": picture(), "b.txt": b"y"})
    assert both(url) == ["a", "b"]
    assert [s["text"] for s in shards.read(str(url))] == [text for _, text in find(str(url))] == ["x", "y"]


@pytest.mark.parametrize("name, key", [
    ("./a", "a"), ("./x/a", "x/a"), ("x/y/a", "x/y/a"), ("x.v2/a", "x.v2/a"), ("a b-c_d", "a b-c_d"), ("x" * 150, "x" * 150),
    ("größe-星", "größe-星"), ("__a", "__a"),
])
def test_keys_of_many_shapes(name, key, tmp_path):
    url = tar(tmp_path / "a.tar", pairs(name, "other"))
    assert both(url) == [key, "other"]


@pytest.mark.parametrize("name", ["__a__/b", "__meta__", "__MACOSX/x", "._a"])
def test_the_index_counts_just_the_pairs_that_are_read(name, tmp_path):
    url = tar(tmp_path / "a.tar", pairs(name, "other"))
    found = [key for key, _ in find(str(url), "skip")]
    assert found == [raw["__key__"] for raw in shards.read_pairs(str(url))] and "other" in found


def test_a_key_that_is_not_utf8_is_told_or_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        for name, body in pairs("caf\xe9").items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
    try:
        assert len(keys(tmp_path / "a.tar")) == 1
    except BadInput as error:
        assert "a.tar" in str(error)


def test_members_that_are_not_neighbours_are_refused(tmp_path):
    p = picture()
    url = tar(tmp_path / "a.tar", {"a.jpg": p, "b.jpg": p, "a.txt": b"x", "b.txt": b"y"})
    for read in (lambda u: find(u, "skip"), lambda u: list(shards.read_raw(u))):
        with pytest.raises(BadInput, match="a.tar: key a occurs twice, or its members are not neighbours"):
            read(str(url))


def test_a_member_that_is_not_read_may_stand_between(tmp_path):
    url = tar(tmp_path / "a.tar", {"a.jpg": picture(), "b.npy": b"..", "a.txt": b"x", "readme": b"hello"})
    assert both(url) == ["a"]


def test_a_key_that_occurs_twice_in_a_shard_is_refused(tmp_path):
    again = [*pairs("a").items(), *pairs("b").items(), *pairs("a").items()]
    with pytest.raises(BadInput, match="a.tar: key a occurs twice"):
        find(str(tar(tmp_path / "a.tar", again)))
    with pytest.raises(BadInput, match="a.tar: member a.jpg occurs twice"):
        find(str(tar(tmp_path / "b" / "a.tar", [*pairs("a").items(), *pairs("a").items()])))


# ---- broken files


CUTS = {"empty": (0, 0), "in the first header": (0, 100), "in the first image": (0, 600), "in a header": (2, 100),
        "at a header": (2, 0), "in a later image": (2, 600), "in the last caption": (3, 513), "before the end marker": (4, 0)}


@pytest.mark.parametrize("member, offset", CUTS.values(), ids=list(CUTS))
def test_a_truncated_tar_is_refused(member, offset, tmp_path):
    whole = tar(tmp_path / "whole.tar", pairs("a", "b"))
    with tarfile.open(whole) as file:
        starts = [m.offset for m in file] + [file.offset]
    url = tmp_path / "cut.tar"
    url.write_bytes(whole.read_bytes()[: starts[member] + offset])
    for read in (find, lambda u: list(shards.read_raw(u))):
        with pytest.raises(BadInput, match="cut.tar: a truncated or corrupt tar .*fetch or write it again") as told:
            read(str(url))
        assert "\n" not in str(told.value)


def test_a_tar_with_a_garbled_header_is_refused(tmp_path):
    url = tar(tmp_path / "a.tar", pairs("a", "b", "c"))
    with tarfile.open(url) as file:
        start = file.getmembers()[2].offset
    body = url.read_bytes()
    url.write_bytes(body[:start] + b"x" * 512 + body[start + 512 :])
    for read in (find, lambda u: list(shards.read_raw(u)), lambda u: shards.splice(u, tmp_path / "b.tar", {"a"}, new_caption)):
        with pytest.raises(BadInput, match="a.tar: a truncated or corrupt tar"):
            read(str(url))


@pytest.mark.parametrize("body", [b"<html>not found</html>", random.Random(0).randbytes(4000)])
def test_what_is_no_tar_is_refused(body, tmp_path):
    (tmp_path / "a.tar").write_bytes(body)
    for read in (find, lambda u: list(shards.read_raw(u))):
        with pytest.raises(BadInput, match="a.tar: a truncated or corrupt tar .*fetch or write it again") as told:
            read(str(tmp_path / "a.tar"))
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz"])
@pytest.mark.parametrize("pack", [gzip, bz2, lzma], ids=lambda module: module.__name__)
def test_a_compressed_tar_is_read_but_not_spliced(pack, name, tmp_path):
    plain, url = tar(tmp_path / "a.tar", pairs("a", "b")), tmp_path / name
    url.write_bytes(pack.compress(plain.read_bytes()))
    assert both(url) == ["a", "b"] and [r | {"__url__": ""} for r in shards.read_raw(str(url))] == [
        r | {"__url__": ""} for r in shards.read_raw(str(plain))]
    with pytest.raises(BadInput, match=rf"{name}: a compressed tar, .*; unpack it first"):
        shards.splice(str(url), tmp_path / "new.tar", {"a"}, new_caption)
    assert not (tmp_path / "new.tar").exists()


@pytest.mark.parametrize("broken", ["cut", "flipped"])
def test_a_broken_compressed_tar_is_refused(broken, tmp_path):
    rng = np.random.default_rng(0)
    body = {f"{k}.jpg": bytes(rng.integers(5, size=20_000, dtype=np.uint8)) for k in "abc"}
    packed = bytearray(gzip.compress(tar(tmp_path / "a.tar", body).read_bytes()))
    if broken == "cut":
        del packed[10_000:]
    else:
        for i in range(10_000, 10_500):
            packed[i] ^= 0xFF
    (tmp_path / "b.tar").write_bytes(bytes(packed))
    for read in (lambda u: find(u, "skip"), lambda u: list(shards.read_raw(u))):
        with pytest.raises(BadInput, match="b.tar: a truncated or corrupt tar"):
            read(str(tmp_path / "b.tar"))


def test_an_incomplete_sample_is_counted_and_left_out(tmp_path):
    members = pairs("a", "b") | {"c.jpg": picture(), "d.txt": b"alone", "e.jpg": picture(), "e.txt": b" \n"}
    url = tar(tmp_path / "a.tar", members)
    with pytest.raises(BadInput, match=r"a\.tar: sample c lacks .* 3 of 5 samples; leave them out with --data.incomplete skip"):
        find(str(url))
    found = find(str(url), "skip")
    assert [k for k, _ in found] == ["a", "b"] and found.incomplete == 3
    assert [raw["__key__"] for raw in shards.read_pairs(str(url))] == ["a", "b"]


def test_shards_without_a_pair_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no image-text pair in 1 shards; each needs KEY.jpg"):
        find(str(tar(tmp_path / "a.tar", {"a.cls": b"1", "a.jpg": picture()})), "skip")


def test_a_caption_that_is_not_utf8_does_not_crash(tmp_path):
    url = tar(tmp_path / "a.tar", {"a.jpg": picture(), "a.txt": b"caf\xe9 au lait\n"})
    (_, text), = find(str(url))
    sample, = shards.read(str(url))
    assert sample["text"] == text == "caf\ufffd au lait"


@pytest.mark.parametrize("body", [b"seven", b"", b"1.5"])
def test_a_label_that_is_no_number_is_refused(body, tmp_path):
    url = tar(tmp_path / "a.tar", pairs("a") | {"a.cls": body})
    with pytest.raises(BadInput, match=r"a\.tar: a\.cls: .* is no class number"):
        list(shards.read(str(url)))


# ---- images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_image_is_one_clear_error(kind):
    rng = random.Random(kind)
    whole = picture(kind, size=(24, 24), noise=True)
    field, failed = next(f for f, k in shards.FORMATS.items() if k == kind), 0
    for _ in range(200):
        body = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        if rng.random() < 0.3:
            del body[rng.randrange(len(body)):]
        try:
            shards.decode({"__key__": "a", "__url__": "x.tar", field: bytes(body), "txt": b"x"})
        except BadInput as error:
            failed += 1
            assert str(error).startswith(f"x.tar: a.{field}: the image cannot be decoded") and "\n" not in str(error)
    assert failed > 20


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "EPS"])
def test_other_formats_are_not_read_whatever_their_name(kind):
    with pytest.raises(BadInput, match="cannot be decoded"):
        shards.decode_image({"__key__": "a", "jpg": picture(kind)})


def test_a_decompression_bomb_is_refused():
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(BadInput, match=r"a\.png: the image cannot be decoded .*leave it out"):
        shards.decode({"__key__": "a", "png": bomb, "txt": b"x"})


def again(body: bytes, field: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The original, what is encoded (its negative), and the outcome read back."""
    raw = {"__key__": "a", field: body, "txt": b"x"}
    sample = shards.decode(raw)
    changed = Image.fromarray(255 - np.asarray(sample["image"]))
    new = shards.encode(sample | {"image": changed}, raw)
    assert list(new) == list(raw)
    return shards.decode_image(raw), changed, shards.decode_image(new)


@pytest.mark.parametrize("quality", [10, 30, 75, 95, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_keeps_its_quantisation_tables_and_subsampling(quality, subsampling):
    old, changed, new = again(picture(size=(40, 24), noise=True, quality=quality, subsampling=subsampling), "jpg")
    assert new.format == "JPEG" and new.quantization == old.quantization and new.size == old.size == (40, 24)
    assert JpegImagePlugin.get_sampling(new) == JpegImagePlugin.get_sampling(old) == subsampling
    if quality == 100 and subsampling == 0:
        assert np.abs(np.asarray(new.convert("RGB"), int) - np.asarray(changed, int)).max() <= 4


@pytest.mark.parametrize("progressive", [True, False])
def test_jpeg_keeps_what_its_header_says(progressive):
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    old, _, new = again(picture(progressive=progressive, icc_profile=b"a profile", exif=exif, dpi=(72, 72), comment=b"by hand"), "jpg")
    for name in ("progressive", "icc_profile", "exif", "dpi", "jfif_density", "jfif_unit", "comment"):
        assert new.info.get(name) == old.info.get(name), name


@pytest.mark.parametrize("kind, mode", [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "L"), ("PNG", "RGBA"), ("WEBP", "RGBA")])
def test_size_and_mode_are_kept(kind, mode):
    field = {v: k for k, v in shards.FORMATS.items()}[kind]
    old, _, new = again(picture(kind, mode=mode, size=(20, 14), noise=True), field)
    assert (new.format, new.mode, new.size) == (old.format, old.mode, old.size) == (kind, mode, (20, 14))
    if mode == "RGBA":
        assert np.array_equal(new.getchannel("A"), old.getchannel("A"))


@pytest.mark.parametrize("mode", ["P", "LA", "1", "I;16"])
def test_png_of_another_mode_is_read_and_written(mode):
    old, changed, new = again(picture("PNG", mode=mode, size=(20, 14)), "png")
    assert old.mode == mode and new.format == "PNG" and new.size == old.size
    assert np.array_equal(new.convert("RGB"), changed)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_was_written_without_loss_is_again(kind):
    field = {v: k for k, v in shards.FORMATS.items()}[kind]
    _, changed, new = again(picture(kind, size=(20, 14), noise=True, lossless=True), field)
    assert new.format == kind and np.array_equal(new, changed)


def photograph() -> Image.Image:
    """Smooth, with some noise: what lossy codecs are made for."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8)).resize((160, 120), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(smooth, int) + rng.integers(-9, 10, (120, 160, 1))).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("exif", [False, True], ids=["plain", "with exif"])
@pytest.mark.parametrize("quality", [10, 50, 80, 95])
def test_lossy_webp_stays_lossy_and_keeps_about_its_size(quality, exif):
    about = Image.Exif()
    about[0x0110] = "a camera"
    photograph().save(file := io.BytesIO(), "WEBP", quality=quality, **({"exif": about} if exif else {}))
    raw = {"__key__": "a", "webp": file.getvalue(), "txt": b"x"}
    sample = shards.decode(raw)
    sample["image"].paste((255, 0, 0), (0, 0, 16, 16))
    new = shards.encode(sample, raw)
    assert 0.8 < len(new["webp"]) / len(raw["webp"]) < 1.25
    error = np.abs(np.asarray(shards.decode(new)["image"], int) - np.asarray(sample["image"], int))
    assert 0 < error.mean() < 10 and bool(shards.decode_image(new).getexif()) is exif


MODES = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "L"),
         ("PNG", "1"), ("PNG", "I;16"), ("WEBP", "RGB"), ("WEBP", "RGBA")]


@pytest.mark.parametrize("codec", ["png", "jpeg"])
@pytest.mark.parametrize("kind, mode", MODES)
def test_a_codec_of_ones_choice_is_what_the_file_becomes_and_is_called(kind, mode, codec):
    field = {v: k for k, v in shards.FORMATS.items()}[kind]
    raw = {"__key__": "a", "json": b"{}", field: picture(kind, mode=mode, size=(20, 14)), "txt": b"x"}
    changed = Image.new("RGB", (20, 14), (200, 30, 60))
    new = shards.encode(shards.decode(raw) | {"image": changed}, raw, codec)
    kept = shards.FORMATS[field] == codec.upper()
    assert list(new) == ["__key__", "json", field if kept else {"png": "png", "jpeg": "jpg"}[codec], "txt"]
    image = shards.decode_image(new)
    assert image.format == codec.upper() and image.size == (20, 14)
    expected = changed if image.mode != "L" else changed.convert("L").convert("RGB")
    difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(expected, int)).max()
    assert difference == 0 if codec == "png" and mode != "CMYK" else difference <= 4


def test_a_codec_of_ones_choice_leaves_the_extension_of_a_file_that_has_it():
    raw = {"__key__": "a", "jpeg": picture(quality=30), "txt": b"x"}
    new = shards.encode(shards.decode(raw), raw, "jpeg")
    assert list(new) == list(raw) and shards.decode_image(new).quantization != shards.decode_image(raw).quantization


def test_the_caption_in_the_json_follows_the_text():
    raw = {"__key__": "a", "jpg": picture(), "txt": b"old", "json": json.dumps({"caption": "old", "url": "x", "n": 1}).encode()}
    new = shards.encode(shards.decode(raw) | {"text": "größer"}, raw)
    assert new["txt"].decode() == "größer" and json.loads(new["json"]) == {"caption": "größer", "url": "x", "n": 1}
    plain = raw | {"json": b'{"url":  "x"}'}
    assert shards.encode(shards.decode(plain) | {"text": "new"}, plain)["json"] == plain["json"]


@pytest.mark.parametrize("body", [b"{broken", b"\xff\xfe", b""])
def test_a_broken_json_is_told_or_left_alone(body):
    raw = {"__key__": "a", "jpg": picture(), "txt": b"old", "json": body}
    try:
        assert shards.encode(shards.decode(raw), raw)["json"] == body
    except BadInput as error:
        assert "json" in str(error)


# ---- behind a URL


@pytest.fixture
def server(three):
    with http_server(three) as url:
        yield url


@pytest.fixture(scope="module")
def store():
    with s3_bucket() as url:
        yield url


@pytest.fixture
def bucket(store, three, tmp_path):
    """The URL of a place in a store that holds set/00000.tar … and other/00003.tar."""
    root = f"{store}/{tmp_path.name}"
    for name, path in [*((f"set/{p.name}", p) for p in three.glob("*.tar")), ("other/00003.tar", three / "00000.tar")]:
        with stores.replacing(f"{root}/{name}") as temporary:
            temporary.write_bytes(path.read_bytes())
    return root


def test_shards_behind_http_are_read(server, three):
    urls = server + "/{00000..00002}.tar"
    there, here = find(urls), find(str(three))
    assert list(there) == list(here) and there.fingerprint == here.fingerprint and len(there.parts) == 3
    assert [(s["__key__"], s["image"].tobytes()) for s in shards.read(urls)] == [
        (s["__key__"], s["image"].tobytes()) for s in shards.read(str(three))]


def test_a_shard_that_the_server_lacks_is_told(server):
    with pytest.raises(BadInput, match=r"00003\.tar: cannot be opened"):
        find(server + "/{00000..00007}.tar")


def test_a_server_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setattr(stores, "PAUSE", 0)
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:9/a\.tar"):
        find("http://127.0.0.1:9/a.tar")


@pytest.mark.parametrize("pattern, found", [
    ("{root}/set", "012"), ("{root}/set/", "012"), ("{root}/set/0000*.tar", "012"), ("{root}/set/{{00000,00002}}.tar", "02"),
    ("{root}/set/00001.tar", "1"), ("{root}/set/00002.tar::{root}/set/*0.tar", "20"), ("{root}/{{set,other}}/*.tar", "3012"),
])
def test_shards_of_a_store_are_named_as_on_disk(pattern, found, bucket):
    assert [url.rpartition("/")[2] for url in shards.expand(pattern.format(root=bucket))] == [f"0000{i}.tar" for i in found]
    assert all(url.startswith(f"{bucket}/") for url in shards.expand(pattern.format(root=bucket)))


@pytest.mark.parametrize("pattern", ["{root}/nowhere", "{root}/set/9*.tar", "{root}/set/index"])
def test_a_store_that_holds_no_such_shard_is_told(pattern, bucket):
    with pytest.raises(BadInput, match="the folder holds no .tar|no file matches"):
        shards.expand(pattern.format(root=bucket))


def test_shards_of_a_store_are_read_and_spliced_there(bucket, three):
    there, here = find(f"{bucket}/set"), find(str(three))
    assert list(there) == list(here)
    shards.splice(f"{bucket}/set/00001.tar", f"{bucket}/new/00001.tar", {"1a"}, new_caption)
    shards.splice(str(three / "00001.tar"), three / "new.tar", {"1a"}, new_caption)
    assert stores.read_bytes(f"{bucket}/new/00001.tar") == (three / "new.tar").read_bytes()


# ---- writing


def test_written_shards_are_small_and_the_same_bytes_each_time(tmp_path):
    samples = [{"__key__": f"{i:05d}", "jpg": b"x" * 700, "txt": "größe", "json": {"n": i}} for i in range(100)]
    for name in ("a.tar", "b.tar"):
        assert shards.write_shard(tmp_path / name, samples) == 100
        os.utime(tmp_path / "a.tar", (1, 1))
    body = (tmp_path / "a.tar").read_bytes()
    assert body == (tmp_path / "b.tar").read_bytes()
    assert len(body) <= 100 * (512 + 1024 + 512 + 512 + 512 + 512) + 10240  # a header and whole blocks for each member, no more
    with tarfile.open(tmp_path / "a.tar") as file:
        members = file.getmembers()
    assert all(m.mtime == 0 and isinstance(m.mtime, int) and not m.pax_headers and m.mode == 0o644 and m.uname == "" for m in members)


def test_what_is_written_is_read_back(tmp_path):
    samples = [{"__key__": k, "png": picture("PNG"), "txt": f"größe {k}", "json": {"a": [k]}, "__url__": "not written"}
               for k in ("a", "deep/b", "x" * 150, "größe")]
    assert shards.write_shards(tmp_path / "out", samples, per_shard=3) == {"00000.tar": 3, "00001.tar": 1}
    got = [raw for url in shards.expand(str(tmp_path / "out")) for raw in shards.read_raw(url)]
    assert [(g["__key__"], g["txt"].decode(), json.loads(g["json"]), g["png"]) for g in got] == [
        (s["__key__"], s["txt"], s["json"], s["png"]) for s in samples]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 1}


def foreign(path: Path) -> Path:
    """A shard as somebody else's writer makes it: PAX with float times, a folder, a link, fields that are not read."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        def add(name: str, body: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname, info.type = len(body), 1700000000.25, "ann", kind
            info.linkname = "x" if kind == tarfile.SYMTYPE else ""
            file.addfile(info, io.BytesIO(body))

        add("./x", kind=tarfile.DIRTYPE)
        for key in ("a", "b", "c"):
            add(f"./x/{key}.JPG", picture())
            add(f"./x/{key}.npy", key.encode() * 600)
            add(f"./x/{key}.txt", f"a {key}".encode())
        add("./x/link", kind=tarfile.SYMTYPE)
        add("README", b"hello")
    return path


def members(path: Path) -> list[tuple]:
    with tarfile.open(path) as file:
        return [(m.name, m.type, m.uname, m.mode, int(m.mtime), m.linkname, file.extractfile(m).read() if m.isreg() else b"") for m in file]


def test_splice_changes_only_what_it_is_given(tmp_path):
    url, seen = foreign(tmp_path / "a.tar"), []

    def change(raw: shards.Raw) -> shards.Raw:
        seen.append(raw["__key__"])
        return raw | {"jpg": b"new image", "txt": "größer"}

    n = shards.splice(str(url), tmp_path / "b.tar", ("x/b",), change)
    old, new = members(url), members(tmp_path / "b.tar")
    assert n == 3 and seen == ["x/b"] and [m[:-1] for m in new] == [m[:-1] for m in old]
    assert {m[0]: m[-1] for m in new if m not in old} == {"./x/b.JPG": b"new image", "./x/b.txt": "größer".encode()}
    assert both(tmp_path / "b.tar") == ["x/a", "x/b", "x/c"]


def test_splice_leaves_a_sample_out_and_the_members_that_are_not_read_in(tmp_path):
    url = foreign(tmp_path / "a.tar")
    assert shards.splice(str(url), tmp_path / "b.tar", {"x/b"}, lambda raw: None) == 3
    assert members(tmp_path / "b.tar") == [m for m in members(url) if m[0] not in ("./x/b.JPG", "./x/b.txt")]
    assert both(tmp_path / "b.tar") == ["x/a", "x/c"]


def test_splice_renames_an_image_of_another_format_in_its_place(tmp_path):
    url = foreign(tmp_path / "a.tar")
    shards.splice(str(url), tmp_path / "b.tar", {"x/b"}, lambda raw: shards.encode(shards.decode(raw), raw, "png"))
    old, new = members(url), members(tmp_path / "b.tar")
    assert [m[0] for m in new] == [m[0].replace("x/b.JPG", "x/b.png") for m in old]
    assert [m for m in new if m[0] != "./x/b.png"] == [m for m in old if m[0] != "./x/b.JPG"]
    assert Image.open(io.BytesIO({m[0]: m[-1] for m in new}["./x/b.png"])).format == "PNG"


def test_splice_copies_an_untouched_shard_byte_for_byte(tmp_path):
    url = foreign(tmp_path / "a.tar")
    assert shards.splice(str(url), tmp_path / "b.tar", (), new_caption) == 3
    assert shards.splice(str(url), tmp_path / "c.tar", ("x/a", "x/c"), lambda raw: raw) == 3
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "c.tar").read_bytes() == url.read_bytes()


def test_splice_of_a_sample_that_is_not_there_is_told_and_leaves_nothing(tmp_path):
    url = foreign(tmp_path / "a.tar")
    with pytest.raises(BadInput, match=r"a\.tar: holds no sample 'elsewhere', one of 2 .*index them and plan again"):
        shards.splice(str(url), tmp_path / "b.tar", {"x/b", "elsewhere", "nowhere"}, new_caption)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("cut", [0, 1100], ids=["between members", "in a member"])
def test_splice_of_a_broken_shard_is_told_and_leaves_nothing(cut, tmp_path):
    url = foreign(tmp_path / "a.tar")
    with tarfile.open(url) as file:
        start = file.getmembers()[5].offset
    url.write_bytes(url.read_bytes()[: start + cut])
    with pytest.raises(BadInput, match="a.tar: a truncated or corrupt tar"):
        shards.splice(str(url), tmp_path / "b.tar", {"x/b"}, new_caption)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("error", [ValueError, BadInput, KeyboardInterrupt])
@pytest.mark.parametrize("write", [
    lambda out, samples: shards.write_shard(out, samples),
    lambda out, samples: shards.write_shards(out, samples, per_shard=2),
    lambda out, samples: shards.write_eval_set(out, ({**s, "cls": 0} for s in samples), ["a"], ["{c}"], per_shard=2),
], ids=["shard", "shards", "eval set"])
def test_what_fails_half_way_leaves_nothing(write, error, tmp_path):
    def samples():
        for k in "abcde":
            yield {"__key__": k, "jpg": picture(), "txt": k}
        raise error("halfway")

    with pytest.raises(error, match="halfway"):
        write(tmp_path / "out", samples())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [
    lambda out: shards.write_shards(out, []), lambda out: shards.write_eval_set(out, [], ["a"], ["{c}"])], ids=["shards", "eval set"])
def test_nothing_to_write_is_told(write, tmp_path):
    with pytest.raises(BadInput, match="out: there is no sample to write"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_replacing_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ValueError), stores.replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_may_be_an_empty_one_and_never_a_full_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with shards.new_folder(out) as folder:
        (folder / "a").write_text("x")
        assert not list(out.iterdir())
    assert [p.name for p in out.iterdir()] == ["a"]
    with pytest.raises(BadInput, match="out: exists already"), shards.new_folder(out):
        pytest.fail("opened")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- what tells a poison from its neighbours


@pytest.mark.parametrize("meta", [dict(indent=4), dict(indent=None, ensure_ascii=True), dict(separators=(",", ":"))], ids=str)
def test_a_text_that_stays_keeps_its_bytes_and_a_new_one_the_style_of_the_old(meta):
    said = {"caption": "caf\u00e9", "width": 3}
    raw = {"__key__": "a", "jpg": picture(), "txt": "caf\u00e9 \n".encode(), "json": json.dumps(said, **meta).encode() + b"\n"}
    sample = shards.decode(raw)
    same, other = shards.encode(sample, raw), shards.encode(sample | {"text": "na\u00efve"}, raw)
    assert (same["txt"], same["json"]) == (raw["txt"], raw["json"])
    assert other["txt"] == "na\u00efve \n".encode()
    assert other["json"] == json.dumps(said | {"caption": "na\u00efve"}, **meta).encode() + b"\n"


def test_a_jpeg_keeps_its_xmp_and_has_codes_of_its_own_where_the_original_had():
    for optimize in (False, True):
        raw = {"__key__": "a", "jpg": picture(size=(64, 64), noise=True, optimize=optimize, xmp=b"<x/>"), "txt": b"a"}
        new = shards.encode_image(shards.decode(raw)["image"], raw)
        assert (shards.USUAL_TABLE in new) is (not optimize) and b"<x/>" in new


def test_a_png_keeps_its_resolution_and_its_texts():
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "somebody")
    raw = {"__key__": "a", "png": picture("PNG", dpi=(72, 72), pnginfo=info), "txt": b"a"}
    new = Image.open(io.BytesIO(shards.encode_image(shards.decode(raw)["image"], raw)))
    assert new.info["Author"] == "somebody" and round(new.info["dpi"][0]) == 72


def test_a_codec_never_gives_two_images_one_name():
    raw = {"__key__": "a", "jpg": picture(), "png": picture("PNG"), "txt": b"a"}
    with pytest.raises(BadInput, match="a has a png beside its jpg, which would take its name; use --codec original"):
        shards.encode(shards.decode(raw), raw, "png")
