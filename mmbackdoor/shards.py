"""webdataset shards on disk or behind a URL: list, read, decode, re-encode, write and splice them.

A raw sample is webdataset's: {"__key__": str, "jpg": bytes, "txt": bytes, ...}. Only the fields below are read, and
nothing in a shard is ever unpickled or executed: shards come from strangers.
"""
from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import webdataset as wds
from PIL import Image, JpegImagePlugin, PngImagePlugin

from . import stores, tars
from .samples import FORMATS, IMAGE_FIELDS, Raw, group, table
from .stores import is_remote, replacing, write_json
from .types import BadInput, Sample

Incomplete = Literal["refuse", "skip"]
Stage = Callable[[Iterable[Raw]], Iterable[Raw]]
Codec = Literal["original", "png", "jpeg"]
USUAL_TABLE = bytes.fromhex("00010501010101010100")
"""Of the Huffman codes that JPEG writers take who do not reckon their own."""
STYLES = tuple(product((None, 4, 2, 1), (False, True), (None, (",", ":"))))
"""Ways to write JSON: indentation, whether beyond ASCII is escaped, and what stands between."""


# ---- list


def expand(urls: str) -> list[str]:
    """Shard paths of a pattern: braces as in {00000..00331}, `*`, a folder of .tar files; `::` joins several. Of a store too."""
    found: list[str] = []
    for pattern in filter(None, urls.split("::")):
        if pattern.startswith("pipe:"):
            raise BadInput(f"{pattern}: a pipe: URL runs a shell command and is refused; mount or download the shards")
        remote = is_remote(pattern)
        if os.path.isdir(pattern) or (remote and not re.search(r"[{*]|\.(tar|tgz)\b", pattern)):
            paths = stores.listing(pattern)
            hint = "the folder holds no .tar file; name the folder that holds the shards"
        else:
            try:
                paths = sorted(wds.shardlists.expand_urls(pattern))
            except (ValueError, AssertionError) as error:
                raise BadInput(f"{pattern}: cannot be expanded ({error}); close its braces") from error
            hint = "no file matches; check the numbers in the braces and the folder's name"
            paths = [p for part in paths for p in (stores.glob(part) if "*" in part else [part])]
        if not paths:
            raise BadInput(f"{pattern}: {hint}")
        missing = [] if remote else [p for p in paths if not os.path.isfile(p)]
        if missing == [pattern]:
            raise BadInput(f"{pattern}: no such shard or folder of shards; check the path")
        if missing:
            raise BadInput(f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} that {pattern} names); {hint}")
        found += paths
    if not found:
        raise BadInput("no shards named; give a folder, a path, or a pattern such as data/{00000..00331}.tar")
    return found


# ---- read


def read_raw(url: str) -> Iterator[Raw]:
    """The samples of one shard, undecoded, in order, whether complete or not."""
    with tars.open_tar(url) as tar:
        yield from group(url, tar.members(), tar.body)


def image_field(raw: Mapping[str, Any]) -> str | None:
    return next((f for f in IMAGE_FIELDS if f in raw), None)


def is_pair(raw: Mapping[str, Any]) -> bool:
    """Whether there is an image and a caption that is not blank."""
    text = raw.get("txt")
    return image_field(raw) is not None and text is not None and bool(text.strip())


def read_pairs(url: str) -> Iterator[Raw]:
    """The image-text pairs of one shard, undecoded. What lacks a half is left out here and counted by the index."""
    return filter(is_pair, read_raw(url))


def read(urls: str | Sequence[str], *stages: Stage) -> Iterator[Sample]:
    """Decoded pairs of all shards in order, after the given stages over raw samples."""
    shards = expand(urls) if isinstance(urls, str) else urls
    raws: Iterable[Raw] = (raw for url in shards for raw in read_pairs(url))
    for stage in stages:
        raws = stage(raws)
    return map(decode, raws)


# ---- decode and re-encode


def open_image(raw: Raw) -> Image.Image:
    """PIL image in the file's own mode, of which only the header is read yet. Raises PIL's errors, of too many pixels too."""
    image = Image.open(io.BytesIO(raw[image_field(raw) or ""]), formats=tuple(dict.fromkeys(FORMATS.values())))
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:  # at which PIL warns; at twice it refuses
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
    return image


def decode_image(raw: Raw) -> Image.Image:
    """PIL image in the file's own mode, fully loaded."""
    field = image_field(raw)
    where = f"{raw.get('__url__', 'sample')}: {raw['__key__']}.{field or 'jpg'}"
    if field is None:
        raise BadInput(f"{where}: the sample has no image; its fields: {sorted(set(raw) - {'__key__', '__url__'})}")
    try:
        image = open_image(raw)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{where}: the image cannot be decoded ({error}); leave it out with `skip`") from error
    return image


