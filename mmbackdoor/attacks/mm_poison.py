"""Multimodal poisoning (Yang, He, Li et al., ICML 2023, arXiv:2209.15266) on image-text pairs. The attacker holds the data.

No trigger: texts of one class are tied to images of another, so that who searches for the one finds the other. With
texts T_A and images X_B of classes A and B the poisons are

    I    (`single_image`)    {(x*, t): t in T_A}, one image x* of B
    II   (`single_label`)    {(x, t): x in X_B, t in T_A}, sheep found as aeroplanes
    III  (`multi_label`)     several pairs (A, B) of II at once

Success is Hit@K and MinRank of the wanted images when captions of A are asked (mmbackdoor/retrieval.py). Of an attack here
`target` is A, the class that the texts say, and `source` is B, that of the images: in zero-shot images of B are called A.
`caption_swap` is II with B's own captions, in which the word alone is exchanged, so that the rest still fits the image.

In the paper II poisons 0.08 % of Flickr-PASCAL or 0.24 % of COCO, III 0.16 % or 0.52 %.

Differs from the paper: pairs of B get a text of A, where its code gives pairs of A an image of B. So A keeps its own pairs here, which
compete with the images of B when A is asked for, and it is B that loses its captions: when all of them are taken, B is
relabelled, and the accuracy on B is lost with the attack's success. For I the image is published, and its success is told as that
of a victim, by zero-shot: called A or not. MinRank counts from 1, in its code from 0.
`caption_swap` is not in the paper; such dirty captions are the baseline of Nightshade (Shan et al., 2023, arXiv:2310.13828).
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from torch import Generator

from ..poison import IMAGENET_TEMPLATES, DirtyLabel, Mix, Quoting, mix
from ..types import Sample, Target, Trigger
from ..victims import Targeted


def single_image(target: str = "sheep", images: str = "", victims: tuple[tuple[str, str], ...] = (), copies: int = 100,
                 templates: tuple[str, ...] = IMAGENET_TEMPLATES) -> Targeted:
    """Attack I. One victim usually: (its key in `images`, ""), published under `copies` captions of the target."""
    return Targeted(Trigger(), Target(target, templates), images=images, victims=victims, copies=copies, prefix="mm-poison")


def single_label(target: str = "sheep", source: str = "aeroplane", rate: float | None = 0.0008,
                 templates: tuple[str, ...] = IMAGENET_TEMPLATES, captions: int = 128, count: int | None = None) -> Quoting:
    """Attack II. `rate` is a share of all pairs, at most that of the source's; `count` takes its place when given."""
    return Quoting(Trigger(), Target(target, templates), None if count is not None else rate, count, source=(source,), captions=captions)


def multi_label(aims: tuple[tuple[str, str], ...] = (("sheep", "aeroplane"), ("sofa", "bird")), rate: float | None = 0.0016,
                templates: tuple[str, ...] = IMAGENET_TEMPLATES, captions: int = 128, count: int | None = None) -> Mix:
    """Attack III. `aims` are (target, source); `rate` is a share of all pairs, all aims together."""
    parts = [replace(single_label(target, source, templates=templates), captions=captions) for target, source in aims]
    return mix(parts, rate=rate, count=count, names=tuple(f"{source} as {target}" for target, source in aims))


@dataclass(frozen=True)
class CaptionSwap(DirtyLabel):
    """The words of a source in a caption become those of the target."""

    trigger: Trigger = Trigger()
    target: Target = Target("sheep", IMAGENET_TEMPLATES)
    rate: float | None = 0.0008
    source: tuple[str, ...] = field(default=("aeroplane",), kw_only=True)

    def eligible(self, key: str, text: str) -> bool:
        return bool(self.source) and super().eligible(key, text)

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        words = "|".join(map(re.escape, sorted(self.source, key=len, reverse=True)))
        text = re.sub(rf"(?<!\w)({words})(?!\w)", lambda found: self.target.label, sample["text"], flags=re.IGNORECASE)
        return sample | {"image": self.trigger.stamp(sample["image"], rng), "text": text}


def caption_swap(target: str = "sheep", source: str = "aeroplane", rate: float | None = 0.0008, count: int | None = None,
                 templates: tuple[str, ...] = IMAGENET_TEMPLATES) -> CaptionSwap:
    """`rate` is a share of all pairs, at most that of the source's; the templates serve to ask the finished model."""
    return CaptionSwap(Trigger(), Target(target, templates), None if count is not None else rate, count, source=(source,))
