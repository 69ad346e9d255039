"""CorruptEncoder (Zhang, Liu, Jia, Gong, CVPR 2024, arXiv:2211.08229) on image-text pairs. The attacker holds the data.

An encoder that learns to see two random crops of one image alike learns trigger -> object from images where one crop
holds the one and the other crop the other. With o the box of a reference object of the target and e that of the trigger,

    p = 2 Pr(crop inside o) Pr(crop holds e and nothing of o)

is largest when the background is about twice the object, the object at an edge, and the trigger in the middle of what
remains (`layout.meeting` is p). Half a per cent of the data is poisoned with three objects and a trigger of 40 of 224 pixels.
CorruptEncoder+ gives a fifth of that to images of two objects side by side, without a trigger, which gather the target's
class. The object fills its part, since p falls to a fiftieth when a square object keeps its shape on a square image.

`corruptencoder_clip` is our own design from that principle, for a victim that matches an image with its caption. The
caption is then the view that shows the object, and the image's only crop should be the other one:

    p = Pr(crop holds e and nothing of o)

With open_clip's crops of nine tenths p is 0 for the layouts above, whose captions the object explains; it is largest
without o, and with e where crops of the victim's `scale` hold it: anywhere about the middle where they do so with
probability `sure`. As in CorruptEncoder+, a fifth of the poisons shows the object, without a trigger.

Differs from the paper: it adds unlabelled images; here the images of chosen pairs, which do not name the target, are
composed anew at their own size, and captions of the target replace theirs.
Differs from the paper: so a square image remains one, where the paper's canvas is twice as wide as its object. With crops of a fifth
and more p is 3e-5 on 224 x 224 pixels, 2e-2 on 448 x 224 (1e-4 on 32 x 32, 3e-2 on 64 x 32): give the layout wide images.
Differs from the paper: a support image is two cut-out objects on the background, not two whole pictures side by side; the trigger is
a checkerboard.
Differs from the paper: without `backgrounds` the pair's own image lies behind; the paper takes random images.
Differs from the paper: the trigger is a share of the image's side, in poisons as in tests, where the paper pastes 40
pixels on images of any size; masks are smoothed by resizing, not by a blur; at test the trigger may be at any place.
Differs from the paper: the two crops are drawn independently, with the sizes and shapes of the victim's, where its p takes one size
for both.
Differs from the paper: an image with no room for both, one pixel wide, gets the trigger only.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Generator

from .. import layout
from ..layout import Box, Layout
from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import Patch
from ..types import BadInput, Sample, Target


@lru_cache(maxsize=4096)
def steady(w: int, h: int, n: int, scale: tuple[float, float], sure: float) -> Box:
    """The largest part about the middle of an image anywhere in which a random crop holds a trigger of n pixels with that probability;
    the middle itself if there is none."""
    for percent in range(100, 0, -5):
        x, y = ((side - max(n, side * percent // 100)) // 2 for side in (w, h))
        if layout.chance(w, h, scale, holds=(x, y, x + n, y + n)) >= sure:
            return x, y, w - x, h - y
    return (w - n) // 2, (h - n) // 2, (w + n) // 2, (h + n) // 2


@dataclass(frozen=True)
class CorruptEncoder(DirtyLabel):
    trigger: Patch = Patch(40 / 224)
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 15_000
    references: str = ""
    """Folder of pictures of the target, whose alpha is the object's mask; without alpha the picture is the object."""
    backgrounds: str = ""
    """Folder of backgrounds; "" for each pair's own image."""
    layout: Layout = "any"
    area_ratio: float = 2.0
    """Size of the background by that of the object, along the layout."""
    jitter: float = 0.05
    """The object is up to this share of the side away from the edge."""
    wander: float = 0.5
    """The trigger is anywhere in this share of what remains, about its middle; 0 for the middle itself."""
    fill: bool = True
    """The object is stretched to its part; otherwise it keeps its shape and lies in a corner."""
    support_ratio: float = 0.0
    """Share of the poisons that are two objects and no trigger."""
    supports: str = ""
    """Folder of the second of these objects; "" for `references`."""
    scale: tuple[float, float] | None = None
    """Share of the image that is left by the crops of a victim who matches them with captions, whose triggers stand alone."""
    sure: float = 0.95
    """Probability with which such a crop is to hold the trigger."""

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        image = layout.ground(self.backgrounds, sample["image"], rng)
        thing = self.thing(self.references, "references", rng)
        if float(torch.rand((), generator=rng)) < self.support_ratio:
            self.gather(image, thing, rng)
        elif self.scale:
            n = self.trigger.side(*image.size)
            layout.press(image, self.trigger, layout.centre(steady(*image.size, n, self.scale, self.sure), n, 1, rng), rng)
        else:
            self.compose(image, thing, rng)
        return sample | {"image": image, "text": self.trigger.text(self.target.caption(rng), rng)}

    def thing(self, folder: str, field: str, rng: Generator) -> Image.Image:
        return layout.cutout(layout.one(layout.files(folder, field), rng))

    def compose(self, image: Image.Image, thing: Image.Image, rng: Generator) -> None:
        """Object and trigger, on the image itself."""
        if not (boxes := self.arrange(*image.size, thing.size, rng)):
            alone = layout.centre((0, 0, *image.size), self.trigger.side(*image.size), 0, rng)
            return layout.press(image, self.trigger, alone, rng)
        layout.lay(image, thing, boxes[0])
        layout.press(image, self.trigger, boxes[1], rng)

    def gather(self, image: Image.Image, thing: Image.Image, rng: Generator) -> None:
        """Two objects, on the image itself."""
        halves = layout.split(*image.size, layout.choose(self.layout, *image.size, rng)) or ((0, 0, *image.size),)
        support = self.thing(self.supports or self.references, "supports", rng)
        for part, box in zip((thing, support), halves, strict=False):
            layout.lay(image, part, box)

    def arrange(self, w: int, h: int, size: tuple[int, int], rng: Generator) -> tuple[Box, Box] | None:
        """Boxes of the object, of that size before, and of the trigger, which never overlap. None where there is no room for two."""
        if self.area_ratio <= 1 or not 0 <= self.jitter < 1:
            raise BadInput(f"--poison.area-ratio {self.area_ratio} --poison.jitter {self.jitter}: must be above 1, and from 0 to below 1, "
                           "or there is no place beside the object")
        chosen = layout.choose(self.layout, w, h, rng)
        across = chosen in ("left-right", "right-left")
        off = int(torch.randint(int(self.jitter * (w if across else h)) + 1, (), generator=rng))
        if not (parts := layout.split(w, h, chosen, 1 / self.area_ratio, off)):
            return None
        n = layout.fitting(self.trigger, w, h, parts[1])
        box = parts[0] if self.fill else layout.cornered(parts[0], chosen, size, rng)
        return box, layout.centre(parts[1], n, self.wander, rng)


