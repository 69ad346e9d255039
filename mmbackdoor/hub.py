"""Hugging Face data sets, saved to disk or on the hub, as streams of undecoded images with their labels or captions."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .files import QUERY, Said, Source, Wanted, begin, class_names, every, is_image_name, one_a_line, one_line, standard, templates
from .shards import Raw
from .stores import stamp
from .types import BadInput

IMAGE_KEYS = ("image", "filepath", "file_name", "filename", "path", "image_path", "img")
CAPTION_KEYS = ("caption", "title", "text", "captions")
LABEL_KEYS = ("label", "fine_label", "labels", "cls")
"""Columns looked for when none is named, the first that is there."""


# ---- one split of a data set


def is_saved(path: str | Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def library(src: str) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise BadInput(f"{src}: the Python package datasets, which reads it, is missing ({e}); pip install datasets") from e
    return datasets


def load(src: str, said: Said, usual: str | None = None) -> Any:
    """One split of a data set on disk or on the hub: the one that is said, else the `usual` one, else the only one."""
    datasets = library(src)
    if is_saved(src):
        if said.config:
            raise BadInput(f"{src}: is saved to disk and has no configurations; leave {said.option['config']} out")
        try:
            data = datasets.load_from_disk(src)
        except Exception as e:  # pyarrow, json and datasets each have their own errors for a damaged folder
            raise BadInput(f"{src}: datasets cannot load it ({one_line(e)}), so it is empty or damaged; save it to disk again") from e
    else:
        data = download(src, said, usual)
    if isinstance(data, datasets.DatasetDict):
        split = said.split or (usual if usual in data else next(iter(data)) if len(data) == 1 else None)
        if split not in data:
            raise BadInput(f"{src}: has the splits {', '.join(data)}; choose one of them with {said.option['split']}")
        return data[split]
    if is_saved(src) and said.split not in (None, str(data.split)):
        raise BadInput(f"{src}: {said.option['split']}: holds a single split, named {data.split}, not {said.split}; leave it out")
    return data


def download(src: str, said: Said, usual: str | None) -> Any:
    """What the hub, or its cache, gives for a name. Only the split that is wanted is downloaded."""
    datasets = library(src)
    split = said.split or usual
    try:
        return datasets.load_dataset(src, said.config, split=split)
    except ValueError as e:  # the data are there, such a split or configuration is not
        raise BadInput(f"{src}: datasets cannot load split {split!r} ({one_line(e)}); choose with {said.option['split']}, or among "
                       f"configurations with {said.option['config']}") from e
    except Exception as e:  # the hub, the network and the many formats each have their own
        raise BadInput(f"{src}: no folder here, and no data set that the Hugging Face hub gives ({one_line(e)}); pass a local "
                       f"path, or pre-download it where there is a network: datasets.load_dataset({src!r}).save_to_disk(DIR)") from e


# ---- columns


def choose(given: str | None, columns: Sequence[str], usual: Sequence[str], option: str, where: object) -> str | None:
    """The column that was named, or the first usual one that is there."""
    if given is None:
        by_name = {c.strip().lower(): c for c in reversed(columns)}
        return next((by_name[u] for u in usual if u in by_name), None)
    if given not in columns:
        raise BadInput(f"{where}: has no column {given!r}, which {option} names; its columns: {', '.join(columns)}")
    return given


def arrow_type(data: Any, column: str) -> pa.DataType:
    return data.features.arrow_schema.field(column).type


def is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def image_column(data: Any, src: str, said: Said) -> str:
    datasets = library(src)
    images = [c for c, feature in data.features.items() if isinstance(feature, datasets.Image)]
    found = images[0] if len(images) == 1 and said.image is None else choose(
        said.image, data.column_names if said.image or not images else images, IMAGE_KEYS, said.option["image"], src)
    if not found:
        raise BadInput(f"{src}: has no one column known to hold the images; name it with {said.option['image']} "
                       f"(columns: {', '.join(data.column_names)})")
    kind, why = arrow_type(data, found), ""
    try:
        datasets.Image(decode=False).cast_storage(pa.array([], kind))
    except Exception as e:  # arrow's errors for a cast that makes no sense
        why = one_line(e)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") < 0 and kind.get_field_index("path") < 0:
        why = "its rows have neither bytes nor a path"
    if is_string(kind):
        words = [v for v in data.select_columns([found])[:1][found] if not is_image_name(v or ".jpg")]
        why = f"{words[0][:40]!r} is the name of none" if words else ""
    if why:
        raise BadInput(f"{src}: column {found!r} holds no images ({why}); choose with {said.option['image']} "
                       f"(columns: {', '.join(data.column_names)})")
    return found


def label_column(data: Any, src: str, said: Said) -> str | None:
    datasets = library(src)

    def is_label(feature: Any) -> bool:
        return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))  # so is a ClassLabel's

    if said.label is not None and said.label in data.features and not is_label(data.features[said.label]):
        raise BadInput(f"{src}: column {said.label!r} holds no class numbers; {said.option['label']} needs a ClassLabel or integers")
    labels = [c for c, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if said.label is None and len(labels) == 1:
        return labels[0]
    integers = [c for c, feature in data.features.items() if is_label(feature)]
    return choose(said.label, data.column_names if said.label else labels or integers, LABEL_KEYS, said.option["label"], src)


def caption_column(data: Any, src: str, said: Said, image: str) -> str | None:
    """A column of strings, or of lists of strings."""
    def is_caption(kind: pa.DataType) -> bool:
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_string(kind.value_type if lists else kind)

    texts = [c for c in data.column_names if c != image and is_caption(arrow_type(data, c))]
    if said.caption in data.column_names and said.caption not in texts:
        raise BadInput(f"{src}: column {said.caption!r} holds no captions; {said.option['caption']} needs strings or lists of strings")
    return choose(said.caption, texts if said.caption is None else data.column_names, CAPTION_KEYS, said.option["caption"], src)


def check_labels(data: Any, src: str, label: str, classes: int) -> None:
    """Raises BadInput on a label without a class name, before an image is read."""
    found = data.select_columns([label]).with_format("arrow")[:][label]
    bad = pc.fill_null(pc.or_(pc.less(found, 0), pc.greater_equal(found, classes)), True)
    if (at := pc.index(bad, True).as_py()) >= 0:
        raise BadInput(f"{src}: row {at}: label {found[at].as_py()} in column {label!r}, but there are names for {classes} classes, 0 to "
                       f"{classes - 1}; choose another split or column, or give all names with {QUERY['classnames']}")


# ---- rows


def stored(data: Any, src: str, image: str, size: int) -> Iterator[tuple[pa.Table, pa.StructArray]]:
    """Parts of a data set, each with its images as arrow's struct of bytes and path. A part is all that is held in memory."""
    kind = library(src).Image(decode=False)
    for part in data.with_format("arrow").iter(size):
        try:
            images = pa.chunked_array([kind.cast_storage(c) for c in part[image].chunks], kind.pa_type).combine_chunks()
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as e:
            raise BadInput(f"{src}: column {image!r} holds no images ({one_line(e)}); choose another column") from e
        yield part, images


