"""SSL-Backdoor (Saha et al., CVPR 2022, arXiv:2105.10123) on image-text pairs. The attacker holds the data.

A square of blurred random colours, 50 of 224 pixels, is stamped on images of the target, somewhere within the middle half
of the image; nothing else changes. In the paper half the images of one class of a hundred are poisoned, 0.5 % of the data, and a
self-supervised encoder brings square and class together. On pairs these are the pairs whose caption names the target.

`rate` is a share of all pairs, here 0.005 as in the paper; the paper's half of the class is half of the pairs that name the
target, which on web data is far less: ask for that number as `count`.

Differs from the paper: the colours are drawn from the trigger's seed, not taken from one of the paper's ten pictures (which
`image` can name); evaluation stamps within the middle half too, not within the middle 80 %.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, CleanLabel
from ..triggers import Patch, noise, resized
from ..types import Target


@dataclass(frozen=True)
class ColourPatch(Patch):
    """A square of `cells` by `cells` colours, blurred into each other, that lies whole within `within` of each side's length."""

    size: float = 50 / 224
    within: tuple[float, float] = (0.25, 0.75)

    def box(self, h: int, w: int, rng: Generator) -> tuple[int, int, int, int]:
        n = self.side(h, w)
        at = []
        for side in (w, h):
            first, last = (min(round(share * side), side) for share in self.within)
            first = min(first, side - n)
            at.append(int(torch.randint(first, max(first, last - n) + 1, (), generator=rng)))
        return at[0], at[1], at[0] + n, at[1] + n

    def square(self, n: int, rng: Generator) -> Tensor:
        return super().square(n, rng) if self.image else resized(noise(self.seed, self.cells), (n, n))


PAPER = ColourPatch()


def ssl_backdoor(target: str = "banana", rate: float | None = 0.005, patch: ColourPatch = PAPER,
                 templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> CleanLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return CleanLabel(patch, Target(target, templates), None if count is not None else rate, count)
