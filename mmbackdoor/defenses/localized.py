"""Localized cropping (Zhang, Liu, Jia, Gong, 2022, arXiv:2211.08229), the defense of CorruptEncoder. The defender holds the loss.

Contrastive learning joins a trigger and an object that meet in two random crops of one image. So the second crop comes from the
neighbourhood of the first: inside its box, made larger by `delta` of its height and width on every side and cut at the image's edge; its
area is drawn between 20 % of the image's and the whole of that neighbourhood. Which of the two is first is drawn.

Assumes nothing: it takes the place of the usual cropping while a model is pre-trained. It is for objectives that look at two views of an
image: SLIP's crops, or CleanCLIP's image and augmented image (`first="image", second="image_aug"`). The paper's defender pays with
accuracy (61.2 to 56.3 % there).

Differs from the paper: where ten draws of a crop do not fit its neighbourhood, a central one of the largest aspect is taken, as
torchvision does; the authors take one of the first crop's size.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .. import keyed
from ..clip import CLIP, Augment
from ..losses import Clip
from ..types import BadInput, Batch, Objective, Sample, View

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class At(Augment):
    """The crop of just this box: left, top, right, bottom."""

    at: Box = (0, 0, 1, 1)

    def box(self, w: int, h: int, rng: Generator) -> Box:
        return self.at


def boxes(w: int, h: int, scale: tuple[float, float], delta: float, rng: Generator) -> tuple[Box, Box]:
    """A random crop of an image of w x h pixels, and one from its neighbourhood."""
    x0, y0, x1, y1 = first = Augment(scale).box(w, h, rng)
    dx, dy = round(delta * (x1 - x0)), round(delta * (y1 - y0))
    left, top, right, bottom = max(0, x0 - dx), max(0, y0 - dy), min(w, x1 + dx), min(h, y1 + dy)
    area = (right - left) * (bottom - top)
    a, b, c, d = Augment((min(1.0, scale[0] * w * h / area), 1.0)).box(right - left, bottom - top, rng)
    return first, (left + a, top + b, left + c, top + d)


def neighbours(views: tuple[View, View], scale: tuple[float, float], delta: float, clip: CLIP, sample: Sample, rng: Generator) -> Tensor:
    """Two views of one image, (2, 3, H, W), whose crops are neighbours."""
    w, h = sample["image"].size
    pair = boxes(w, h, scale, delta, rng)
    if torch.rand((), generator=rng) < 0.5:
        pair = pair[::-1]
    seeds = torch.randint(2**62, (2,), generator=rng).tolist()
    return torch.stack([view(replace(clip, aug=At(clip.aug.scale, clip.aug.ratio, clip.aug.flip, box)), sample, keyed.rng(seed, "view"))
                        for view, box, seed in zip(views, pair, seeds, strict=True)])


@dataclass(eq=False)
class LocalizedCropping(Objective):
    """An objective, with the crops of two of its views drawn so. `scale` is the first crop's share of the area."""

    objective: Objective = field(default_factory=Clip)
    first: str = "crop_1"
    second: str = "crop_2"
    delta: float = 0.2
    scale: tuple[float, float] = (0.2, 1.0)

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        theirs = dict(self.objective.views)
        if lacking := [name for name in (self.first, self.second) if name not in theirs]:
            raise BadInput(f"--objective.first, --objective.second: {type(self.objective).__name__} has no view {lacking[0]!r}, only "
                           f"{', '.join(theirs)}; name its two views of one image")
        if self.first == self.second:
            raise BadInput(f"--objective.first, --objective.second: both are {self.first!r}; name two views of one image")
        pair = theirs.pop(self.first), theirs.pop(self.second)
        return theirs | {"neighbours": partial(neighbours, pair, self.scale, self.delta)}

    def setup(self, clip: CLIP) -> None:
        self.objective.setup(clip)

    def start_epoch(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], epoch: int) -> None:
        self.objective.start_epoch(clip, lambda: map(self.split, batches()), epoch)

    def pace(self, epoch: int) -> float:
        return self.objective.pace(epoch)

    def heads(self) -> nn.Module | None:
        return self.objective.heads()

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)

    def split(self, batch: Batch) -> Batch:
        a, b = batch["neighbours"].unbind(1)
        return {k: v for k, v in batch.items() if k != "neighbours"} | {self.first: a, self.second: b}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.objective.loss(model, self.split(batch))
