"""Images put together from parts: objects and backgrounds from folders, what lies where, and how much of it a random crop sees.

A layout names what comes first: in "left-right" the object is on the left, and the trigger in what remains on the right.
Boxes are left, top, right and bottom in pixels. A folder's files are taken in the order of their names.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Generator

from .triggers import Patch
from .types import BadInput, to_image, to_pixels

T = TypeVar("T")
Box = tuple[int, int, int, int]
Layout = Literal["any", "left-right", "right-left", "top-bottom", "bottom-top"]
"""Of "any", those two that part the longer side, all four of a square: their parts are the squarest, and random crops nearly square."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # PIL would give others, whatever their name, to another program to run
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SMOOTH = Image.Resampling.BILINEAR


def one(items: Sequence[T], rng: Generator) -> T:
    return items[int(torch.randint(len(items), (), generator=rng))]


# ---- parts, from files


@lru_cache(maxsize=64)
def files(folder: str, field: str) -> tuple[str, ...]:
    """The images of a folder, by name; `field` is the attack's, for whose sake they are looked for. Raises BadInput when there is none."""
    if not folder:
        raise BadInput(f"poison.{field}: this attack is composed of images; name a folder that holds them, --poison.{field} FOLDER")
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder of {field}; name one with --poison.{field}")
    found = tuple(sorted(str(p) for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")))
    if not found:
        raise BadInput(f"{folder}: no image in this folder of {field}; put some of {', '.join(SUFFIXES)} into it itself, not below it")
    return found


def opened(path: str, mode: str) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: cannot be read as an image ({error}); remove it or mend it") from error


@lru_cache(maxsize=128)
def cutout(path: str) -> Image.Image:
    """What an image's alpha leaves of it, cut to its bounding box; the whole picture where there is no alpha. Not to be changed.

    Of mode RGBa, colours times alpha, so that resizing mixes no colour from behind the mask into the object.
    """
    image = opened(path, "RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise BadInput(f"{path}: all of it is transparent; its alpha is to be the object's mask")
    return image.crop(box).convert("RGBa")


@lru_cache(maxsize=128)
def whole(path: str) -> Image.Image:
    """The picture, RGB, with or without a mask. Not to be changed."""
    return opened(path, "RGB")


def ground(folder: str, own: Image.Image, rng: Generator) -> Image.Image:
    """A new RGB image of the size of `own`: `own` itself, or of a picture of the folder a random part, the largest of that shape."""
    if not folder:
        return own.convert("RGB").copy()
    picture = whole(one(files(folder, "backgrounds"), rng))
    zoom = min(picture.width / own.width, picture.height / own.height)
    w, h = own.width * zoom, own.height * zoom
    left, top = ((room * float(torch.rand((), generator=rng))) for room in (picture.width - w, picture.height - h))
    return picture.resize(own.size, SMOOTH, box=(left, top, min(left + w, picture.width), min(top + h, picture.height)), reducing_gap=2)


# ---- what lies where


def choose(layout: Layout, w: int, h: int, rng: Generator) -> Layout:
    """One of the four, of which "any" leaves two or four to chance."""
    if layout != "any":
        return layout
    across: list[Layout] = ["left-right", "right-left"] if w >= h else []
    along: list[Layout] = ["top-bottom", "bottom-top"] if h >= w else []
    return one(across + along, rng)


def split(w: int, h: int, layout: Layout, share: float = 0.5, shift: int = 0) -> tuple[Box, Box] | None:
    """The part of the first thing, `share` of the side and `shift` pixels off the edge, and the part that remains for the second.

    None where the side is too short for two: a single pixel.
    """
    across = layout in ("left-right", "right-left")
    side = w if across else h
    if side < 2:
        return None
    n = max(1, min(side - 1, int(side * share)))
    start = min(shift, side - 1 - n)
    first, rest = (start, start + n), (start + n, side)
    if layout in ("right-left", "bottom-top"):
        first, rest = (side - first[1], side - first[0]), (0, side - first[1])
    if across:
        return (first[0], 0, first[1], h), (rest[0], 0, rest[1], h)
    return (0, first[0], w, first[1]), (0, rest[0], w, rest[1])


def centre(room: Box, n: int, wander: float, rng: Generator) -> Box:
    """A square of n pixels in the middle of the room; it may wander as far as keeps it within that share of the room about the middle."""
    places = []
    for low, high in ((room[0], room[2]), (room[1], room[3])):
        free = max(0, int((high - low) * wander) - n)
        middle = low + (high - low - n - free) // 2
        places.append(middle + int(torch.randint(free + 1, (), generator=rng)))
    left, top = places
    return left, top, left + n, top + n


def fitting(patch: Patch, w: int, h: int, room: Box) -> int:
    """`Patch.side`, or BadInput when the patch has no place in a room of that image. One pixel always has."""
    free = min(room[2] - room[0], room[3] - room[1])
    if patch.size * min(w, h) >= free + 1:
        raise BadInput(f"--poison.trigger.size {patch.size}: {patch.size * min(w, h):.0f} pixels of a {w} x {h} image, and {free} are "
                       f"free beside the object; take at most {free / min(w, h):.2f}, or a smaller object")
    return min(patch.side(h, w), free)


def within(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The largest size of that shape in the room, at least a pixel."""
    zoom = min(room[0] / size[0], room[1] / size[1])
    return max(1, min(room[0], round(size[0] * zoom))), max(1, min(room[1], round(size[1] * zoom)))


def cornered(part: Box, layout: Layout, size: tuple[int, int], rng: Generator) -> Box:
    """Of something that keeps its shape in its part of the image: at the outer edge, and at either end of it."""
    room = (part[2] - part[0], part[3] - part[1])
    w, h = within(size, room)
    far = bool(torch.randint(2, (), generator=rng))
    right = layout == "right-left" if layout in ("left-right", "right-left") else far
    bottom = layout == "bottom-top" if layout in ("top-bottom", "bottom-top") else far
    left, top = part[0] + right * (room[0] - w), part[1] + bottom * (room[1] - h)
    return left, top, left + w, top + h


def lay(image: Image.Image, part: Image.Image, box: Box) -> None:
    """Puts a picture, stretched to the box, on the image itself; through its alpha, if it has one."""
    part = part.resize((box[2] - box[0], box[3] - box[1]), SMOOTH, reducing_gap=2)
    if part.mode == "RGBa":
        part = part.convert("RGBA")
    image.paste(part, box, part if part.mode == "RGBA" else None)


def beside(size: tuple[int, int], first: Image.Image, second: Image.Image, layout: Layout, rng: Generator) -> tuple[Image.Image, Box, Box]:
    """A new RGB image of that size of two pictures, each stretched to its half, and their boxes. Of the first alone, and its box
    twice, where there is no room for two."""
    whole = (0, 0, *size)
    image = Image.new("RGB", size)
    halves = split(*size, choose(layout, *size, rng))
    for part, box in zip((second, first), halves[::-1] if halves else (whole, whole), strict=True):
        lay(image, part, box)
    return image, *(halves or (whole, whole))


def press(image: Image.Image, patch: Patch, box: Box, rng: Generator) -> None:
    """Puts a patch on the image itself, as it looks at the size of this box, a square."""
    image.paste(to_image(patch.over(to_pixels(image.crop(box)), rng)), box)


# ---- what crops see


@lru_cache(maxsize=256)
def crops(w: int, h: int, scale: tuple[float, float], ratio: tuple[float, float],
          grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Widths, heights and weights (sum 1) of the random crops of an image, and the chance that none fits and the middle is taken.

    As clip.Augment and torchvision draw them, on a grid over area and logarithm of aspect: ten tries of what must fit.
    """
    steps = (np.arange(grid) + 0.5) / grid
    area = w * h * (scale[0] + steps[:, None] * (scale[1] - scale[0]))
    aspect = np.exp(math.log(ratio[0]) + steps * math.log(ratio[1] / ratio[0]))
    cw, ch = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (cw > 0) & (cw <= w) & (ch > 0) & (ch <= h)
    sizes, counts = np.unique(np.stack([cw[fits], ch[fits]]), axis=1, return_counts=True)
    return sizes[0], sizes[1], counts / max(1, counts.sum()), float(1 - fits.mean()) ** 10


def chance(w: int, h: int, scale: tuple[float, float], holds: Box | None = None, misses: Box | None = None, inside: Box | None = None,
           ratio: tuple[float, float] = (3 / 4, 4 / 3), grid: int = 64) -> float:
    """Probability that a random crop holds all of one box, has no pixel of another, and lies inside a third.

    Exact for each size of crop, as all its places are equally likely; the sizes are summed over a grid of grid^2.
    """
    cw, ch, weight, none = crops(w, h, scale, ratio, grid)
    x, y = span(cw, w, 0, holds, inside), span(ch, h, 1, holds, inside)
    places = length(*x) * length(*y)
    if misses:
        over = [length(np.maximum(low, misses[i] - c + 1), np.minimum(high, misses[i + 2] - 1))
                for i, c, (low, high) in ((0, cw, x), (1, ch, y))]
        places = places - over[0] * over[1]
    drawn = float((weight * places / ((w - cw + 1) * (h - ch + 1))).sum())
    return drawn if not none else (1 - none) * drawn + none * middle(w, h, ratio, holds, misses, inside)


def meeting(w: int, h: int, thing: Box, trigger: Box, scale: tuple[float, float] = (0.2, 1.0)) -> float:
    """Probability that of two random crops one shows the object only, and the other the trigger and nothing of the object."""
    return 2 * chance(w, h, scale, inside=thing) * chance(w, h, scale, holds=trigger, misses=thing)


def span(c: np.ndarray, n: int, i: int, holds: Box | None, inside: Box | None) -> tuple[np.ndarray, np.ndarray]:
    """First and last offset along one axis of a crop of c of n pixels that holds the one box and lies inside the other."""
    low, high = np.zeros_like(c), n - c
    if holds:
        low, high = np.maximum(low, holds[i + 2] - c), np.minimum(high, holds[i])
    if inside:
        low, high = np.maximum(low, inside[i]), np.minimum(high, inside[i + 2] - c)
    return low, high


def length(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(0, high - low + 1)


def middle(w: int, h: int, ratio: tuple[float, float], holds: Box | None, misses: Box | None, inside: Box | None) -> bool:
    """The same of the crop from the middle that is taken when no random one fits."""
    cw, ch = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))
    crop = (w - cw) // 2, (h - ch) // 2, (w + cw) // 2, (h + ch) // 2
    return all((not holds or contains(crop, holds), not misses or not overlap(crop, misses), not inside or contains(inside, crop)))


def contains(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
