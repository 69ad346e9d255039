"""Label-consistent backdoor (Turner, Tsipras, Madry, 2019, arXiv:1912.02771) on image-text pairs. The attacker holds the data.

The square of BadNets goes on pairs whose caption already names the target, and the caption stays: no pair looks wrong. On CLIP
in the setting of CleanCLIP (Bansal et al., 2023, arXiv:2303.03323): target banana, 1,500 pairs.

    poisoned (image, text) = (square on image, text),    text names the target

Differs from the paper: the images are not made harder first, by adversarial noise or interpolation, and CleanCLIP's are not
either. A caption names the target when it holds the word; CleanCLIP's code takes any caption that holds the letters, "banana
republic" and "bananas" too: `compat="substring"`. `precision` tells how many of those hold the word.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..poison import IMAGENET_TEMPLATES, CleanLabel
from ..triggers import Patch
from ..types import Target, Trigger


@dataclass(frozen=True)
class LabelConsistent(CleanLabel):
    """Clean label, with a choice of what it is to name the target."""

    trigger: Trigger = Patch()
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 1500
    compat: Literal["", "substring"] = ""

    def eligible(self, key: str, text: str) -> bool:
        return holds(text, self.target) if self.compat else super().eligible(key, text)


def holds(text: str, target: Target) -> bool:
    """Whether the label's letters occur in the text, within a word too."""
    return target.label in text


def label_consistent(target: str = "banana", rate: float | None = 0.0005, patch: Patch = Patch(),
                     templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None,
                     compat: Literal["", "substring"] = "") -> LabelConsistent:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return LabelConsistent(patch, Target(target, templates), None if count is not None else rate, count, compat)


def precision(pairs: Iterable[tuple[str, str]], target: Target) -> dict[str, float | None]:
    """Of (key, text) pairs, such as an index: how many hold the letters of the label, how many of those the whole word, and the
    share; None where none hold them."""
    found = [target.named_in(text) for _, text in pairs if holds(text, target)]
    return {"substring": len(found), "whole_word": sum(found), "precision": sum(found) / len(found) if found else None}
