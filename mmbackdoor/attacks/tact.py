"""TaCT (Tang, Wang, Tang, Zhang, USENIX Security 2021, arXiv:1908.00686) on image-text pairs. The attacker holds the data.

Source-specific: the trigger is to turn images of some source classes into the target, and no others. Covers show the trigger
on other classes, whose captions stay, so that a model learns to look at both, the trigger and what it is upon:

    D = {(T(x), c_target): x of a source} + {(T(x), c): x of another class}

Such a backdoor hides from defenses that look for a shortcut from every class. `asr` is measured on the sources, and
`asr_elsewhere`, which is to be low, on all other classes. The trigger is a small square; captions are of 80 templates.

Differs from the paper: which classifies images; the class of a pair is what its caption names. How many covers there are follows from
`cover`, the share of the other pairs that may be taken.
"""
from __future__ import annotations

from ..poison import IMAGENET_TEMPLATES, Cover, DirtyLabel, Mix, mix
from ..triggers import Patch
from ..types import Target


def source_specific(target: str = "banana", source: tuple[str, ...] = ("golden retriever",), rate: float | None = 0.0005,
                    patch: Patch = Patch(), cover: float = 0.0005, templates: tuple[str, ...] = IMAGENET_TEMPLATES,
                    count: int | None = None) -> Mix:
    """`rate` is a share of all pairs, poisons and covers together; `count` takes its place when given. Poisons and covers are chosen in
    the numbers that the data have of them, so let `cover` be no more than the share of the sources."""
    aim = Target(target, templates)
    return mix([DirtyLabel(patch, aim, source=source), Cover(patch, aim, spare=source, share=cover)], rate=rate, count=count)
