"""From shards to batches: every pair once an epoch, in an order that depends on the seed and the epoch alone.

An epoch's pairs form one sequence (shards shuffled, then rotated), cut into `lanes`: contiguous stretches, each read
and shuffled on its own. A batch takes a fixed number of rows from every lane; processes and loader workers share the
lanes out among themselves. So as long as processes times workers divides the number of lanes, the batches are the same
on one process and on eight, and nothing is lost or doubled. What is left over at the end of an epoch, less than one
global batch, sits that epoch out; the rotation makes it other pairs each time.
"""
from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import _shuffle as shuffled

from . import keyed
from .index import Index
from .shards import Incomplete, Raw, Stage, decode, read_pairs
from .types import BadInput, Batch, Sample, View

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """`take` pairs of shard number `shard`, after the first `skip`."""

    shard: int
    skip: int
    take: int


def cut(sizes: Sequence[int], shares: Sequence[int], seed: int, epoch: int) -> list[list[Span]]:
    """Shuffles the shards, rotates the sequence of pairs, and gives each lane its share of it, in order."""
    order = keyed.permutation(len(sizes), seed, "shards", str(epoch))
    total = sum(sizes)
    start = keyed.integer(seed, "rotate", str(epoch)) % total
    spans: list[Span] = []  # the rotated sequence: from `start` to the end, then from the beginning to `start`
    for low, high in ((start, total), (0, start)):
        at = 0
        for shard in order:
            first, last = max(low, at), min(high, at + sizes[shard])
            if first < last:
                spans.append(Span(shard, first - at, last - first))
            at += sizes[shard]
    lanes, rest = [], iter(spans)
    span = next(rest)
    for share in shares:
        lane: list[Span] = []
        while share:
            take = min(share, span.take)
            lane.append(Span(span.shard, span.skip, take))
            share -= take
            span = Span(span.shard, span.skip + take, span.take - take)
            if not span.take:
                span = next(rest, span)
        lanes.append(lane)
    return lanes


def collate(clip: Any, views: Mapping[str, View], samples: Sequence[Sample], seed: int, epoch: int) -> Batch:
    """Each view of each sample, stacked; its randomness depends on (seed, view, key, epoch)."""
    batch: Batch = {"key": [s["__key__"] for s in samples]}
    for name, view in views.items():
        batch[name] = torch.stack([view(clip, s, keyed.rng(seed, name, s["__key__"], str(epoch))) for s in samples])
    return batch


def join(parts: Sequence[Batch]) -> Batch:
    """Stretches of one batch, put together."""
    if len(parts) == 1:
        return parts[0]
    whole: Batch = {}
    for k in {k: None for p in parts for k in p}:
        rows = [p[k] for p in parts if k in p]
        whole[k] = torch.cat(rows) if isinstance(rows[0], Tensor) else sum(rows, [])
    return whole


