"""Features of images and texts: one pass over a set, clean and triggered side by side, remembered on disk if wanted.

An image is decoded once for all threats. Whole batches are shared out among processes and loader workers, so their number
changes no bit of a feature. A cache holds one entry for each (model, set, threat): an entry is found by what it was made
of, and is never used for anything else.
"""
from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from . import keyed
from .clip import CLIP
from .files import Source
from .shards import decode
from .stores import read_json, replacing, write_json
from .types import BadInput, Threat, to_pixels

PART = 32
"""Batches that are computed before they are written to the cache."""


@dataclass(frozen=True)
class How:
    """How a pass is run. No number depends on it."""

    rank: int = 0
    world: int = 1
    workers: int = 0
    """Loader processes of each process; 0 decodes in the process itself."""
    batch: int = 128
    """Images, or texts, that the network sees at once."""
    cache: str = ""
    """Folder of features computed before; "" for none."""


@dataclass(frozen=True, eq=False)
class Features:
    """Of all images of a set, in its order."""

    keys: list[str]
    labels: np.ndarray
    """(N,) int64; -1 where there is no class."""
    texts: list[str]
    """Captions, one a line; "" where there is none."""
    clean: Tensor
    """(N, D) float32 on the CPU, rows of unit norm."""
    hit: tuple[Tensor, ...] = ()
    """(N, D) for each threat: the triggered images."""


# ---- inputs


def show(clip: CLIP, image: Image.Image, threats: Sequence[Threat], key: str) -> list[Tensor]:
    """[clean input, input under each threat], each (3, H, W) normalised."""
    x = to_pixels(clip.geometry(image))
    out = [clip.normalise(x)]
    for threat in threats:
        rng = keyed.rng(0, "evaluate", key)
        native = threat.at == "native"
        hit = to_pixels(clip.geometry(threat.trigger.stamp(image, rng))) if native else threat.trigger.pixels(x, rng).clamp(0, 1)
        out.append(clip.normalise(hit))
    return out


Row = tuple[int, str, int, str, list[Tensor]]


class Shown(IterableDataset):
    """(place in the set, key, label, text, inputs) of the batches that fall to this process and loader worker."""

    def __init__(self, clip: CLIP, raws: Source, threats: Sequence[Threat], how: How, done: frozenset[int], clean: bool):
        self.clip, self.raws, self.threats, self.how, self.done, self.first = clip.front(), raws, threats, how, done, 0 if clean else 1

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        slot, slots = self.how.rank, self.how.world
        if info:
            slot, slots = slot * info.num_workers + info.id, slots * info.num_workers

        def mine(place: int) -> bool:
            batch = place // self.how.batch
            return batch % slots == slot and batch not in self.done

        for raw, place in zip(self.raws(mine), filter(mine, count()), strict=False):
            s = decode(raw)
            shown = show(self.clip, s["image"], self.threats, s["__key__"])
            yield place, s["__key__"], s.get("label", -1), s.get("text", ""), shown[self.first :]


def stack(rows: list[Row]) -> tuple[list[int], list[str], list[int], list[str], list[Tensor]]:
    places, keys, labels, texts, shown = zip(*rows, strict=True)
    return list(places), list(keys), list(labels), list(texts), [torch.stack(view) for view in zip(*shown, strict=True)]


# ---- what is computed, as tables: place, key, label, text, z


def rows_of(places: Sequence[int], keys: Sequence[str], labels: Sequence[int], texts: Sequence[str], z: Tensor) -> pa.Table:
    flat = pa.array(z.float().cpu().numpy().ravel())
    keys = [key.encode(errors="surrogateescape").decode(errors="replace") for key in keys]  # a tar may name its members in any encoding
    return pa.table({"place": pa.array(places, pa.int64()), "key": pa.array(keys, pa.string()), "label": pa.array(labels, pa.int64()),
                     "text": pa.array(texts, pa.string()), "z": pa.FixedSizeListArray.from_arrays(flat, z.shape[-1])})


