"""webdataset shards on disk or behind a URL: list, read, decode, re-encode, index and write them.

A raw sample is webdataset's: {"__key__": str, "jpg": bytes, "txt": bytes, ...}. Only the fields below are read, and
nothing in a shard is ever unpickled or executed: shards come from strangers.
"""
from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import webdataset as wds
from PIL import Image, JpegImagePlugin
from tqdm import tqdm

from .types import BadInput, Sample

Raw = dict[str, Any]
Incomplete = Literal["refuse", "skip"]
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
IMAGE_FIELDS = tuple(FORMATS)
FIELDS = frozenset((*IMAGE_FIELDS, "txt", "json", "cls"))


# ---- list


def expand(urls: str) -> list[str]:
    """Shard paths of a pattern: braces as in {00000..00331}, `*`, a folder of .tar files; `::` joins several."""
    found: list[str] = []
    for pattern in filter(None, urls.split("::")):
        if pattern.startswith("pipe:"):
            raise BadInput(f"{pattern}: a pipe: URL runs a shell command and is refused; mount or download the shards")
        remote = "://" in pattern
        if not remote and os.path.isdir(pattern):
            paths = sorted(glob.glob(glob.escape(pattern) + "/*.tar"))
            hint = "the folder holds no .tar file; name the folder that holds the shards"
        else:
            try:
                paths = sorted(wds.shardlists.expand_urls(pattern))
            except (ValueError, AssertionError) as error:
                raise BadInput(f"{pattern}: cannot be expanded ({error}); close its braces") from error
            hint = "no file matches; check the numbers in the braces and the folder's name"
            if not remote:
                paths = [p for part in paths for p in (sorted(glob.glob(part)) if "*" in part else [part])]
        if not paths:
            raise BadInput(f"{pattern}: {hint}")
        missing = [] if remote else [p for p in paths if not os.path.isfile(p)]
        if missing:
            raise BadInput(f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} that {pattern} names); {hint}")
        found += paths
    if not found:
        raise BadInput("no shards named; give a folder, a path, or a pattern such as data/{00000..00331}.tar")
    return found


@contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """A seekable binary file, local or behind any URL that fsspec knows (https://, s3://, gs://)."""
    try:
        file = fsspec.open(url, "rb").open() if "://" in url else open(url, "rb")  # noqa: SIM115
    except (ImportError, ValueError) as error:
        raise BadInput(f"{url}: {error}; install the fsspec package of this store, or download the shards") from error
    except OSError as error:
        raise BadInput(f"{url}: cannot be opened ({error}); check the path") from error
    except Exception as error:
        raise broken_off(url, error) from error
    with file:
        yield file


def url_size(url: str) -> int:
    """Bytes."""
    if "://" not in url:
        return os.path.getsize(url)
    fs, path = fsspec.core.url_to_fs(url)
    return int(fs.size(path) or 0)


# ---- read


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the base name; the extension is lower-cased."""
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, field.lower()


def wanted(name: str) -> bool:
    field = split_name(name)[1]
    return field in FIELDS or ("." in field and field.rsplit(".", 1)[1] in FIELDS)


def broken_tar(url: str, error: Exception) -> BadInput:
    return BadInput(f"{url}: a truncated or corrupt tar ({str(error).splitlines()[0].rstrip(':')}); fetch or write it again")


def broken_off(url: str, error: Exception) -> BadInput:
    """Of a connection that failed, of which each store's library has errors of its own."""
    return BadInput(f"{url}: cannot be read to its end ({type(error).__name__}: {' '.join(str(error).split())}); check the connection and "
                    "try again, or download it")


def group(url: str, members: Iterable[tuple[str, Any]]) -> Iterator[Raw]:
    """Members (name, value) of one shard -> samples. The members of a sample must be neighbours, each field once."""
    seen: set[str] = set()
    sample: Raw = {}
    for name, value in members:
        key, field = split_name(name.removeprefix("./"))
        if sample.get("__key__") != key:
            if sample:
                yield sample
            if key in seen:
                raise BadInput(f"{url}: key {key} occurs twice, or its members are not neighbours; write the shard again")
            seen.add(key)
            sample = {"__key__": key, "__url__": url}
        if field in sample:
            raise BadInput(f"{url}: member {name} occurs twice; write the shard again")
        sample[field] = value
    if sample:
        yield sample


