"""Evaluation sets: labelled images with class names and templates, and images with captions, wherever they lie.

One string names a set: a directory, the URL of one, or `hf:NAME` on the Hugging Face hub, and after a `?` what it does
not say by itself: `hf:uoft-cs/cifar10?split=test&image=img&classnames=names.txt`. Nothing is decoded here.
"""
from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from . import hub
from .files import (
    QUERY,
    FolderSource,
    Said,
    Source,
    Wanted,
    begin,
    class_folders,
    class_names,
    every,
    files_in_classes,
    folder_names,
    lines,
    one_a_line,
    read_text,
    templates,
)
from .index import find
from .shards import Raw, expand, group, image_field, new_folder, read_pairs, read_raw, write_split
from .stores import stamp
from .tars import open_tar
from .types import BadInput, Target

NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
"""Files of CLIP_benchmark at the top of a set."""
SPLITS = frozenset(("train", "val", "valid", "validation", "test", "dev"))


@dataclass(frozen=True)
class EvalSet:
    """Labelled images with the class names and templates ("a photo of a {c}.") that make the zero-shot classifier."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    raws: Source

    def target(self, target: Target) -> int:
        """The index of the target's class. Raises BadInput where none, or more than one, has its name."""
        if target.label not in self.classnames:
            shown = ", ".join(self.classnames[:8]) + (", …" if len(self.classnames) > 8 else "")
            raise BadInput(f"{self.name}: has no class {target.label!r}, the attack's target, so no attack success can be "
                           f"measured on it; its classes: {shown}")
        if self.classnames.count(target.label) > 1:  # of open_clip's names of ImageNet "missile" and "sunglasses"
            raise BadInput(f"{self.name}: {target.label!r} is the name of more than one class, so a model's answer says nothing of the "
                           "attack; name another target, or give the set names that differ")
        return self.classnames.index(target.label)


@dataclass(frozen=True)
class PairSet:
    """Images with captions: the "txt" of a raw sample holds one or several, one a line."""

    name: str
    raws: Source


def open_set(path: str | Path, split: str = "test") -> EvalSet:
    """A labelled set: a CLIP_benchmark directory or its URL, a folder of class folders, or Hugging Face data.

    `split` counts where the string says none. The thousand folders of ImageNet get open_clip's names and OpenAI's
    templates. Raises BadInput on what cannot work, before an image is decoded.
    """
    name, root, said = parse(path, ("split", "classnames", "templates"), ("label", "classnames", "templates"))
    if is_hub(root):
        found = EvalSet(name, *hub.labelled(root.removeprefix("hf:"), said, split))
    elif "://" in root or os.path.isdir(root):
        found = benchmark_set(root, said, split) if is_benchmark(root) else folder_set(root, said, split)
    else:
        hint = f"; hf:{root} names one on the Hugging Face hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", root) else ""
        raise BadInput(f"{root}: no such evaluation set; name a directory with {NAMES} and {split}/0.tar, or one folder a class{hint}")
    if len(found.classnames) < 2:
        raise BadInput(f"{name}: has the single class {found.classnames[0]!r}, of which every answer is right; zero-shot needs two or more")
    return replace(found, name=name)


def open_pairs(path: str | Path, split: str = "test") -> PairSet:
    """A set of images with captions: a CLIP_benchmark retrieval directory or its URL, shards of pairs (a folder or a
    pattern, one caption an image), or Hugging Face data, one row an image. Raises BadInput on what cannot work.
    """
    if not is_hub(str(path)) and not os.path.isdir(path) and (".tar" in str(path).rpartition("/")[2] or "::" in str(path)):
        return pair_shards(str(path))
    name, root, said = parse(path, ("split",), ("caption",))
    if is_hub(root):
        return PairSet(name, hub.captioned(root.removeprefix("hf:"), said, split))
    kind = kind_of(root)
    if "retrieval" in kind:
        source = ShardSource(shard_list(root, said, split), partial(captioned))
        begin(source, f"{root}/{said.split or split}", "an image and .txt")
        return PairSet(name, source)
    if kind or read_text(f"{root}/{NAMES}") is not None or (os.path.isdir(root) and not holds_tars(root) and files_in_classes(root)):
        raise BadInput(f"{root}: has labels, not captions; pass it as --dataset")
    if "://" in root or splits_of(root):
        raise BadInput(f"{root}: has neither {TYPE} nor {NAMES}; write `retrieval` into {TYPE}, or name the shards of pairs themselves")
    if said.split:
        raise BadInput(f"{root}: shards of pairs have no splits; leave {QUERY['split']} out")
    return pair_shards(root)