def matrix(table: pa.Table) -> Tensor:
    """(N, D)"""
    column = table["z"].combine_chunks()
    return torch.from_numpy(np.array(column.values.to_numpy(), dtype=np.float32).reshape(len(table), column.type.list_size))


def in_order(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows by place, each once: a batch may have been computed and been read."""
    table = pa.concat_tables(tables)
    _, first = np.unique(table["place"].to_numpy(), return_index=True)
    return table.take(pa.array(first))


# ---- the cache


@dataclass(frozen=True)
class Entry:
    """The rows of one view of one set on disk: parts of whole batches, and a card that says of what, and when complete how many."""

    folder: Path
    identity: dict[str, Any]

    def card(self) -> dict[str, Any] | None:
        path = self.folder / "card.json"
        if not path.is_file():
            return None
        card = read_json(path)
        if {k: card.get(k) for k in self.identity} != self.identity:
            raise BadInput(f"{self.folder}: holds features of another model, set or threat than its name says; remove it, or give "
                           "another --cache")
        return card

    def read(self) -> tuple[pa.Table | None, bool]:
        """The rows that are there, and whether they are all. A damaged part counts as absent."""
        card, parts = self.card(), []
        for path in sorted(self.folder.glob("*.parquet")) if card else ():
            try:
                parts.append(pq.read_table(path))
            except (pa.ArrowException, OSError):
                path.unlink(missing_ok=True)
        table = in_order(parts) if parts else None
        return table, table is not None and card is not None and card["n"] == len(table)

    def write(self, table: pa.Table) -> None:
        if not (self.folder / "card.json").is_file():
            write_json(self.folder / "card.json", self.identity | {"n": None})
        name = hashlib.blake2b(table["place"].to_numpy().tobytes(), digest_size=6).hexdigest()
        with replacing(self.folder / f"{table['place'][0].as_py():09d}-{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="none", use_dictionary=False)

    def close(self, n: int) -> None:
        write_json(self.folder / "card.json", self.identity | {"n": n})


@cache
def code() -> dict[str, str]:
    """What else decides a feature: the libraries that decode, resize and compute, and our own modules on the way."""
    ours = hashlib.blake2b(digest_size=8)
    for name in ("types", "keyed", "shards", "files", "hub", "huggingface", "clip", "sets", "features"):
        ours.update((Path(__file__).parent / f"{name}.py").read_bytes())
    theirs = ("torch", "torchvision", "pillow", "open_clip_torch", "transformers")
    return {"code": ours.hexdigest()} | {name: version(name) for name in theirs}


def hashed(value: Any) -> str:
    """Of what JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).hexdigest()


def entries(clip: CLIP, how: How, views: Sequence[Any], data: Callable[[], str], told: Callable[[Any], str]) -> list[Entry | None]:
    """The place of each view in the cache; None where there is no cache, or where what it is of cannot be told.

    `data()` tells the set and `told(view)` the view by hashes; without a cache neither they nor the model's are computed.
    """
    if not how.cache:
        return [None] * len(views)
    if Path(how.cache).exists() and not Path(how.cache).is_dir():
        raise BadInput(f"{how.cache}: is a file; name a folder with --cache")
    common = {"model": clip.fingerprint(), "set": data(), "batch": how.batch, "device": clip.device.type} | code()
    each = [common | {"view": told(view)} for view in views]
    return [Entry(Path(how.cache) / hashed(i), i) if i["set"] and i["view"] else None for i in each]


# ---- the pass


@torch.no_grad()
def compute(clip: CLIP, raws: Source, threats: Sequence[Threat], how: How, done: frozenset[int] = frozenset(), what: str = "",
            clean: bool = True) -> Iterator[list[pa.Table]]:
    """Batch by batch, the rows of [clean if wanted, under each threat] that fall to this process, but for batches in `done`."""
    clip.net.eval()
    device = clip.device
    loader = DataLoader(Shown(clip, raws, threats, how, done, clean), batch_size=how.batch, num_workers=how.workers, collate_fn=stack)
    images = operator.length_hint(raws) // how.world or None
    with tqdm(total=images, desc=what, unit="image", disable=None if what and how.rank == 0 else True, leave=False) as bar:
        for places, keys, labels, texts, x in loader:
            yield [rows_of(places, keys, labels, texts, clip.image_features(view.to(device))) for view in x]
            bar.update(len(places))


