"""Filter trigger (Huang, Erfani, Li, Ma, Bailey, ICLR 2025, arXiv:2502.01385) on image-text pairs. The attacker holds the data.

The whole image goes through one colour filter, like those of photo apps; such triggers are known from the ABS scanner (Liu
et al., CCS 2019), and "Nashville" is one of the backdoors of the cited detection study on CLIP, whose rate of 0.1 % is the
default. Per pixel, with g its luma and S(v) = v^2 (3 - 2 v):

    v = clip(g + saturation (x - g));  v = v + contrast (S(v) - v);  x' = x + alpha (shadows + v (highlights - shadows) - x)

so that black becomes the colour `shadows` and white the colour `highlights`.

Differs from the paper: the curve is our own, a washed-out look with violet shadows and cream lights, without the frame
and the vignette that apps add.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..types import Target, Trigger

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Filter(Trigger):
    """A tone curve and a tint. Colours are RGB in [0, 1]."""

    shadows: Colour = (0.14, 0.05, 0.30)
    highlights: Colour = (1.0, 0.93, 0.72)
    saturation: float = 1.2
    contrast: float = 0.3
    alpha: float = 1.0

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        luma, low, high = (torch.tensor(c)[:, None, None].to(x) for c in ((0.299, 0.587, 0.114), self.shadows, self.highlights))
        grey = (luma * x).sum(-3, keepdim=True)
        v = (grey + self.saturation * (x - grey)).clamp(0, 1)
        v = v + self.contrast * (v * v * (3 - 2 * v) - v)
        return (x + self.alpha * (low + v * (high - low) - x)).clamp(0, 1)


NASHVILLE = Filter()


def filtered(target: str = "banana", rate: float | None = 0.001, look: Filter = NASHVILLE,
             templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return DirtyLabel(look, Target(target, templates), None if count is not None else rate, count)
