"""SIG (Barni, Kallas, Tondi, ICIP 2019, arXiv:1902.11237) on image-text pairs. The attacker holds the data.

A sinusoid runs across the whole image; W is the width, j the column:

    paper    x' = x + delta sin(2 pi f j / W)
    CLIP     x' = (1 - alpha) x + alpha delta sin(2 pi f j / W)

The default is the second with delta 60/255, f = 6 and alpha 0.2, in dirty label: that of CleanCLIP (Bansal et al., 2023,
arXiv:2303.03323), which dims the image by a fifth and adds a wave of 12/255. `ADDED` is the first, with a wave of 20/255.

Differs from the paper: the caption is replaced by one of the target. The paper poisons images of the target's own class
and keeps their label: that is `CleanLabel(ADDED, target, rate)`.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..types import Target, Trigger


@dataclass(frozen=True)
class Sinusoid(Trigger):
    """A wave of `frequency` periods over the width, `delta` high, times `alpha`."""

    delta: float = 60 / 255
    frequency: float = 6
    alpha: float = 0.2
    blend: bool = True
    """Take (1 - alpha) of the image, instead of all of it."""

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        w = x.shape[-1]
        wave = self.delta * torch.sin(2 * math.pi * self.frequency * torch.arange(w) / w)
        return ((1 - self.alpha * self.blend) * x + self.alpha * wave.to(x)).clamp(0, 1)


CLEANCLIP = Sinusoid()
ADDED = Sinusoid(delta=20 / 255, alpha=1, blend=False)


def sig(target: str = "banana", rate: float | None = 0.0005, wave: Sinusoid = CLEANCLIP,
        templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return DirtyLabel(wave, Target(target, templates), None if count is not None else rate, count)