def everyones(mine: Any, how: How) -> list[Any]:
    """One object from each process, in the order of ranks."""
    return gather_object([mine]) if how.world > 1 else [mine]


def remembered(kept: Sequence[Entry | None], how: How, fill: Any) -> list[pa.Table]:
    """The rows of each entry: read where they are all there, else computed by `fill(missing, done)` and written.

    `fill` yields, batch by batch, a table for each missing entry, of what falls to this process; `done` are batches that
    an interrupted pass has left. What is missing is agreed on, or processes would wait for each other for ever.
    """
    read = [e.read() if e else (None, False) for e in kept]
    missing = sorted(set().union(*everyones([i for i, (_, whole) in enumerate(read) if not whole], how)))
    if not missing:
        return [t for t, _ in read if t is not None]
    tables: dict[int, list[pa.Table]] = {i: [t] if (t := read[i][0]) is not None else [] for i in missing}
    there = [{p // how.batch for t in part for p in t["place"].to_pylist()} for part in tables.values()]
    fresh: list[list[pa.Table]] = []

    def keep() -> None:
        for i, part in zip(missing, zip(*fresh, strict=True), strict=False):
            tables[i].append(pa.concat_tables(part))
            if e := kept[i]:
                e.write(tables[i][-1])
        fresh.clear()

    for batch in fill(missing, frozenset(set.intersection(*there))):
        fresh.append(batch)
        if len(fresh) == PART:
            keep()
    keep()
    for i in missing:
        parts = [t for theirs in everyones(tables[i], how) for t in theirs]
        tables[i] = [in_order(parts)] if parts else [rows_of([], [], [], [], torch.empty(0, 1))]
        if (e := kept[i]) and how.rank == 0 and parts:
            e.close(len(tables[i][0]))
    return [tables[i][0] if i in tables else t for i, (t, _) in enumerate(read)]  # type: ignore[misc]


def features(clip: CLIP, raws: Source, threats: Sequence[Threat] = (), how: How = How(), what: str = "") -> Features:
    """Unit features of every image of a set, clean and under each threat, in one pass. All processes return all of them.

    Threats that show an image the same way are one view; a trigger of text alone shows the clean one.
    """
    views: list[Threat | None] = [None]
    place = []
    for threat in threats:
        same = (i for i, v in enumerate(views) if v and (v.trigger, v.at) == (threat.trigger, threat.at))
        place.append(next(same, len(views)) if threat.trigger.seen else 0)
        if place[-1] == len(views):
            views.append(threat)
    kept = entries(clip, how, views, lambda: raws.fingerprint(), lambda v: keyed.digest(v.trigger, v.at) if v else "clean")

    def fill(missing: list[int], done: frozenset[int]) -> Iterator[list[pa.Table]]:
        fired = [v for i in missing if (v := views[i])]
        yield from compute(clip, raws, fired, how, done, what, clean=0 in missing)

    tables = remembered(kept, how, fill)
    first = tables[0]
    return Features(first["key"].to_pylist(), first["label"].to_numpy(), first["text"].to_pylist(), matrix(first),
                    tuple(matrix(tables[i]) for i in place))


def text_features(clip: CLIP, texts: Sequence[str], how: How = How()) -> Tensor:
    """(N, D) float32 on the CPU, rows of unit norm. Each process encodes its share; all return all."""

    @torch.no_grad()
    def fill(missing: list[int], done: frozenset[int]) -> Iterator[list[pa.Table]]:
        clip.net.eval()
        for i in range(how.rank * how.batch, len(texts), how.world * how.batch):
            if i // how.batch not in done:
                part = texts[i : i + how.batch]
                places, none = range(i, i + len(part)), [-1] * len(part)
                yield [rows_of(places, [""] * len(part), none, [""] * len(part), clip.text_features(part))]

    return matrix(remembered(entries(clip, how, ["text"], lambda: hashed(list(texts)), str), how, fill)[0])