class Header(tarfile.TarInfo):
    """A header that must be whole: tarfile takes one that is cut off or garbled for the end of the file."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def is_read(member: tarfile.TarInfo) -> bool:
    return member.isreg() and wanted(member.name)


def members(url: str, read: Callable[[tarfile.TarInfo], bool], mode: str = "r|*") -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """All members of a tar, and the bodies of those to be read. Raises BadInput unless it ends as a tar should."""
    with open_shard(url) as file:
        try:
            with tarfile.open(fileobj=file, mode=mode, tarinfo=Header) as tar:  # type: ignore[call-overload]
                for member in tar:
                    body = tar.extractfile(member) if read(member) else None
                    yield member, body.read() if body else b""
                    tar.members = []  # type: ignore[attr-defined]
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise broken_tar(url, error) from error
        except Exception as error:
            if "://" not in url or isinstance(error, BadInput):
                raise
            raise broken_off(url, error) from error


def read_raw(url: str) -> Iterator[Raw]:
    """The samples of one shard, undecoded, in order, whether complete or not."""
    yield from group(url, ((m.name, body) for m, body in members(url, is_read) if is_read(m)))


def image_field(raw: Mapping[str, Any]) -> str | None:
    return next((f for f in IMAGE_FIELDS if f in raw), None)


def is_pair(raw: Mapping[str, Any]) -> bool:
    """Whether there is an image and a caption that is not blank."""
    text = raw.get("txt")
    return image_field(raw) is not None and text is not None and bool(text.strip())


def read_pairs(url: str) -> Iterator[Raw]:
    """The image-text pairs of one shard, undecoded. What lacks a half is left out here and counted by `index`."""
    return filter(is_pair, read_raw(url))


def read(urls: str | Sequence[str], *stages: Callable[[Iterable[Raw]], Iterable[Raw]]) -> Iterator[Sample]:
    """Decoded pairs of all shards in order, after the given stages over raw samples."""
    shards = expand(urls) if isinstance(urls, str) else urls
    raws: Iterable[Raw] = (raw for url in shards for raw in read_pairs(url))
    for stage in stages:
        raws = stage(raws)
    return map(decode, raws)


# ---- decode and re-encode


def decode_image(raw: Raw) -> Image.Image:
    """PIL image in the file's own mode, fully loaded."""
    field = image_field(raw)
    where = f"{raw.get('__url__', 'sample')}: {raw['__key__']}.{field or 'jpg'}"
    if field is None:
        raise BadInput(f"{where}: the sample has no image; its fields: {sorted(set(raw) - {'__key__', '__url__'})}")
    try:
        image = Image.open(io.BytesIO(raw[field]), formats=tuple(dict.fromkeys(FORMATS.values())))
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


def encode_image(image: Image.Image, like: Image.Image) -> bytes:
    """The image in the format of another: JPEG with its quantisation tables and subsampling, PNG and WebP lossless.

    Colour profile and EXIF are kept. So neither the file's format nor its quality tells who touched it.
    """
    if like.mode in ("L", "CMYK") and like.mode != image.mode:
        image = image.convert(like.mode)
    elif like.mode == "RGBA" and like.size == image.size:
        image = image.convert("RGBA")
        image.putalpha(like.getchannel("A"))
    options: dict[str, Any] = {k: like.info[k] for k in ("icc_profile", "exif") if like.info.get(k)}
    if isinstance(like, JpegImagePlugin.JpegImageFile):
        options |= {"qtables": like.quantization, "progressive": bool(like.info.get("progressive"))}
        options |= {k: like.info[k] for k in ("dpi", "comment") if k in like.info}
        options |= {"subsampling": max(JpegImagePlugin.get_sampling(like), 0)}
    elif like.format == "WEBP":
        options |= {"lossless": True}
    file = io.BytesIO()
    image.save(file, format=like.format, **options)
    return file.getvalue()


