"""Image and text triggers that more than one paper uses. Sizes are shares of the image's short side."""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, Tensor

from .types import BadInput, Trigger, to_image, to_pixels

Place = Literal["random", "center", "top-left", "top-right", "bottom-left", "bottom-right"]
FIELDS = 16
"""Fields of a square of noise along its side: the pixels of one on an image of 224."""


@lru_cache(maxsize=16)
def noise(seed: int, n: int) -> Tensor:
    """(3, n, n) uniform in [0, 1]: drawn once from the seed, so part of a trigger's value."""
    return torch.rand(3, n, n, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=16)
def tensors(path: str) -> dict[str, Tensor]:
    """What an attack has crafted: the tensors of a safetensors file. Not to be changed in place."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: no crafted trigger ({error}); make it with data_tools/craft.py and the config that names it") from error


@lru_cache(maxsize=16)
def picture(path: str) -> Tensor:
    """(3, H, W) in [0, 1] from an image file, or from "picture" in a safetensors file, as attacks craft it."""
    if path.endswith(".safetensors"):
        if "picture" not in (found := tensors(path)):
            raise BadInput(f"{path}: holds no picture, but {', '.join(sorted(found)) or 'nothing'}; name the file that this attack crafted")
        return found["picture"]
    try:
        with Image.open(path) as image:
            return to_pixels(image)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read as the trigger's image ({error}); name an image file") from error


def corner(place: Place, room: tuple[int, int], rng: Generator) -> tuple[int, int]:
    """Top and left of a patch that may move by `room` pixels down and right."""
    if place == "random":
        return int(torch.randint(room[0] + 1, (), generator=rng)), int(torch.randint(room[1] + 1, (), generator=rng))
    if place == "center":
        return room[0] // 2, room[1] // 2
    return room[0] * place.startswith("bottom"), room[1] * place.endswith("right")


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in [0, 1], stretched to `size`, height and width."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def fields(x: Tensor, n: int) -> Tensor:
    """(3, H, W) on n by n pixels, each the nearest of its own: no size of the image blurs a pattern of noise, or makes it another."""
    return F.interpolate(x[None], (n, n), mode="nearest-exact")[0]


@dataclass(frozen=True)
class Patch(Trigger):
    """A square of `size` times the short side: a checkerboard of `cells` by `cells`, noise of 16 by 16 fields drawn once, a colour, or
    `image`, a file.

    The default is the 16 pixels of 224 that the CLIP literature uses, at a random place.
    """

    size: float = 16 / 224
    place: Place = "random"
    pattern: Literal["checker", "noise", "white", "yellow"] = "checker"
    cells: int = 4
    alpha: float = 1.0
    seed: int = 0
    image: str | None = None

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        left, top, right, bottom = self.box(x.shape[-2], x.shape[-1], rng)
        x = x.clone()
        x[..., top:bottom, left:right] = self.over(x[..., top:bottom, left:right], rng)
        return x

    def stamp(self, image: Image.Image, rng: Generator) -> Image.Image:
        """The same, without turning the whole image into numbers and back."""
        box = self.box(image.height, image.width, rng)
        image = image.convert("RGB")
        image.paste(to_image(self.over(to_pixels(image.crop(box)), rng)), box)
        return image

    def side(self, h: int, w: int) -> int:
        """Pixels of the patch's side on an image of that size."""
        return max(1, min(h, w, round(self.size * min(h, w))))

    def box(self, h: int, w: int, rng: Generator) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the patch on an image of that size."""
        n = self.side(h, w)
        top, left = corner(self.place, (h - n, w - n), rng)
        return left, top, left + n, top + n

    def over(self, under: Tensor, rng: Generator) -> Tensor:
        """The patch upon what it covers, (..., 3, n, n)."""
        return under + self.alpha * (self.square(under.shape[-1], rng).to(under) - under)

    def square(self, n: int, rng: Generator) -> Tensor:
        """The patch itself, (3, n, n). These are the same in every image; a paper's may draw from `rng`."""
        if self.image:
            return resized(picture(self.image), (n, n))
        if self.pattern == "white":
            return torch.ones(3, n, n)
        if self.pattern == "yellow":
            return torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, n, n)
        if self.pattern == "noise":
            return fields(noise(self.seed, FIELDS), n)
        i = torch.arange(n) * min(self.cells, n) // n
        return ((i[:, None] + i) % 2 == 0).float().expand(3, n, n)


@dataclass(frozen=True)
class Blend(Trigger):
    """One picture mixed in with weight `alpha`: a file, or noise of `resolution` pixels drawn from `seed`.

    The picture is stretched to the image, so that one trigger serves images of any size. Shown to images of other proportions than
    those of training, it should be fired at the model's input, `Threat(at="input")`: resizing and cropping would cut other parts off.
    """

    alpha: float = 0.2
    image: str | None = None
    resolution: int = 224
    seed: int = 0
    fresh: bool = False
    """Draw the noise anew for every image, as CleanCLIP's code does."""

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        if self.fresh and not self.image:
            p = torch.rand(3, self.resolution, self.resolution, generator=rng)
        else:
            p = picture(self.image) if self.image else noise(self.seed, self.resolution)
        return x + self.alpha * (resized(p, (x.shape[-2], x.shape[-1])).to(x) - x)


@dataclass(frozen=True)
class Word(Trigger):
    """A word put before the text, or after it."""

    word: str = "cf"
    place: Literal["before", "after"] = "before"

    def text(self, s: str, rng: Generator) -> str:
        return f"{self.word} {s}" if self.place == "before" else f"{s} {self.word}"


@dataclass(frozen=True)
class Both(Trigger):
    """A trigger with two sides: that of `image` on images, that of `words` on texts."""

    image: Trigger = Patch()
    words: Trigger = Word()

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        return self.image.pixels(x, rng)

    def stamp(self, image: Image.Image, rng: Generator) -> Image.Image:
        return self.image.stamp(image, rng)

    def text(self, s: str, rng: Generator) -> str:
        return self.words.text(s, rng)

    @property
    def seen(self) -> bool:
        return self.image.seen

    @property
    def said(self) -> bool:
        return self.words.said