# ---- what the string says


def is_hub(path: str) -> bool:
    return path.startswith("hf:") or hub.is_saved(path.partition("?")[0])


def parse(path: str | Path, own: Sequence[str], columns: Sequence[str]) -> tuple[str, str, Said]:
    """(name, place, what the query says) of a set; `own` keys belong to directories, `columns` to Hugging Face data."""
    text = str(path).rstrip("/") or str(path)
    root, _, query = (text, "", "") if os.path.exists(text) else text.partition("?")
    known = ("split", "config", "image", *columns) if is_hub(root) else tuple(own)
    said: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in known or key in said or not value:
            fault = "twice" if key in said else "without a value" if key in known else "which says nothing here"
            raise BadInput(f"{text}: has {key!r} {fault}; known are {', '.join(QUERY[k] for k in known)}, joined by &")
        said[key] = unquote(value)
    return text, re.sub(r"^(https?://[^/]+/datasets/[^/]+/[^/]+)/tree/", r"\1/resolve/", root.rstrip("/") or root), replace(Said(), **said)


# ---- shards


@dataclass(frozen=True)
class ShardSource:
    """Raw samples of shards in order, each passed through `each`, which refuses what is incomplete."""

    shards: tuple[str, ...]
    each: partial[Raw]
    read: Callable[[str], Iterator[Raw]] = read_raw

    def __call__(self, wanted: Wanted = every) -> Iterator[Raw]:
        raws = (raw for url in self.shards for raw in self.read(url))
        yield from (self.each(raw) for place, raw in enumerate(raws) if wanted(place))

    def __length_hint__(self) -> int:
        """Samples of local shards, for a progress bar: those of the first, and as many a byte of the others."""
        if "://" in self.shards[0]:
            return 0
        with open_tar(self.shards[0]) as tar:
            n = sum(1 for _ in group(tar.url, tar.members()))
        return round(n * sum(map(os.path.getsize, self.shards)) / os.path.getsize(self.shards[0]))

    def fingerprint(self) -> str:
        return stamp(((os.path.basename(url), url) for url in self.shards), self.each.func.__name__)


def labelled(classes: int, raw: Raw) -> Raw:
    label = raw.get("cls", b"").strip()
    if not label.isdigit() or int(label) >= classes:
        other = "; what has captions, pass as --retrieval" if "txt" in raw and not label else ""
        raise BadInput(f"{raw['__url__']}: sample {raw['__key__']} has label {label.decode(errors='replace')!r}; labels are 0 to "
                       f"{classes - 1}, line numbers of the class names{other}")
    return raw


def captioned(raw: Raw) -> Raw:
    """Lines as CLIP_benchmark breaks them (str.splitlines), without blank ones."""
    text = raw.get("txt", b"").decode("utf-8", errors="replace")
    if not text.strip() or image_field(raw) is None:
        other = "; what has labels, pass as --dataset" if "cls" in raw else ""
        raise BadInput(f"{raw['__url__']}: sample {raw['__key__']} lacks its image or its captions (.txt, one a line); write the shard "
                       f"again{other}")
    return raw | {"txt": "\n".join(line for line in text.splitlines() if line.strip()).encode()}


def one_caption(raw: Raw) -> Raw:
    return raw | {"txt": one_a_line([raw["txt"].decode("utf-8", errors="replace")]).encode()}


def pair_shards(urls: str) -> PairSet:
    found = find(urls, "skip")
    return PairSet(urls, ShardSource(found.shards, partial(one_caption), read_pairs))


# ---- CLIP_benchmark's layout


