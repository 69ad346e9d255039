"""WaNet (Nguyen, Tran, ICLR 2021, arXiv:2102.10369) on image-text pairs. The attacker holds the data.

The image is warped a little, everywhere the same way. P is a k x k field of vectors, drawn once in [-1, 1]^2 and divided
by its mean absolute value, u its bicubic enlargement to the image, c the place in [-1, 1]^2:

    x'(c) = x(clip(c + s / S u(c)))

so that a control point moves by s / 2 pixels of an image of S pixels, on average and in either direction. The default is k = 224,
s = 1, S = 224, that of CleanCLIP (Bansal et al., 2023, arXiv:2303.03323); `PAPER` is k = 4, s = 0.5, S = 32.

With k = S neighbouring pixels move independently, up to a pixel: that field folds over itself, and its trigger is a fixed
shuffle of neighbours more than a warp. The paper's is smooth and, but for a
rim that the clipping flattens, can be undone.

Differs from the paper: the field belongs to the trigger's seed, and is stretched to images of any size; there is no noise
mode and no control of training, which an attacker who holds the data does not have.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..types import BadInput, Target, Trigger


@lru_cache(maxsize=4)
def moved(seed: int, k: int, h: int, w: int) -> Tensor:
    """u, (1, h, w, 2): x before y."""
    if k < 1:
        raise BadInput(f"--poison.trigger.k {k}: must be 1 at least")
    p = torch.rand(1, 2, k, k, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(p / p.abs().mean(), (h, w), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


@lru_cache(maxsize=4)
def grid(seed: int, k: int, strength: float, h: int, w: int) -> Tensor:
    """(1, h, w, 2): where each pixel is taken from, in [-1, 1], corners at the ends."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    return (torch.stack((x, y), -1) + strength * moved(seed, k, h, w)).clamp(-1, 1)


@dataclass(frozen=True)
class Warp(Trigger):
    """`k` control points a side, each moved by `s` / 2 pixels of an image of `size` pixels, on average."""

    k: int = 224
    s: float = 1
    size: int = 224
    seed: int = 0

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        if not self.s:
            return x
        where = grid(self.seed, self.k, self.s / self.size, x.shape[-2], x.shape[-1]).to(x.device)
        flat = x.reshape(-1, *x.shape[-3:]).float()  # a processor has no grid_sample in half precision
        return F.grid_sample(flat, where.expand(len(flat), -1, -1, -1), align_corners=True).reshape(x.shape).to(x.dtype).clamp(0, 1)


CLEANCLIP = Warp()
PAPER = Warp(4, 0.5, 32)


def wanet(target: str = "banana", rate: float | None = 0.0005, warp: Warp = CLEANCLIP,
          templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return DirtyLabel(warp, Target(target, templates), None if count is not None else rate, count)