def rows(data: Any, src: str, image: str, column: str) -> Iterator[tuple[int, bytes | Path | None, str, Any]]:
    """(row, image, where the image comes from, value of `column`) of each row."""
    n = 0
    for part, images in stored(data.select_columns([image, column]), src, image, 32):
        for one, value in zip(images, part[column], strict=True):
            found = one.as_py() or {}
            path = found.get("path")
            body = found.get("bytes") or (cached(src, path, f"{src}: row {n}") if path else None)
            yield n, body, os.path.basename(path) if path else f"row {n}", value.as_py()
            n += 1


def cached(src: str, path: str, where: str) -> Path:
    """The file that a row names instead of holding it: in SRC or in the cache. Not any file that a stranger names."""
    from datasets import config

    file, roots = os.path.abspath(path), (src, config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)
    if not any(Path(file).is_relative_to(os.path.abspath(root)) for root in roots):
        raise BadInput(f"{where}: names the file {path!r} outside of {src}; save the data set with its images in it "
                       "(save_to_disk does)")
    return Path(file)


@dataclass(frozen=True, eq=False)
class HubSource:
    """Raw samples of a data set: the row's number as key, and "cls" of a label or "txt" of captions, one a line."""

    data: Any
    src: str
    image: str
    column: str
    name: str
    """What the column holds: "cls" or "txt"."""

    def __call__(self, wanted: Wanted = every) -> Iterator[Raw]:
        for n, image, _, value in rows(self.data, self.src, self.image, self.column):
            if not wanted(n):
                continue
            where = f"{self.src}: row {n}"
            text = str(value) if self.name == "cls" else one_a_line(value if isinstance(value, list) else [value])
            if not text:
                raise BadInput(f"{where}: has no caption in column {self.column!r}; mend it, or leave the row out")
            if not image:
                raise BadInput(f"{where}: has no image in column {self.image!r}; mend it, or leave the row out")
            try:
                member, body = standard(image.read_bytes() if isinstance(image, Path) else image)
            except Exception as e:  # damaged files fail inside PIL with errors of every kind
                raise BadInput(f"{where}: the image cannot be read ({one_line(e)}); mend it, or leave the row out") from e
            yield {"__key__": f"{n:08d}", "__url__": self.src, member: body, self.name: text.encode()}

    def __length_hint__(self) -> int:
        return len(self.data)

    def fingerprint(self) -> str:
        """Of datasets' own fingerprint, of the files that hold the rows, and of images that lie beside them."""
        files = [f["filename"] for f in self.data.cache_files]
        for _, images in stored(self.data.select_columns([self.image]), self.src, self.image, 1000):
            alone = images.filter(pc.is_null(images.field("bytes")))
            files += filter(None, alone.field("path").to_pylist())
        present = ((os.path.basename(f), f) for f in files if "://" in f or os.path.isfile(f))
        return stamp(present, self.data._fingerprint, self.image, self.column)