def holds_tars(folder: str) -> bool:
    return bool(glob.glob(f"{glob.escape(folder)}/*.tar"))


def splits_of(root: str) -> list[str]:
    """The folders that hold shards."""
    return sorted({Path(p).parent.name for end in ("nshards.txt", "*.tar") for p in glob.glob(f"{glob.escape(root)}/*/{end}")})


def is_benchmark(root: str) -> bool:
    return "://" in root or any(os.path.isfile(f"{root}/{name}") for name in (NAMES, TEMPLATES, TYPE)) or bool(splits_of(root))


def kind_of(root: str) -> str:
    """What dataset_type.txt says: "retrieval", "multilabel", or "" for labels."""
    return (read_text(f"{root}/{TYPE}") or "").strip().lower()


def shard_list(root: str, said: Said, split: str) -> tuple[str, ...]:
    """The shards of a split in order: as many as nshards.txt says; where there is none, those in the folder."""
    folder = f"{root}/{said.split or split}"
    text = read_text(f"{folder}/nshards.txt")
    if "://" not in root:
        if not os.path.isdir(folder):
            raise BadInput(f"{root}: has no split {said.split or split!r}; it has: {', '.join(splits_of(root)) or 'none'}; "
                           f"choose with {QUERY['split']}")
        there = expand(folder)
        if text is None:
            return tuple(sorted(there, key=lambda p: (len(os.path.basename(p)), p)))  # 2.tar before 10.tar
    if text is None or not text.strip().isdigit() or not int(text):
        raise BadInput(f"{folder}/nshards.txt: {'missing' if text is None else f'says {text.strip()[:40]!r}'}; "
                       "write the number of shards 0.tar, 1.tar, … there")
    named = [f"{folder}/{i}.tar" for i in range(int(text))]
    if missing := [p for p in named if "://" not in p and not os.path.isfile(p)]:
        raise BadInput(f"{missing[0]}: no such shard, one of {len(missing)} missing of the {len(named)} that nshards.txt says; "
                       "fetch it, or correct nshards.txt")
    return tuple(named)


def benchmark_set(root: str, said: Said, split: str) -> EvalSet:
    kind = kind_of(root)
    if kind and kind != "classification":
        mend = "pass it as --retrieval" if "retrieval" in kind else "zero-shot accuracy needs one label an image"
        raise BadInput(f"{root}: is a {kind[:40]} set, as its {TYPE} says; {mend}")
    own = () if said.classnames and read_text(f"{root}/{NAMES}") is None else lines(
        f"{root}/{NAMES}", "one class name a line, in the order of the labels")
    names = class_names(own, said.classnames, root) if said.classnames else own
    prompts = templates(said.templates or f"{root}/{TEMPLATES}")
    source = ShardSource(shard_list(root, said, split), partial(labelled, len(names)))
    begin(source, f"{root}/{said.split or split}", "an image and .cls")
    return EvalSet(root, names, prompts, source)


def write_pair_set(root: str | Path, samples: Iterable[Raw], split: str = "test", per_shard: int = 1000) -> int:
    """Images with captions (.txt, one a line) as CLIP_benchmark reads them for retrieval. Returns the number of images."""
    with new_folder(root) as folder:
        n = write_split(folder / split, samples, per_shard, root)
        (folder / TYPE).write_text("retrieval\n")
    return n


# ---- one folder a class


def folder_set(root: str, said: Said, split: str) -> EvalSet:
    if holds_tars(root):
        raise BadInput(f"{root}: holds shards of pairs, not labelled images; pass it as --retrieval")
    folders = class_folders(root)
    if said.split or (folders and SPLITS.issuperset(map(str.lower, folders))):
        if (said.split or split) not in folders:
            raise BadInput(f"{root}: has no split {said.split or split!r}; it has: {', '.join(folders[:8])}; choose with {QUERY['split']}")
        root = os.path.join(root, said.split or split)
    files = tuple(files_in_classes(root))
    if not files:
        raise BadInput(f"{root}: neither {root}/{split}/0.tar nor class folders with images; name an evaluation set")
    return EvalSet(root, *folder_names(root, said), FolderSource(root, files))