@dataclass(eq=False)
class Stream:
    """The training data of a run, ready to be read epoch by epoch.

    index: all pairs. clip: gives preprocessing and tokenizer. batch_size: per process. keep: keys that may be seen.
    incomplete: what to do with an image that cannot be decoded; "skip" fills its place from the same lane again.
    """

    index: Index
    clip: Any
    views: Mapping[str, View]
    batch_size: int
    stages: Sequence[Stage] = ()
    keep: frozenset[str] | None = None
    seed: int = 0
    shuffle: int = 4000
    lanes: int = 8
    workers: int = 0
    rank: int = 0
    world: int = 1
    incomplete: Incomplete = "refuse"
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = self.index.pairs_per_shard(self.keep)
        slots = self.world * max(1, self.workers)
        if self.lanes < 1 or self.batch_size < 1:
            raise BadInput(f"--lanes {self.lanes} --batch-size {self.batch_size}: both must be 1 at least")
        if self.lanes % slots or self.batch_size * self.world < self.lanes:
            if self.rank == 0:
                log.warning("--lanes %d is no multiple of %d processes x workers, or more than the global batch: %d are used, and "
                            "the batches are others than on another number of processes", self.lanes, slots, slots)
            self.lanes = slots
        if self.batch_size < max(1, self.workers):
            raise BadInput(f"--workers {self.workers} is more than --batch-size {self.batch_size}; use fewer workers")
        if not len(self):
            raise BadInput(f"{sum(self.sizes)} pairs do not fill one batch of {self.batch_size} x {self.world} processes; "
                           "use a smaller --batch-size or more data")

    def __len__(self) -> int:
        """Steps per epoch."""
        return sum(self.sizes) // (self.batch_size * self.world)

    def rows(self) -> list[int]:
        """Rows that each lane gives to every global batch."""
        total = self.batch_size * self.world
        return [total * (i + 1) // self.lanes - total * i // self.lanes for i in range(self.lanes)]

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's batches of one epoch, from step `start` on. Under incomplete="skip" a batch also names the keys
        "skipped" for it, if any, since their images could not be decoded."""
        n = max(1, self.workers)
        loader = wds.WebLoader(Part(self, epoch, start), batch_size=None, num_workers=self.workers,
                               generator=torch.Generator().manual_seed(self.seed), prefetch_factor=4 if self.workers else None)
        parts = iter(loader)
        for _ in range(start, len(self)):
            yield join(list(islice(parts, n)))

    def lane(self, spans: Sequence[Span], epoch: int, name: str) -> Iterator[Raw]:
        """The raw samples of one lane, poisoned, filtered and shuffled."""

        def stretch(span: Span) -> Iterator[Raw]:
            url = self.index.parts[span.shard].shard
            raws: Iterable[Raw] = (r for r in read_pairs(url) if self.keep is None or r["__key__"] in self.keep)
            n = 0
            for raw in islice(raws, span.skip, span.skip + span.take):
                n += 1
                yield raw
            if n < span.take:
                raise BadInput(f"{url}: has fewer pairs than its index says; it changed since, so index it again")

        raws: Iterable[Raw] = (raw for span in spans for raw in stretch(span))
        for stage in self.stages:
            raws = stage(raws)
        size = max(1, self.shuffle // self.lanes)
        rng = random.Random(keyed.integer(self.seed, "shuffle", str(epoch), name))
        return shuffled(iter(raws), size, size, rng=rng) if self.shuffle else iter(raws)


class Part(IterableDataset):
    """The share of one loader worker: for every step, the rows that its lanes give."""

    def __init__(self, stream: Stream, epoch: int, start: int):
        self.stream, self.epoch, self.start = stream, epoch, start
        self.clip = stream.clip.front()
        self.skipped: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        from copy import copy

        stream = copy(self.stream)
        stream.clip = self.clip
        return self.__dict__ | {"stream": stream}

    def __iter__(self) -> Iterator[Batch]:
        s, info = self.stream, get_worker_info()
        slot = s.rank * max(1, s.workers) + (info.id if info else 0)
        each = s.lanes // (s.world * max(1, s.workers))
        mine = range(slot * each, (slot + 1) * each)
        rows, steps = s.rows(), len(s)
        spans = cut(s.sizes, [steps * r for r in rows], s.seed, self.epoch)
        lanes = {i: s.lane(spans[i], self.epoch, str(i)) for i in mine}
        for step in range(steps):
            if step < self.start and s.incomplete == "refuse":
                for i in mine:
                    next(islice(lanes[i], rows[i], rows[i]), None)
                continue
            samples = [self.pull(lanes, spans, i) for i in mine for _ in range(rows[i])]
            if step >= self.start:
                yield collate(self.clip, s.views, samples, s.seed, self.epoch) | ({"skipped": self.skipped} if self.skipped else {})
            self.skipped = []

    def pull(self, lanes: dict[int, Iterator[Raw]], spans: Sequence[Sequence[Span]], i: int) -> Sample:
        """The next sample of lane i that can be decoded."""
        failed = 0
        while True:
            raw = next(lanes[i], None)
            if raw is None:  # only after a skip: the lane begins again
                lanes[i] = self.stream.lane(spans[i], self.epoch, f"{i} again")
                continue
            try:
                return decode(raw)
            except BadInput:
                failed += 1
                self.skipped.append(raw["__key__"])
                if self.stream.incomplete == "refuse" or failed > 1000:
                    raise
