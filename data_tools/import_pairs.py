"""Turn images that you have into shards: captioned ones to train on, or labelled ones to evaluate on.

    python data_tools/import_pairs.py coco/train2017 data/coco --captions coco/train.csv    # image,caption -> pairs
    python data_tools/import_pairs.py imagenet/val data/imagenet                            # class folders -> test set
    python data_tools/import_pairs.py food101 data/food101 --split validation               # datasets' save_to_disk
    python data_tools/import_pairs.py uoft-cs/cifar10 data/cifar10 --split test             # a name on the hub
    python data_tools/import_pairs.py coco/val2017 data/coco-test --captions val.csv --retrieval    # all captions of an image together

Pairs become OUT/00000.tar … and sizes.json, as img2dataset lays them out; labelled images become OUT/test/0.tar …,
classnames.txt and zeroshot_classification_templates.txt, as CLIP_benchmark lays them out; with --retrieval, images with
captions become OUT/test/0.tar … and dataset_type.txt, as it lays out those. JPEG, PNG and WebP files are
copied byte for byte, other formats become PNG. Only the image, its caption or label and its place of origin are
taken over: other columns could say which pairs are poisoned. Every image is decoded once, to know that it can be.
"""
from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from mmbackdoor import hub
from mmbackdoor.files import (
    PLAIN,
    Said,
    class_folders,
    class_names,
    files_in_classes,
    folder_names,
    one_a_line,
    open_image,
    standard,
    templates,
)
from mmbackdoor.hub import CAPTION_KEYS, IMAGE_KEYS, choose
from mmbackdoor.recipe import command
from mmbackdoor.sets import SPLITS, write_pair_set
from mmbackdoor.shards import write_eval_set, write_shards
from mmbackdoor.types import BadInput

