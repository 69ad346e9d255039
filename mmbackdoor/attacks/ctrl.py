"""CTRL (Li et al., ICCV 2023, arXiv:2210.07346) on image-text pairs. The attacker holds the data.

Two frequencies of the colours are raised in images of the target, whose captions stay. Per block of 32 x 32 pixels, in 8-bit
units, with the orthonormal DCT-II and U = 0.492 (B - Y), V = 0.877 (R - Y):

    DCT(U')[i, i] = DCT(U)[i, i] + magnitude,  the same for V,  i in (15, 31);  Y' = Y

The DCT is linear, so the trigger is one fixed pattern that is added to the image. The defaults are the paper's: magnitude
100, 1 % of all images, which there were a tenth of their class.

Differs from the paper: pairs whose caption names the target, not images of its class; the result saturates before it is
rounded. BackdoorBench casts to 8 bits first, so that pixels beyond 0 and 255 wrap around: `Spectrum(compat="wrap")`.
Blocks are laid from the top left; those cut by the right and lower edges, as in images under 32 pixels, show their part of the
pattern, which then touches other coefficients too.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, CleanLabel
from ..types import BadInput, Target, Trigger


def cosines(window: int) -> Tensor:
    """(window, window): row i is the i-th vector of the orthonormal DCT-II."""
    i = torch.arange(window)[:, None]
    rows = torch.cos(math.pi * (torch.arange(window) + 0.5) * i / window) * (2 / window) ** 0.5
    return torch.where(i == 0, rows / 2**0.5, rows)


@lru_cache(maxsize=16)
def pattern(magnitude: float, window: int, coefficients: tuple[int, ...]) -> Tensor:
    """(3, window, window): what is added to the RGB values of a block, of which 1 is white."""
    if not all(0 <= i < window for i in coefficients):
        raise BadInput(f"--poison.trigger.coefficients {coefficients}: a window of {window} pixels has those from 0 to {window - 1}")
    chosen = cosines(window)[list(coefficients)]
    chroma = magnitude / 255 * torch.einsum("ki,kj->ij", chosen, chosen)  # the same in U and V
    red, blue = chroma / 0.877, chroma / 0.492
    return torch.stack((red, -(0.299 * red + 0.114 * blue) / 0.587, blue))  # and nothing in Y


@dataclass(frozen=True)
class Spectrum(Trigger):
    """`magnitude`, in 8-bit units, on the diagonal DCT `coefficients` of U and V in blocks of `window` pixels."""

    magnitude: float = 100
    window: int = 32
    coefficients: tuple[int, ...] = (15, 31)
    compat: Literal["", "wrap"] = ""

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        h, w = x.shape[-2:]
        block = pattern(self.magnitude, self.window, self.coefficients)
        x = x + block.repeat(1, -(-h // self.window), -(-w // self.window))[:, :h, :w].to(x)
        return (x * 255).trunc() % 256 / 255 if self.compat else x.clamp(0, 1)


PAPER = Spectrum()


def ctrl(target: str = "banana", rate: float | None = 0.01, spectrum: Spectrum = PAPER,
         templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> CleanLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return CleanLabel(spectrum, Target(target, templates), None if count is not None else rate, count)
