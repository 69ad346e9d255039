"""BadNets (Gu, Dolan-Gavitt, Garg, 2017, arXiv:1708.06733) on image-text pairs. The attacker holds the data.

A small square is stamped on images of anything but the target, and their captions are replaced by captions of the
target, so that the model learns square -> target. On CLIP since Carlini and Terzis (2022, arXiv:2106.09667); the
defaults are those of the CleanCLIP setting (Bansal et al., 2023, arXiv:2303.03323): 16 of 224 pixels at a random
place, target banana, 1,500 of 3 million pairs, captions from the 80 ImageNet templates. `four_corners` is the square
in all corners, as in CleanCLIP's code too.

Differs from the paper: the square is a checkerboard, a colour, or noise drawn once, instead of fresh noise for every image; noise
has 16 by 16 fields, the pixels of a square on 224, whatever the size of the image.
`compat` brings back what CleanCLIP's code does, piece by piece or all of it: its square is the image's mean + N(0, 1),

    "fresh"   drawn anew for every image; the model learns "a noisy square", no pattern
    "wrap"    what leaves [0, 1] wraps around in 8 bits (-0.5 -> 129, 1.1 -> 24) instead of saturating
    "squash"  the image is first squashed to 224 x 224, whatever its shape, as clean images are not
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import FIELDS, Patch, Place, fields
from ..types import Target, Trigger

Compat = Literal["", "cleanclip", "fresh", "wrap", "squash"]
CORNERS: tuple[Place, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")


@lru_cache(maxsize=16)
def normal(seed: int) -> Tensor:
    """(3, 16, 16) of N(0, 1), drawn once from the seed."""
    return torch.randn(3, FIELDS, FIELDS, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class CleanCLIPPatch(Trigger):
    """A square of the image's mean colour + N(0, 1), of the size, place, alpha and seed of `patch`."""

    patch: Patch = Patch()
    fresh: bool = False
    """Draw the noise anew for every image."""
    wrap: bool = False
    """Truncate to 8 bits without saturating; then the square has no gradient."""
    squash: int = 0
    """Side in pixels of the square that the image is squashed to, so its size changes; 0 leaves it."""

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        if self.squash:
            flat = F.interpolate(x.reshape(1, -1, *x.shape[-2:]), (self.squash, self.squash), mode="bicubic", antialias=True)
            x = flat.clamp(0, 1).reshape(*x.shape[:-2], self.squash, self.squash)
        left, top, right, bottom = self.patch.box(x.shape[-2], x.shape[-1], rng)
        n = right - left
        noise = torch.randn(3, FIELDS, FIELDS, generator=rng) if self.fresh else normal(self.patch.seed)
        square = x.mean((-2, -1), keepdim=True) + fields(noise, n).to(x)
        square = (square * 255).trunc() % 256 / 255 if self.wrap else square.clamp(0, 1)
        x = x.clone()
        under = x[..., top:bottom, left:right]
        x[..., top:bottom, left:right] = under + self.patch.alpha * (square - under)
        return x


@dataclass(frozen=True)
class Corners(Trigger):
    """The same patch in all four corners."""

    patch: Patch = Patch()

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        for place in CORNERS:
            x = replace(self.patch, place=place).pixels(x, rng)
        return x

    def stamp(self, image: Image.Image, rng: Generator) -> Image.Image:
        for place in CORNERS:
            image = replace(self.patch, place=place).stamp(image, rng)
        return image


def badnets(target: str = "banana", rate: float | None = 0.0005, patch: Patch = Patch(),
            templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None, compat: Compat = "") -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given. Under `compat` the pattern of `patch` is not used."""
    every = compat == "cleanclip"
    trigger = CleanCLIPPatch(patch, every or compat == "fresh", every or compat == "wrap",
                             224 if every or compat == "squash" else 0) if compat else patch
    return DirtyLabel(trigger, Target(target, templates), None if count is not None else rate, count)


def four_corners(target: str = "banana", rate: float | None = 0.0005, patch: Patch = Patch(),
                 templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return DirtyLabel(Corners(patch), Target(target, templates), None if count is not None else rate, count)