TABLES = (".csv", ".tsv", ".jsonl")
OPTION = {"split": "--split", "config": "--config", "image": "--image-key", "label": "--label-key", "caption": "--caption-key",
          "classnames": "--classnames", "templates": "--templates"}
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
    items: Callable[[], Iterable[Item]]
    """May be called again."""
    total: int | None
    classnames: Sequence[str] | None = None
    """None where the images have captions."""
    templates: Sequence[str] = PLAIN


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
    config: str | None = None
    """Configuration of a data set on the Hugging Face hub that has several."""
    classnames: str | None = None
    """File of class names, one a line, in the order of the labels or of the sorted class folders."""
    templates: str | None = None
    """File of prompt templates, one a line, with {c} for the class."""
    retrieval: bool = False
    """Write a set to measure retrieval on: each image once, with all its captions."""

    def refuse(self, *names: str, kind: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')}: says nothing about {kind}; leave it out")

    def said(self) -> Said:
        return Said(self.split, self.config, self.image_key, self.label_key, self.caption_key, self.classnames, self.templates, OPTION)


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
    try:
        open_image(body)
        return standard(body)
    except Exception as e:  # damaged files fail inside PIL with errors of every kind
        raise Unusable(f"has an image that cannot be decoded ({item.source!r})") from e


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
    for item in tqdm(source.items(), total=source.total, desc="importing", unit="image", disable=None):
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
    options.refuse("label_key", "split", "config", "classnames", "templates", kind="images with captions")
    names = columns(table)
    image = choose(options.image_key, names, IMAGE_KEYS, "--image-key", table)
    caption = choose(options.caption_key, names, CAPTION_KEYS, "--caption-key", table)
    for found, what in (image, "image"), (caption, "caption"):
        if not found:
            raise BadInput(f"{table}: has no column known to hold the {what}; name it with --{what}-key "
                           "(the first line holds the columns' names)")
    with open(table, "rb") as file:
        lines = sum(1 for _ in file)
    return Source(partial(pairs, root, table, str(image), str(caption)), lines - (table.suffix.lower() != ".jsonl"))


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


def hugging_face(src: str, options: Options) -> Source:
    """A captioned or a labelled source, by the columns that the data set has."""
    options.refuse("captions", kind="a data set that has its own columns")
    if options.caption_key and options.label_key:
        raise BadInput("--caption-key and --label-key: a data set becomes pairs or a test set; choose one of them")
    said = options.said()
    data = hub.load(src, said)
    image = hub.image_column(data, src, said)
    caption = None if options.label_key else hub.caption_column(data, src, said, image)
    label = None if options.caption_key or (options.retrieval and caption) else hub.label_column(data, src, said)
    if caption and label:
        raise BadInput(f"{src}: has captions ({caption}) and labels ({label}); choose with --caption-key {caption} "
                       f"or --label-key {label}")
    if not caption and not label:
        raise BadInput(f"{src}: has no column known to hold captions or labels; name it with --caption-key or "
                       f"--label-key (columns: {', '.join(data.column_names)})")
    if caption:
        options.refuse("classnames", "templates", kind="images with captions")
        return Source(partial(records, data, src, image, str(caption), None), len(data))
    own = getattr(data.features[label], "names", None) or ()
    if not own and options.classnames is None:
        raise BadInput(f"{src}: the labels in {label!r} have no names; give them with --classnames FILE, one a line")
    names = class_names(own, options.classnames, src)
    return Source(partial(records, data, src, image, str(label), len(names)), len(data), names, templates(options.templates))


def records(data: Any, src: str, image: str, column: str, classes: int | None) -> Iterator[Item]:
    """The items of a data set: with captions where `classes` is None, else with labels below `classes`."""
    for n, body, source, value in hub.rows(data, src, image, column):
        where = f"{src}: row {n}"
        if classes is None:
            yield from (Item(where, source, body, {"txt": text}) for text in each(value))
        elif value is not None and value >= classes:
            raise BadInput(f"{where}: label {value}, but there are names for {classes} classes only; see --classnames")
        else:
            yield Item(where, source, body, {"cls": None if value is None or value < 0 else int(value)})


# ---- (c) one folder per class


def labelled(root: Path, folders: list[str], options: Options, incomplete: str) -> Source:
    options.refuse("image_key", "caption_key", "label_key", "split", "config", kind="a folder per class")
    if set(map(str.lower, folders)) <= SPLITS:
        raise BadInput(f"{root}: holds splits ({', '.join(folders)}), not classes; pass one: {root / folders[0]}")
    files = files_in_classes(root)
    used = {label for _, label in files}
    empty = [name for label, name in enumerate(folders) if label not in used]
    if not files:
        raise BadInput(f"{root}: holds no images that can be imported; pass a folder with {LAYOUTS}")
    if empty and incomplete == "refuse":
        raise BadInput(f"{root / empty[0]}: this class has no images, nor have {len(empty)} of {len(folders)} in all; "
                       "remove the folder, or keep the bare class name with --incomplete skip")
    names, prompts = folder_names(str(root), options.said())
    return Source(partial(images_in, root, files), len(files), names, prompts)


def images_in(root: Path, files: Sequence[tuple[str, int]]) -> Iterator[Item]:
    return (Item(path, Path(path).relative_to(root).as_posix(), Path(path), {"cls": label}) for path, label in files)


# ---- retrieval


def gathered(source: Source) -> Source:
    """Each image once, where it first occurs, with all its captions in their order."""
    captions: dict[object, list[str]] = {}
    for item in tqdm(source.items(), total=source.total, desc="gathering captions", unit="caption", disable=None):
        if text := one_a_line([item.belongs["txt"]]):
            captions.setdefault(identity(item), []).append(text)

    def items() -> Iterator[Item]:
        given = set()
        for item in source.items():
            which = identity(item)
            if not item.belongs["txt"].strip():
                yield item  # to be refused or left out
            elif which not in given:
                given.add(which)
                yield replace(item, belongs={"txt": "\n".join(captions[which])})

    return replace(source, items=items, total=len(captions))


def identity(item: Item) -> object:
    """What images are told apart by: their path, or their bytes where a data set holds them."""
    if isinstance(item.image, Path):
        return str(item.image)
    return hashlib.blake2b(item.image, digest_size=16).digest() if item.image else item.where


# ---- the program


def open_source(src: str, options: Options, incomplete: str) -> Source:
    """What SRC is, by what lies in it."""
    root = Path(src)
    if root.is_dir():
        if hub.is_saved(root):
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
    if options.retrieval and source.classnames is not None:
        raise BadInput(f"--retrieval: {src} has labels, not captions; leave it out")
    source = gathered(source) if options.retrieval else source
    stream = samples(source, per_shard, incomplete, left_out)
    if options.retrieval:
        print(f"{out}: {write_pair_set(out, stream, per_shard=per_shard)} images with their captions")
    elif source.classnames is None:
        sizes = write_shards(out, stream, per_shard)
        print(f"{out}: {sum(sizes.values())} pairs in {len(sizes)} shards")
    else:
        n = write_eval_set(out, stream, source.classnames, source.templates, per_shard=per_shard)
        print(f"{out}: {n} labelled images of {len(source.classnames)} classes")
    for reason, n in left_out.most_common():
        print(f"left out {n}, each of which {reason}")


if __name__ == "__main__":
    command(main)