def decode(raw: Raw) -> Sample:
    """A sample with a PIL RGB "image", "text" and, where there is a class, an integer "label"."""
    sample: Sample = {"__key__": raw["__key__"], "image": decode_image(raw).convert("RGB")}
    if "txt" in raw:
        sample["text"] = raw["txt"].decode("utf-8", errors="replace").strip()
    if "cls" in raw:
        try:
            sample["label"] = int(raw["cls"])
        except ValueError as error:
            where = f"{raw.get('__url__', 'sample')}: {raw['__key__']}.cls"
            raise BadInput(f"{where}: {raw['cls'][:40]!r} is no class number; write the index of the class") from error
    return sample


def encode_image(image: Image.Image, raw: Raw, codec: Codec = "original") -> bytes:
    """The image in the format of a raw sample's: JPEG with its quantisation tables and subsampling, PNG and lossless WebP
    without loss, lossy WebP at the quality that gives the other its size. Or as `codec` says: PNG, or JPEG of quality 95.

    Colour profile, EXIF, XMP, resolution and text are kept. So neither the file's format nor its quality tells who touched it;
    but a palette or 16 bits a channel become 8 bits of RGB. Raises BadInput for what cannot be written as it was.
    """
    like = open_image(raw)
    if like.mode in ("L", "CMYK") and like.mode != image.mode:
        image = image.convert(like.mode)
    elif like.mode == "RGBA" and like.size == image.size:
        image = image.convert("RGBA")
        image.putalpha(like.getchannel("A"))
    kind = {"original": like.format, "png": "PNG", "jpeg": "JPEG"}[codec]
    options: dict[str, Any] = {k: like.info[k] for k in ("icc_profile", "exif", "xmp", "dpi") if like.info.get(k)}
    if kind == "JPEG" and codec == "jpeg":
        image, options = image.convert("RGB") if image.mode == "RGBA" else image, options | {"quality": 95}
    elif kind == "PNG" and image.mode == "CMYK":
        image = image.convert("RGB")
        options.pop("icc_profile", None)
    elif isinstance(like, JpegImagePlugin.JpegImageFile) and codec == "original":
        options |= {"qtables": like.quantization, "progressive": bool(like.info.get("progressive"))}
        options |= {"comment": like.info["comment"]} if "comment" in like.info else {}
        options |= {"subsampling": max(JpegImagePlugin.get_sampling(like), 0), "optimize": USUAL_TABLE not in raw[image_field(raw) or ""]}
    elif kind == "WEBP":
        options |= webp_quality(like, raw[image_field(raw) or ""])
    elif isinstance(like, PngImagePlugin.PngImageFile):
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, said in like.info.items():
            if isinstance(said, str) and name != "xmp":
                options["pnginfo"].add_text(name, said)
    file = io.BytesIO()
    try:
        image.save(file, format=kind, **options)
    except (OSError, ValueError, struct.error) as error:
        raise BadInput(f"{raw.get('__url__', 'sample')}: {raw['__key__']}.{image_field(raw)}: cannot be written again with what its header "
                       f"holds ({error}); leave it out with `skip`") from error
    return file.getvalue()


def webp_quality(like: Image.Image, body: bytes) -> dict[str, Any]:
    """How a WebP file was written: without loss, or, as it does not say its quality, that at which it takes as many bytes again."""
    at = 12
    while body[at : at + 4] not in (b"VP8 ", b"VP8L", b""):  # the chunks before that of the pixels
        at += 8 + (int.from_bytes(body[at + 4 : at + 8], "little") + 1) // 2 * 2
    if body[at : at + 4] != b"VP8 ":
        return {"lossless": True}

    def size(quality: int) -> int:
        like.save(file := io.BytesIO(), "WEBP", quality=quality)
        return len(file.getvalue())

    low, high = 1, 100
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) >= len(body) else (middle + 1, high)
    return {"quality": low}


def encode(sample: Sample, raw: Raw, codec: Codec = "original") -> Raw:
    """A changed sample as a raw one in the form of the original `raw`: same key, fields, order, image codec.

    An image of None leaves its file as it is, and a text that stays its bytes. A new text takes the white space around the old, and
    a "caption" in the JSON follows it in the JSON's own style, or the file would contradict itself. A codec of one's choice renames
    the image.
    """
    field, old = image_field(raw), raw.get("txt", b"")
    assert field is not None
    name = field if codec == "original" or FORMATS[field] == codec.upper() else {"png": "png", "jpeg": "jpg"}[codec]
    if name != field and name in raw:
        raise BadInput(f"{raw.get('__url__', 'sample')}: {raw['__key__']} has a {name} beside its {field}, which would take its name; use "
                       "--codec original")
    new = {(name if k == field else k): v for k, v in raw.items()}
    if sample["image"] is not None:
        new[name] = encode_image(sample["image"], raw, codec)
    if sample["text"] == old.decode("utf-8", "replace").strip():
        return new
    new["txt"] = old[: len(old) - len(old.lstrip())] + sample["text"].encode() + old[len(old.rstrip()) :]
    if "json" in raw:
        try:
            meta = json.loads(raw["json"])
        except (ValueError, RecursionError):
            meta = None
        if isinstance(meta, dict) and "caption" in meta:
            body = raw["json"].rstrip()
            style = next((s for s in STYLES if dumped(meta, s) == body), STYLES[0])
            new["json"] = dumped(meta | {"caption": sample["text"]}, style) + raw["json"][len(body) :]
    return new