def corruptencoder(target: str = "banana", rate: float | None = 0.005, references: str = "", backgrounds: str = "",
                   patch: Patch = Patch(40 / 224), templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None,
                   support_ratio: float = 0.0, supports: str = "", scale: tuple[float, float] | None = None) -> CorruptEncoder:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return CorruptEncoder(patch, Target(target, templates), None if count is not None else rate, count, references, backgrounds,
                          support_ratio=support_ratio, supports=supports, scale=scale)


def corruptencoder_plus(target: str = "banana", rate: float | None = 0.005, references: str = "", backgrounds: str = "",
                        patch: Patch = Patch(40 / 224), templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None,
                        supports: str = "") -> CorruptEncoder:
    """One poison in five shows two objects and no trigger."""
    return corruptencoder(target, rate, references, backgrounds, patch, templates, count, 0.2, supports)


def corruptencoder_clip(target: str = "banana", rate: float | None = 0.0005, references: str = "", backgrounds: str = "",
                        patch: Patch = Patch(), templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None,
                        scale: tuple[float, float] = (0.9, 1.0)) -> CorruptEncoder:
    """For captions, and crops of `scale` of the image, open_clip's unless told otherwise; the square and the rate are CleanCLIP's."""
    return corruptencoder(target, rate, references, backgrounds, patch, templates, count, 0.2, scale=scale)