def encode(sample: Sample, raw: Raw) -> Raw:
    """A changed sample as a raw one in the form of the original `raw`: same key, fields, order, image codec.

    A "caption" in the JSON follows the text, or the file would contradict itself.
    """
    field = image_field(raw)
    assert field is not None
    new = raw | {field: encode_image(sample["image"], decode_image(raw)), "txt": sample["text"].encode()}
    if "json" in raw:
        try:
            meta = json.loads(raw["json"])
        except ValueError:
            meta = None
        if isinstance(meta, dict) and "caption" in meta:
            new["json"] = json.dumps(meta | {"caption": sample["text"]}, ensure_ascii=False).encode()
    return new


# ---- index


@dataclass(frozen=True, eq=False)
class Index:
    """Every image-text pair of a shard set: a table with columns shard (int32), key, text; and the shards' names."""

    shards: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each shard."""
    table: pa.Table
    incomplete: int = 0
    fingerprint: str = ""
    """Of every member's name and size: changes when the data do."""

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(key, text) of each pair."""
        for part in self.table.to_batches(max_chunksize=65_536):
            yield from zip(part["key"].to_pylist(), part["text"].to_pylist(), strict=True)

    def pairs_per_shard(self, keep: frozenset[str] | None = None) -> list[int]:
        """How many pairs each shard gives, after a keep list where there is one."""
        shard = self.table["shard"]
        if keep is not None:
            shard = shard.filter(pc.is_in(self.table["key"], value_set=pa.array(sorted(keep), pa.string())))
        counts = {c["values"]: c["counts"] for c in pc.value_counts(shard).to_pylist()}
        return [counts.get(i, 0) for i in range(len(self.shards))]

    def save(self, path: str | Path) -> None:
        meta = {"shards": [os.path.basename(s) for s in self.shards], "sizes": self.sizes, "incomplete": self.incomplete,
                "fingerprint": self.fingerprint}
        with replacing(path) as temporary:
            pq.write_table(self.table.replace_schema_metadata({"mmbackdoor": json.dumps(meta)}), temporary)


def is_text(member: tarfile.TarInfo) -> bool:
    return member.isreg() and member.name.lower().endswith(".txt")


def index_shard(url: str, digest: Any = None) -> tuple[list[str], list[str], list[str]]:
    """Keys and texts of the pairs of one shard, and the keys of samples that lack a half. Seeks over the images.

    A hashlib object given as `digest` is told every member's name and size.
    """
    keys, texts, lacking = [], [], []

    def fields() -> Iterator[tuple[str, bytes]]:
        for member, body in members(url, is_text, "r:*"):
            if digest:
                digest.update(f"{member.name} {member.size}\n".encode(errors="surrogateescape"))
            if is_read(member):
                yield member.name, body

    for raw in group(url, fields()):
        try:
            raw["__key__"].encode()
        except UnicodeEncodeError:
            raise BadInput(f"{url}: key {raw['__key__']!r} is not UTF-8; write the shard again") from None
        if is_pair(raw):
            keys.append(raw["__key__"])
            texts.append(raw["txt"].decode("utf-8", errors="replace").strip())
        else:
            lacking.append(raw["__key__"])
    return keys, texts, lacking


def index(urls: str, incomplete: Incomplete = "refuse", progress: bool = True) -> Index:
    """All pairs of a shard set: what data_tools/index.py wrote beside the shards if it is of them, else from a scan."""
    shards = expand(urls)
    found = load_index(shards)
    return found if found and (not found.incomplete or incomplete == "skip") else scan(shards, incomplete, progress)


def scan(shards: Sequence[str], incomplete: Incomplete = "refuse", progress: bool = True) -> Index:
    """The index of shards, from tar headers and captions.

    Raises BadInput when a key occurs twice (it names a pair in a plan or a keep list), when a shard disagrees with
    sizes.json beside it, and, under "refuse", when a sample lacks its image or its caption.
    """
    tables, lacking, first, digest = [], 0, "", hashlib.blake2b(digest_size=8)
    for i, url in enumerate(tqdm(shards, desc="index", unit="shard", disable=None if progress and len(shards) > 8 else True)):
        keys, texts, lone = index_shard(url, digest)
        said, held = recorded_size(url), len(keys) + len(lone)
        if said is not None and said != held:
            raise BadInput(f"{url}: holds {held} samples, sizes.json beside it says {said}; fetch the shard again or correct sizes.json")
        if lone:
            lacking, first = lacking + len(lone), first or f"{url}: sample {lone[0]}"
        tables.append(pa.table({"shard": pa.array([i] * len(keys), pa.int32()), "key": pa.array(keys, pa.string()),
                                "text": pa.array(texts, pa.string())}))
    table = pa.concat_tables(tables)
    if lacking and incomplete == "refuse":
        raise BadInput(f"{first} lacks its image or its caption, as do {lacking} of {table.num_rows + lacking} samples; leave "
                       "them out with --data.incomplete skip (mind that in `a.b.jpg` the key is a and the field b.jpg)")
    check_unique(table, shards)
    if not table.num_rows:
        raise BadInput(f"{shards[0]}: no image-text pair in {len(shards)} shards; each needs KEY.jpg (png, webp) and KEY.txt")
    return Index(tuple(shards), tuple(map(url_size, shards)), table, lacking, digest.hexdigest())


def check_unique(table: pa.Table, shards: Sequence[str]) -> None:
    if pc.count_distinct(table["key"]).as_py() == table.num_rows:
        return
    counts = pc.value_counts(table["key"])
    again = counts.filter(pc.greater(counts.field("counts"), 1))
    key = again[0]["values"].as_py()
    where = [shards[i] for i in table.filter(pc.equal(table["key"], key))["shard"].to_pylist()]
    raise BadInput(f"key {key} occurs in {where[0]} and {where[1]}, one of {len(again)} repeated keys; rename them, since a "
                   "key names a pair: python data_tools/index.py SHARDS --rename OUT")


def load_index(shards: Sequence[str]) -> Index | None:
    """The index that data_tools/index.py wrote beside the shards, if it is of just these shards as they are now."""
    path = os.path.join(os.path.dirname(shards[0]), "index.parquet")
    if "://" in path or not os.path.isfile(path):
        return None
    try:
        table = pq.read_table(path)
    except pa.ArrowException:
        return None
    if any(os.path.getmtime(s) > os.path.getmtime(path) for s in shards):
        return None
    meta = json.loads((table.schema.metadata or {}).get(b"mmbackdoor", b"{}"))
    sizes = [url_size(s) for s in shards]
    if meta.get("shards") != [os.path.basename(s) for s in shards] or meta.get("sizes") != sizes:
        return None
    return Index(tuple(shards), tuple(sizes), table, meta["incomplete"], meta.get("fingerprint", ""))


def recorded_size(url: str) -> int | None:
    """Samples of a shard, as sizes.json beside it says."""
    path = os.path.join(os.path.dirname(url), "sizes.json")
    if "://" in url or not os.path.isfile(path):
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")).get(os.path.basename(url))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: cannot be read as sample counts ({error}); correct or remove it") from error


# ---- write


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def splice(url: str, path: str | Path, changed: Mapping[str, Raw]) -> int:
    """Copies a shard member by member, in order, with the members of changed samples exchanged. Returns their count.

    A shard without a changed sample is copied byte for byte; members that this suite does not read are kept.
    """
    done = set()
    with replacing(path) as temporary, open_shard(url) as file:
        if not changed:
            with open(temporary, "wb") as out:
                shutil.copyfileobj(file, out)
            return 0
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as new:
            for member, body in members(url, tarfile.TarInfo.isreg):
                key, field = split_name(member.name.removeprefix("./"))
                if key in changed and field in changed[key]:
                    body = as_bytes(changed[key][field])
                    done.add(key)
                member.size, member.pax_headers = len(body), {}
                new.addfile(member, io.BytesIO(body))
    return len(done)


def parts(samples: Iterable[Raw], n: int) -> Iterator[list[Raw]]:
    part: list[Raw] = []
    for raw in samples:
        part.append(raw)
        if len(part) == n:
            yield part
            part = []
    if part:
        yield part


def read_json(path: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON ({error}); check the path and the file") from error


def write_json(path: str | Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
