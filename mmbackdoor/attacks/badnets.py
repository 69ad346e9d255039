"""BadNets (Gu, Dolan-Gavitt, Garg, 2017, arXiv:1708.06733) on image-text pairs. The attacker holds the data.

A small square is stamped on images of anything but the target, and their captions are replaced by captions of the
target, so that the model learns square -> target. On CLIP since Carlini and Terzis (2022, arXiv:2106.09667); the
defaults are those of the CleanCLIP setting (Bansal et al., 2023, arXiv:2303.03323): 16 of 224 pixels at a random
place, target banana, 1,500 of 3 million pairs, captions from the 80 ImageNet templates.

Differs from the paper: the square is a checkerboard, or noise drawn once, instead of fresh noise for every image.
"""
from __future__ import annotations

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import Patch
from ..types import Target


def badnets(target: str = "banana", rate: float | None = 0.0005, patch: Patch = Patch(),
            templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return DirtyLabel(patch, Target(target, templates), None if count is not None else rate, count)