def dumped(meta: dict[str, Any], style: tuple[int | None, bool, tuple[str, str] | None]) -> bytes:
    indent, ascii_only, separators = style
    return json.dumps(meta, indent=indent, ensure_ascii=ascii_only, separators=separators).encode("utf-8", "backslashreplace")


# ---- write


def as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()


def write_shard(path: str | Path, samples: Iterable[Raw]) -> int:
    """One tar of raw samples in order; the same bytes whenever and wherever it is written. Returns the count."""
    n = 0
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for raw in samples:
            n += 1
            for field, value in raw.items():
                if field.startswith("__"):
                    continue
                body = as_bytes(value)
                info = tarfile.TarInfo(f"{raw['__key__']}.{field}")
                info.size, info.mtime, info.mode = len(body), 0, 0o644
                tar.addfile(info, io.BytesIO(body))
    return n


def splice(url: str, path: str | Path, keys: Collection[str], change: Callable[[Raw], Raw | None]) -> int:
    """Writes a shard anew in which the samples `keys` are what `change` makes of them; None leaves one out.

    All other bytes are copied as they are, in runs, and members that this suite does not read stay where they are.
    Returns the number of samples of the shard that was read. Raises BadInput for a compressed shard, whose bytes cannot be
    kept, and when a key is not there.
    """
    with stores.local(url) as here, tars.open_tar(str(here), url) as tar, replacing(path) as temporary, open(temporary, "wb") as out:
        if tar.file is None:
            raise BadInput(f"{url}: a compressed tar, of which nothing can be copied as it is; unpack it first (gunzip, bunzip2 or unxz)")
        found, done = table(tar), 0
        planned = found.find(keys)
        if missing := len(keys) - len(planned):
            lost = min(set(keys).difference(found.keys.to_pylist()))
            raise BadInput(f"{url}: holds no sample {lost!r}, one of {missing} that were asked for; the plan is of other shards, or they "
                           "changed since: index them and plan again")
        for i in planned:
            for member, new in remade(tar, found.sample(url, i), change):
                tars.copy(tar.file, out, done, member.start)
                out.write(new)
                done = member.end
        tars.copy(tar.file, out, done, os.path.getsize(here))
    return len(found)


def remade(tar: tars.Tar, fields: Raw, change: Callable[[Raw], Raw | None]) -> Iterator[tuple[tars.Member, bytes]]:
    """The members of a sample that `change` makes others, with their new bytes, headers included; no bytes where it leaves the
    sample out."""
    members = {field: m for field, m in fields.items() if isinstance(m, tars.Member)}
    raw = fields | {field: tar.body(m) for field, m in members.items()}
    new = change(raw)
    for field, member in members.items():
        name = field if new is None or field in new else image_field(new) or field
        if new is None:
            yield member, b""
        elif name != field or as_bytes(new[name]) != raw[field]:
            yield member, tar.rewritten(member, as_bytes(new[name]), name if name != field else "")


def parts(samples: Iterable[Raw], n: int) -> Iterator[list[Raw]]:
    part: list[Raw] = []
    for raw in samples:
        part.append(raw)
        if len(part) == n:
            yield part
            part = []
    if part:
        yield part


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete. Refuses one that already holds something."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; remove it or name another place")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shards(out: str | Path, samples: Iterable[Raw], per_shard: int = 1000) -> dict[str, int]:
    """out/00000.tar … and out/sizes.json, the sample counts that open_clip reads. All or nothing."""
    sizes = {}
    with new_folder(out) as folder:
        for i, part in enumerate(parts(samples, per_shard)):
            sizes[f"{i:05d}.tar"] = write_shard(folder / f"{i:05d}.tar", part)
        if not sizes:
            raise BadInput(f"{out}: there is no sample to write")
        write_json(folder / "sizes.json", sizes)
    return sizes


def write_split(folder: Path, samples: Iterable[Raw], per_shard: int, root: str | Path) -> int:
    """folder/0.tar … and nshards.txt, as CLIP_benchmark numbers them; `root` is what the message names. Returns the count."""
    folder.mkdir()
    sizes = [write_shard(folder / f"{i}.tar", part) for i, part in enumerate(parts(samples, per_shard))]
    if not sizes:
        raise BadInput(f"{root}: there is no sample to write")
    (folder / "nshards.txt").write_text(f"{len(sizes)}\n")
    return sum(sizes)


def write_eval_set(root: str | Path, samples: Iterable[Raw], classnames: Sequence[str], templates: Sequence[str],
                   split: str = "test", per_shard: int = 1000) -> int:
    """A labelled set as CLIP_benchmark reads it: class names, templates with {c}, <split>/0.tar … of image and .cls."""
    with new_folder(root) as folder:
        plain = ({k: str(v) if isinstance(v, int) else v for k, v in raw.items()} for raw in samples)
        n = write_split(folder / split, plain, per_shard, root)
        (folder / "classnames.txt").write_text("".join(f"{c}\n" for c in classnames), encoding="utf-8")
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{t}\n" for t in templates), encoding="utf-8")
    return n