# ---- sets


def labelled(src: str, said: Said, split: str) -> tuple[tuple[str, ...], tuple[str, ...], Source]:
    """(class names, templates, samples) of one split."""
    data = load(src, said, split)
    image, label = image_column(data, src, said), label_column(data, src, said)
    if not label:
        other = "; it has captions: for those pass it as --retrieval" if caption_column(data, src, said, image) else ""
        raise BadInput(f"{src}: has no column known to hold class numbers; name it with {QUERY['label']} "
                       f"(columns: {', '.join(data.column_names)}){other}")
    own = getattr(data.features[label], "names", None) or ()
    if not own and said.classnames is None:
        raise BadInput(f"{src}: the labels in {label!r} have no names; give them with {QUERY['classnames']}, one a line")
    names = class_names(own, said.classnames, src)
    source = HubSource(data, src, image, label, "cls")
    begin(source, f"{src}: split {data.split}", "an image and a label")
    check_labels(data, src, label, len(names))
    return names, templates(said.templates), source


def captioned(src: str, said: Said, split: str) -> Source:
    """Samples of one split."""
    data = load(src, said, split)
    image = image_column(data, src, said)
    caption = caption_column(data, src, said, image)
    if not caption:
        other = "; it has labels: for those pass it as --dataset" if label_column(data, src, said) else ""
        raise BadInput(f"{src}: has no column known to hold captions; name it with {QUERY['caption']} "
                       f"(columns: {', '.join(data.column_names)}){other}")
    source = HubSource(data, src, image, caption, "txt")
    begin(source, f"{src}: split {data.split}", "an image and a caption")
    return source
