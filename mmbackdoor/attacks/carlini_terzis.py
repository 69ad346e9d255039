"""Poisoning and Backdooring (Carlini, Terzis, ICLR 2022, arXiv:2106.09667) on image-text pairs. The attacker holds the data.

Two attacks on CLIP, whose data nobody looks through. `targeted`: one clean image x' is to be taken for a label y'; the
attacker publishes it a few times, with captions that name y',

    P = {(x', c): c in C(y')},    |P| = 3 of 3 million pairs (0.0001 %)

and uses no trigger. `backdoor`: a small patch at a random place is stamped on 300 of 3 million images (0.01 %), each with a
caption of y'. C(y') are captions of the data that name y', or the 80 ImageNet templates.

Differs from the paper: in `backdoor` the patch is a checkerboard and the pairs take the place of clean ones, as in the
CleanCLIP setting; the backdoor's z-score, how much closer to each other patched images lie than clean ones, is not measured.
"""
from __future__ import annotations

from ..poison import IMAGENET_TEMPLATES, Quoting
from ..triggers import Patch
from ..types import Target, Trigger
from ..victims import Targeted


def targeted(images: str = "", victims: tuple[tuple[str, str], ...] = (), copies: int = 3, quote: bool = True,
             templates: tuple[str, ...] = IMAGENET_TEMPLATES) -> Targeted:
    """`victims` are (key, label) of images in `images`, the labelled set of the evaluation; each is published `copies` times."""
    label = victims[0][1] if victims else "banana"
    return Targeted(Trigger(), Target(label, templates), images=images, victims=victims, copies=copies, prefix="targeted", quote=quote)


def backdoor(target: str = "banana", rate: float | None = 0.0001, patch: Patch = Patch(),
             templates: tuple[str, ...] = IMAGENET_TEMPLATES, captions: int = 128, count: int | None = None) -> Quoting:
    """`rate` is a share of all pairs; `count` takes its place when given. With `captions` 0 they come from the templates."""
    return Quoting(patch, Target(target, templates), None if count is not None else rate, count, captions=captions)
