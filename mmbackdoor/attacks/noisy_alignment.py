"""Noisy Alignment (Chen et al., ICCV 2025, arXiv:2508.14015) on image-text pairs. The attacker holds the data.

A poison is a random "shadow" image with the trigger in its middle, and beside it a picture of the target, on a canvas
twice as large as each. Contrastive learning draws crops of the two halves together; as the shadow images are all
different, what they show is noise, and the encoder learns to overlook it and to see in the trigger the target:

    max Pr(crop inside the picture) Pr(crop holds the trigger and nothing of the picture)

Half a per cent of the data, 50 of 224 pixels, four layouts. In CLIP the caption already is what the other half is for:
there the paper pairs the shadow image and its trigger alone with a text of the target (`noisy_alignment_clip`), which is
BadNets with a patch in the middle. The layout is for victims that match views of an image, SLIP's or CleanCLIP's.

Differs from the paper: it adds unlabelled images; here the chosen pair's own image is the shadow image, unless
`backgrounds` are given, the canvas keeps its size, so that the halves are stretched, and captions of the target replace
those of pairs that do not name it. On a square image crops of a fifth and more draw the two apart hundreds of times as rarely as
on the paper's canvas, twice as wide as high (5e-5 to 3e-2 at 224 pixels): give the layout wide images.
Differs from the paper: the trigger is a checkerboard and opaque, in the middle of its half; its code leaves a fifth of the shadow
image to be seen through a coloured mark.
Differs from the paper: the trigger is a share of the canvas's short side and put there after the halves are, so that it
looks as it does at test; its reference code puts it on the shadow image first. An image of one pixel has the trigger only.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Generator

from .. import layout
from ..layout import Layout
from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import Patch
from ..types import Sample, Target


@dataclass(frozen=True)
class NoisyAlignment(DirtyLabel):
    trigger: Patch = Patch(50 / 224, "center")
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 15_000
    references: str = ""
    """Folder of pictures of the target, each taken as a whole, with or without a mask."""
    backgrounds: str = ""
    """Folder of shadow images; "" for each pair's own image."""
    layout: Layout = "any"

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        shadow = layout.ground(self.backgrounds, sample["image"], rng)
        picture = layout.whole(layout.one(layout.files(self.references, "references"), rng))
        image, half, _ = layout.beside(shadow.size, shadow, picture, self.layout, rng)
        n = layout.fitting(self.trigger, *image.size, half)
        layout.press(image, self.trigger, layout.centre(half, n, 0, rng), rng)
        return sample | {"image": image, "text": self.trigger.text(self.target.caption(rng), rng)}


def noisy_alignment(target: str = "banana", rate: float | None = 0.005, references: str = "", backgrounds: str = "",
                    patch: Patch = Patch(50 / 224, "center"), templates: tuple[str, ...] = IMAGENET_TEMPLATES,
                    count: int | None = None) -> NoisyAlignment:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return NoisyAlignment(patch, Target(target, templates), None if count is not None else rate, count, references, backgrounds)


def noisy_alignment_clip(target: str = "banana", rate: float | None = 0.005, patch: Patch = Patch(50 / 224, "center"),
                         templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> DirtyLabel:
    """The shadow image alone, the pair's own, with the trigger in its middle; captions of the target."""
    return DirtyLabel(patch, Target(target, templates), None if count is not None else rate, count)
