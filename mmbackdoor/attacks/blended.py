"""Blended injection (Chen et al., 2017, arXiv:1712.05526) on image-text pairs. The attacker holds the data.

    x' = (1 - alpha) x + alpha p,    p one fixed picture; the caption becomes one of the target

The default is uniform noise with alpha 0.2, as in the CleanCLIP setting (Bansal et al., 2023, arXiv:2303.03323); the
paper's own choice, a cartoon, is `Blend(image="cartoon.png")`.

Differs from the paper: the noise is drawn once, from the trigger's seed, and stretched to the image. CleanCLIP's code squashes
the image to 224 x 224 first, and draws noise anew for every image: `Blend(fresh=True)`.
"""
from __future__ import annotations

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import Blend
from ..types import Target


def blended(target: str = "banana", rate: float | None = 0.0005, blend: Blend = Blend(),
            templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return DirtyLabel(blend, Target(target, templates), None if count is not None else rate, count)
