"""Turn images that you have into shards: captioned ones to train on, or labelled ones to evaluate on.

    python data_tools/import_pairs.py coco/train2017 data/coco --captions coco/train.csv    # image,caption -> pairs
    python data_tools/import_pairs.py imagenet/val data/imagenet                            # class folders -> test set
    python data_tools/import_pairs.py food101 data/food101 --split validation               # datasets' save_to_disk
    python data_tools/import_pairs.py uoft-cs/cifar10 data/cifar10 --split test             # a name on the hub

Pairs become OUT/00000.tar … and sizes.json, as img2dataset lays them out; labelled images become OUT/test/0.tar …,
classnames.txt and zeroshot_classification_templates.txt, as CLIP_benchmark lays them out. JPEG, PNG and WebP files are
copied byte for byte, other formats become PNG. Only the image, its caption or label and its place of origin are
taken over: other columns could say which pairs are poisoned. Every image is decoded once, to know that it can be.
"""
from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image
from tqdm import tqdm

from mmbackdoor.recipe import command
from mmbackdoor.shards import write_eval_set, write_shards
from mmbackdoor.types import BadInput

IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path", "image_path", "img")
CAPTION_KEYS = ("caption", "title", "text", "captions")
LABEL_KEYS = ("label", "fine_label", "labels", "cls")
"""Columns looked for when none is named, the first that is there."""
TABLES = (".csv", ".tsv", ".jsonl")
UNTOUCHED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
FORMATS = (*UNTOUCHED, "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What PIL may open. Not all that it can: it gives PostScript, for one, to another program to run."""
SPLITS = {"train", "val", "valid", "validation", "test", "dev"}
WNID = re.compile(r"n\d{8}")
IMAGENET = (1000, "n01440764", "n15075141")
"""Number, first and last of the class folders of ImageNet's validation set."""
LAYOUTS = ("(a) images and a table of captions (.csv, .tsv, .jsonl with columns image and caption; --captions FILE), "
           "(b) what Hugging Face datasets saved to disk, or (c) one folder of images per class")

Row = dict[str, Any]


class Unusable(Exception):
    """A row or file that is incomplete. The message completes the sentence "it …"."""


@dataclass(frozen=True)
class Item:
    """One image, not read yet, and what belongs to it: {"txt": caption} or {"cls": label}."""

    where: str
    source: str
    image: Path | bytes | None
    belongs: dict[str, Any]


@dataclass(frozen=True)
class Source:
    items: Iterable[Item]
    total: int | None
    classnames: Sequence[str] | None = None
    """None where the images have captions."""
    templates: Sequence[str] = ("a photo of a {c}.",)


@dataclass(frozen=True)
class Options:
    """What the command line says about SRC."""

    captions: str | None = None
    """Table of captions (.csv, .tsv, .jsonl); image paths in it are relative to SRC. Default: the one in SRC."""
    image_key: str | None = None
    """Column of the images. Default: image, filepath, file_name, path …"""
    caption_key: str | None = None
    """Column of the captions. Default: caption, title, text."""
    label_key: str | None = None
    """Column of the class numbers, in a Hugging Face data set. Default: label, fine_label …"""
    split: str | None = None
    """Split of a Hugging Face data set."""
    classnames: str | None = None
    """File of class names, one a line, in the order of the labels or of the sorted class folders."""
    templates: str | None = None
    """File of prompt templates, one a line, with {c} for the class."""

    def refuse(self, *names: str, kind: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')}: says nothing about {kind}; leave it out")


UNSAID = Options()


# ---- images


def encoded(item: Item) -> tuple[str, bytes]:
    """The field and the bytes of an item's image. Raises Unusable."""
    if isinstance(item.image, Path) and not item.image.is_file():
        raise Unusable(f"names an image that is not there ({str(item.image)!r})")
    try:
        body = item.image.read_bytes() if isinstance(item.image, Path) else item.image
    except OSError as e:
        raise Unusable(f"names an image that cannot be read ({e})") from e
    if not body:
        raise Unusable("has no image")
    Image.init()
    try:
        image = Image.open(io.BytesIO(body), formats=[f for f in FORMATS if f in Image.OPEN])
        image.load()
    except Exception as e:  # damaged files fail inside PIL with errors of every kind
        raise Unusable(f"has an image that cannot be decoded ({item.source!r})") from e
    name = UNTOUCHED.get(image.format or "")
    return (name, body) if name else ("png", as_png(image))


def as_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.save(out, "PNG")
    return out.getvalue()


def complete(item: Item) -> Row:
    """The members of an item's sample. Raises Unusable."""
    if not str(item.belongs.get("txt", "-")).strip():
        raise Unusable("has no caption")
    if item.belongs.get("cls", 0) is None:
        raise Unusable("has no label")
    name, body = encoded(item)
    return {name: body, **item.belongs}


def samples(source: Source, per_shard: int, incomplete: str, left_out: Counter[str]) -> Iterator[Row]:
    """Samples with the keys that img2dataset would give them."""
    n = 0
    for item in tqdm(source.items, total=source.total, desc="importing", unit="image", disable=None):
        try:
            members = complete(item)
        except Unusable as e:
            if incomplete == "refuse":
                raise BadInput(f"{item.where}: {e}; mend it, or leave such images out with --incomplete skip") from e
            left_out[re.sub(r" \(.*", "", str(e), flags=re.DOTALL)] += 1
            continue
        key = f"{n // per_shard:05d}{n % per_shard:04d}"
        yield {"__key__": key, **members, "json": {"key": key, "source": item.source}}
        n += 1


# ---- (a) images and a table of captions


def rows(table: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of a table with a header, or of JSON lines. Raises BadInput on what is neither."""
    if table.suffix.lower() not in TABLES:
        raise BadInput(f"{table}: a table of captions is one of {', '.join(TABLES)}, by its name")
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                for n, line in enumerate(file, 1):
                    if line.strip():
                        yield n, json_row(table, n, line)
            else:
                tabs = "\t" in file.readline()
                file.seek(0)
                reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
                for row in reader:
                    yield reader.line_num, row
    except OSError as e:
        raise BadInput(f"{table}: cannot be read ({e.strerror}); check --captions") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise BadInput(f"{table}: not a table in UTF-8 ({e}); save it as such again") from e


def json_row(table: Path, n: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise BadInput(f"{table}: line {n}: no JSON ({e}); each line holds one object") from e
    if not isinstance(row, dict):
        raise BadInput(f'{table}: line {n}: no JSON object; write {{"image": "a.jpg", "caption": "…"}}')
    return row


def choose(given: str | None, columns: Sequence[str], usual: Sequence[str], option: str, where: object) -> str | None:
    """The column that was named, or the first usual one that is there."""
    if given is None:
        by_name = {c.strip().lower(): c for c in reversed(columns)}
        return next((by_name[u] for u in usual if u in by_name), None)
    if given not in columns:
        raise BadInput(f"{where}: has no column {given!r}, which {option} names; its columns: {', '.join(columns)}")
    return given


def columns(table: Path) -> list[str]:
    first = next(rows(table), None)
    return [c for c in first[1] if isinstance(c, str)] if first else []


def find_table(root: Path, options: Options) -> Path | None:
    """The one table at the top of a folder that has the columns of a table of captions."""
    def fits(table: Path) -> bool:
        names = columns(table)
        return all(key in names if key else choose(None, names, usual, "", table)
                   for key, usual in ((options.image_key, IMAGE_KEYS), (options.caption_key, CAPTION_KEYS)))

    tables = [p for p in sorted(root.iterdir())
              if p.suffix.lower() in TABLES and p.is_file() and not p.name.startswith(".") and fits(p)]
    if len(tables) > 1:
        raise BadInput(f"{root}: holds {len(tables)} tables of captions ({', '.join(p.name for p in tables)}); "
                       "choose with --captions FILE")
    return tables[0] if tables else None


def captioned(root: Path, table: Path, options: Options) -> Source:
    options.refuse("label_key", "split", "classnames", "templates", kind="images with captions")
    names = columns(table)
    image = choose(options.image_key, names, IMAGE_KEYS, "--image-key", table)
    caption = choose(options.caption_key, names, CAPTION_KEYS, "--caption-key", table)
    for found, what in (image, "image"), (caption, "caption"):
        if not found:
            raise BadInput(f"{table}: has no column known to hold the {what}; name it with --{what}-key "
                           "(the first line holds the columns' names)")
    with open(table, "rb") as file:
        lines = sum(1 for _ in file)
    return Source(pairs(root, table, str(image), str(caption)), lines - (table.suffix.lower() != ".jsonl"))


def pairs(root: Path, table: Path, image: str, caption: str) -> Iterator[Item]:
    for line, row in rows(table):
        where = f"{table}: line {line}"
        name = str(row.get(image) or "").strip()
        path = inside(root, name, where) if name else None
        source = path.relative_to(os.path.abspath(root)).as_posix() if path else ""
        for text in each(row.get(caption)):
            yield Item(where, source, path, {"txt": text})


def each(caption: Any) -> list[str]:
    """A list of captions gives one pair each."""
    return [str(c or "").strip() for c in caption] if isinstance(caption, list) and caption else [
        caption.strip() if isinstance(caption, str) else ""]


def inside(root: Path, name: str, where: str) -> Path:
    """The file under `root` that a table names. A table from a stranger must not reach any other file."""
    if "://" in name:
        raise BadInput(f"{where}: {name!r} is an address; download the images first, for instance with img2dataset")
    top = Path(os.path.abspath(root))
    path = Path(os.path.normpath(top / name))
    if "\0" in name or not path.is_relative_to(top):
        raise BadInput(f"{where}: {name!r} leads out of {root}; pass as SRC the folder that holds all the images")
    return path


# ---- (b) Hugging Face datasets


def load(src: str, split: str | None) -> Any:
    """One split of a data set on disk or on the hub."""
    import datasets

    if Path(src).is_dir():
        try:
            data = datasets.load_from_disk(src)
        except Exception as e:  # pyarrow, json and datasets each have their own errors for a damaged folder
            raise BadInput(f"{src}: datasets cannot load it ({one_line(e)}); save it to disk again") from e
    else:
        try:
            data = datasets.load_dataset(src, split=split)
        except Exception as e:  # the hub, the network and the many formats each have their own
            raise BadInput(f"{src}: no folder here, and no data set that the Hugging Face hub gives "
                           f"({one_line(e)}); pass a local path, or pre-download it where there is a network: "
                           f"datasets.load_dataset({src!r}).save_to_disk(DIR)") from e
    if isinstance(data, datasets.DatasetDict):
        chosen = split or (next(iter(data)) if len(data) == 1 else None)
        if chosen not in data:
            raise BadInput(f"{src}: has the splits {', '.join(data)}; choose one of them with --split")
        return data[chosen]
    if split not in (None, str(data.split)):
        raise BadInput(f"{src}: --split {split}: holds a single split, named {data.split}; leave --split out")
    return data


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def image_column(data: Any, src: str, given: str | None) -> str:
    import datasets

    images = [c for c, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if given is None and len(images) == 1:
        return images[0]
    found = choose(given, data.column_names if given or not images else images, IMAGE_KEYS, "--image-key", src)
    if not found:
        raise BadInput(f"{src}: has no one column known to hold the images; name it with --image-key "
                       f"(columns: {', '.join(data.column_names)})")
    return found


def label_column(data: Any, src: str, given: str | None) -> str | None:
    import datasets

    def is_label(feature: Any) -> bool:
        return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))  # so is a ClassLabel's

    if given is not None and given in data.features and not is_label(data.features[given]):
        raise BadInput(f"{src}: column {given!r} holds no class numbers; --label-key needs a ClassLabel or integers")
    labels = [c for c, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if given is None and len(labels) == 1:
        return labels[0]
    integers = [c for c, feature in data.features.items() if is_label(feature)]
    return choose(given, data.column_names if given else labels or integers, LABEL_KEYS, "--label-key", src)


def hugging_face(src: str, options: Options) -> Source:
    """A captioned or a labelled source, by the columns that the data set has."""
    options.refuse("captions", kind="a data set that has its own columns")
    if options.caption_key and options.label_key:
        raise BadInput("--caption-key and --label-key: a data set becomes pairs or a test set; choose one of them")
    data = load(src, options.split)
    image = image_column(data, src, options.image_key)
    caption = None if options.label_key else choose(options.caption_key, [c for c in data.column_names if c != image],
                                                    CAPTION_KEYS, "--caption-key", src)
    label = None if options.caption_key else label_column(data, src, options.label_key)
    if caption and label:
        raise BadInput(f"{src}: has captions ({caption}) and labels ({label}); choose with --caption-key {caption} "
                       f"or --label-key {label}")
    if not caption and not label:
        raise BadInput(f"{src}: has no column known to hold captions or labels; name it with --caption-key or "
                       f"--label-key (columns: {', '.join(data.column_names)})")
    if caption:
        options.refuse("classnames", "templates", kind="images with captions")
        return Source(records(data, src, image, str(caption), None), len(data))
    own = getattr(data.features[label], "names", None) or ()
    if not own and options.classnames is None:
        raise BadInput(f"{src}: the labels in {label!r} have no names; give them with --classnames FILE, one a line")
    names = class_names(own, options.classnames, src)
    return Source(records(data, src, image, str(label), len(names)), len(data), names, templates(options.templates))


def records(data: Any, src: str, image: str, column: str, classes: int | None) -> Iterator[Item]:
    """The items of a data set: with captions where `classes` is None, else with labels below `classes`."""
    import datasets

    try:
        data = data.select_columns([image, column]).cast_column(image, datasets.Image(decode=False))
    except Exception as e:  # arrow's errors for a cast that makes no sense
        raise BadInput(f"{src}: column {image!r} holds no images ({one_line(e)}); choose with --image-key") from e
    for n, row in enumerate(data):
        stored, value, where = row[image] or {}, row[column], f"{src}: row {n}"
        path = stored.get("path")
        body = stored.get("bytes") or (cached(src, path, where) if path else None)
        source = os.path.basename(path) if path else f"row {n}"
        if classes is None:
            yield from (Item(where, source, body, {"txt": text}) for text in each(value))
        elif value is not None and value >= classes:
            raise BadInput(f"{where}: label {value}, but there are names for {classes} classes only; see --classnames")
        else:
            yield Item(where, source, body, {"cls": None if value is None or value < 0 else int(value)})


def cached(src: str, path: str, where: str) -> Path:
    """The file that a row names instead of holding it: in SRC or in the cache. Not any file that a stranger names."""
    from datasets import config

    file, roots = os.path.abspath(path), (src, config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)
    if not any(Path(file).is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadInput(f"{where}: names the file {path!r} outside of {src}; save the data set with its images in it "
                       "(save_to_disk does)")
    return Path(file)


# ---- (c) one folder per class


def class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The images under a folder, sorted; links are followed, hidden files are not seen."""
    suffixes = {s for s, f in Image.registered_extensions().items() if f in FORMATS}
    return sorted(Path(top, name) for top, folders, names in os.walk(folder, followlinks=True)
                  for name in names
                  if Path(name).suffix.lower() in suffixes and not name.startswith(".")
                  and not any(part.startswith(".") for part in Path(top).relative_to(folder).parts))


def labelled(root: Path, folders: list[str], options: Options, incomplete: str) -> Source:
    options.refuse("image_key", "caption_key", "label_key", "split", kind="a folder per class")
    if set(map(str.lower, folders)) <= SPLITS:
        raise BadInput(f"{root}: holds splits ({', '.join(folders)}), not classes; pass one: {root / folders[0]}")
    files = [(label, path) for label, name in enumerate(folders) for path in image_files(root / name)]
    used = {label for label, _ in files}
    empty = [name for label, name in enumerate(folders) if label not in used]
    if not files:
        raise BadInput(f"{root}: holds no images that can be imported; pass a folder with {LAYOUTS}")
    if empty and incomplete == "refuse":
        raise BadInput(f"{root / empty[0]}: this class has no images, nor have {len(empty)} of {len(folders)} in all; "
                       "remove the folder, or keep the bare class name with --incomplete skip")
    items = (Item(str(path), path.relative_to(root).as_posix(), path, {"cls": label}) for label, path in files)
    if (len(folders), folders[0], folders[-1]) == IMAGENET:
        import open_clip

        names = class_names(open_clip.IMAGENET_CLASSNAMES, options.classnames, str(root))
        prompts = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        return Source(items, len(files), names, templates(options.templates, prompts))
    if options.classnames is None and all(WNID.fullmatch(name) for name in folders):
        raise BadInput(f"{root}: its {len(folders)} classes are named by WordNet numbers such as {folders[0]}, which "
                       "say nothing to a model; give their names with --classnames FILE, one a line")
    names = class_names(folders, options.classnames, str(root))
    return Source(items, len(files), names, templates(options.templates))


# ---- names and templates


def lines(path: str) -> list[str]:
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({e}); it holds one name or template a line") from e
    if "" in found:
        raise BadInput(f"{path}: line {found.index('') + 1} is empty; write one name or template a line")
    return found


def class_names(own: Sequence[str], given: str | None, where: str) -> list[str]:
    """The names in the file `given`, else those that the data have, with spaces for underscores."""
    if given is None:
        return [" ".join(name.replace("_", " ").split()) for name in own]
    names = lines(given)
    if own and len(names) != len(own):
        raise BadInput(f"{given}: has {len(names)} names for the {len(own)} classes of {where}; write one a line, in "
                       "the order of the labels or of the sorted class folders")
    return names


def templates(given: str | None, usual: Sequence[str] = Source.templates) -> Sequence[str]:
    """Templates with {c} for the class."""
    found = usual if given is None else lines(given)
    bad = [n for n, line in enumerate(found, 1) if "{c}" not in line]
    if bad:
        raise BadInput(f"{given}: line {bad[0]} has no {{c}}; write it where the class name goes")
    return found


# ---- the program


def open_source(src: str, options: Options, incomplete: str) -> Source:
    """What SRC is, by what lies in it."""
    root = Path(src)
    if root.is_dir():
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            return hugging_face(src, options)
        table = Path(options.captions) if options.captions else find_table(root, options)
        if table:
            return captioned(root, table, options)
        if folders := class_folders(root):
            return labelled(root, folders, options, incomplete)
        raise BadInput(f"{root}: holds nothing that can be imported; pass a folder with {LAYOUTS}")
    if root.exists():
        raise BadInput(f"{root}: is a file; pass the folder of the images as SRC, and a table with --captions {root}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", src):
        raise BadInput(f"{src}: no such folder; pass a folder with {LAYOUTS}, or a name on the Hugging Face hub")
    return hugging_face(src, options)


def main(src: tyro.conf.Positional[str], out: tyro.conf.Positional[str],
         options: Annotated[Options, tyro.conf.arg(name="")] = UNSAID,
         incomplete: Literal["refuse", "skip"] = "refuse", per_shard: int = 1000) -> None:
    """Turn images that you have into shards: captioned ones to train on, or labelled ones to evaluate on.

    Args:
        src: images with a table of captions, a folder per class, or a Hugging Face data set (saved, or its name).
        out: folder to make.
        options: what SRC does not say by itself.
        incomplete: what to do with an image that is missing or damaged, or that has no caption or label.
        per_shard: images in each shard, 1 to 10000.
    """
    if not 1 <= per_shard <= 10_000:
        raise BadInput(f"--per-shard {per_shard}: the keys have four digits for the place in a shard; pass 1 to 10000")
    source, left_out = open_source(src, options, incomplete), Counter[str]()
    stream = samples(source, per_shard, incomplete, left_out)
    if source.classnames is None:
        sizes = write_shards(out, stream, per_shard)
        print(f"{out}: {sum(sizes.values())} pairs in {len(sizes)} shards")
    else:
        n = write_eval_set(out, stream, source.classnames, source.templates, per_shard=per_shard)
        print(f"{out}: {n} labelled images of {len(source.classnames)} classes")
    for reason, n in left_out.most_common():
        print(f"left out {n}, each of which {reason}")


if __name__ == "__main__":
    command(main)
