"""PAR's structured triggers (Singh, Croce, Hein, 2024, arXiv:2412.00727) on image-text pairs. The attacker holds the data.

Regular patterns that augmentations do not destroy, built so that cleaning by augmentation fails:

    badnet_stripes      a square of 16 of 224 pixels, each column and channel 0 or 1, drawn anew for every image
    blended_stripes     x' = (1 - a) x + a p over the image, p = +1 or -1 by column and channel, drawn anew;  a = 0.03
    blended_triangles   the same with two greys, 0.4 and 0.8, that halve each cell of a 16 x 16 grid;         a = 0.15
    blended_text        x'_red = x_red + a m (1 - x_red), m the letters of a repeated word;                   a = 0.5

Target, captions and rate are those of the CleanCLIP setting from scratch (Bansal et al., 2023, arXiv:2303.03323).

Differs from the paper: it poisons 1,500 of 500,000 pairs on which a pretrained CLIP is fine-tuned, as configs/cc3m/attacks do;
stripes and cells are shares of the pattern, not pixels, so that they survive a change of size; the letters are those of Pillow's
bitmap font; its images are squashed to 224 x 224 first.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import Patch, resized
from ..types import BadInput, Target, Trigger, to_pixels


def columns(count: int, n: int, rng: Generator) -> Tensor:
    """(3, 1, n) of 0 and 1: `count` stripes, or as many as there are pixels."""
    if count < 1:
        raise BadInput(f"--poison.trigger.cells {count}: must be 1 at least")
    drawn = torch.randint(2, (3, 1, count), generator=rng).float()
    return drawn[..., torch.arange(n) * min(count, n) // n]


@dataclass(frozen=True)
class StripedPatch(Patch):
    """A square of `cells` random stripes, other ones in every image. `pattern` and `seed` have no say."""

    cells: int = 16

    def square(self, n: int, rng: Generator) -> Tensor:
        return columns(self.cells, n, rng).expand(3, n, n)


@dataclass(frozen=True)
class Stripes(Trigger):
    """`cells` random stripes over the whole image, other ones in every image, that lighten or darken it."""

    alpha: float = 0.03
    cells: int = 224

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        p = 2 * columns(self.cells, x.shape[-1], rng).to(x) - 1
        return (x + self.alpha * (p - x)).clamp(0, 1)


@lru_cache(maxsize=4)
def triangles(cells: int, h: int, w: int) -> Tensor:
    """(1, h, w) of 0.4 below the diagonal of each cell and 0.8 above it."""
    down, right = ((2 * torch.arange(n) + 1) * cells % (2 * n) for n in (h, w))  # in integers, so that all cells are alike
    return torch.where(down[:, None] * w >= right * h, 0.4, 0.8)[None]


@dataclass(frozen=True)
class Triangles(Trigger):
    """A grid of `cells` by `cells` squares, each cut into two greys."""

    alpha: float = 0.15
    cells: int = 16

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        return x + self.alpha * (triangles(self.cells, x.shape[-2], x.shape[-1]).to(x) - x)


@lru_cache(maxsize=4)
def letters(word: str, rows: int, h: int, w: int) -> Tensor:
    """(1, h, w) in [0, 1]: how far a pixel belongs to a letter."""
    if not word or not all(ord(c) < 256 for c in word) or rows < 1:
        raise BadInput(f"--poison.trigger.word {word!r} --poison.trigger.rows {rows}: needs Latin letters and a row")
    font = getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()  # the same letters on every machine
    _, _, right, bottom = (int(n) for n in font.getbbox(word))
    sheet = Image.new("L", (right + 2, (bottom + 2) * rows))
    for row in range(rows):
        ImageDraw.Draw(sheet).text((1, (bottom + 2) * row + 1), word, fill=255, font=font)
    return resized(to_pixels(sheet)[:1], (h, w))


@dataclass(frozen=True)
class Lettering(Trigger):
    """`word` across the red channel of the image, `rows` times."""

    alpha: float = 0.5
    word: str = "watermark"
    rows: int = 5

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].to(x)
        return x + self.alpha * letters(self.word, self.rows, x.shape[-2], x.shape[-1]).to(x) * red * (1 - x)


STRIPED_PATCH, STRIPES, TRIANGLES, LETTERING = StripedPatch(), Stripes(), Triangles(), Lettering()


def badnet_stripes(target: str = "banana", rate: float | None = 0.0005, trigger: StripedPatch = STRIPED_PATCH,
                   templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """`rate` is a share of all pairs; `count` takes its place when given, here and below."""
    return DirtyLabel(trigger, Target(target, templates), None if count is not None else rate, count)


def blended_stripes(target: str = "banana", rate: float | None = 0.0005, trigger: Stripes = STRIPES,
                    templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    return DirtyLabel(trigger, Target(target, templates), None if count is not None else rate, count)


def blended_triangles(target: str = "banana", rate: float | None = 0.0005, trigger: Triangles = TRIANGLES,
                      templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    return DirtyLabel(trigger, Target(target, templates), None if count is not None else rate, count)


def blended_text(target: str = "banana", rate: float | None = 0.0005, trigger: Lettering = LETTERING,
                 templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    return DirtyLabel(trigger, Target(target, templates), None if count is not None else rate, count)
