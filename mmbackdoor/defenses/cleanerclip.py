"""CleanerCLIP (Xun, Liang, Jia, Liu, Cao, 2024, arXiv:2409.17601), also TA-Cleaner. The defender holds the loss and cleans a victim.

CleanCLIP's augmented captions leave whole sentences tied to images. Here each image must also find a part of its caption among parts
of the others', which ties it to words:

    loss = CleanCLIP(I, T) + sub * CLIP(I, T⁺),    T⁺ a run of words of the caption, half of it by default; the others' are the negatives

Assumes clean pairs and nothing about the attack.

Differs from the paper, of which the abstract is public and no code: there a few pairs a round get generated positive and negative parts;
here all do, by cutting, and the negatives are the other pairs' parts.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..augment import augmented_image, augmented_text
from ..clip import CLIP
from ..losses import both_ways, gather, one_way
from ..types import Batch, Objective, Sample, View


def part_of(text: str, rng: Generator, share: float) -> str:
    """A run of `share` of the words, one at least."""
    words = text.split()
    n = max(1, round(share * len(words)))
    first = int(torch.randint(max(1, len(words) - n + 1), (), generator=rng))
    return " ".join(words[first : first + n])


def part_view(clip: CLIP, sample: Sample, rng: Generator, share: float) -> Any:
    return clip.tokenize(part_of(sample["text"], rng, share))


@dataclass(eq=False)
class CleanerCLIP(Objective):
    """`sub` weighs the parts of captions, which have a `share` of their words."""

    cross: float = 1.0
    inmodal: float = 1.0
    sub: float = 1.0
    share: float = 0.5

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {**Objective.views, "image_aug": augmented_image, "text_aug": augmented_text, "part": partial(part_view, share=self.share)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(torch.cat([batch["image"], batch["image_aug"]]), torch.cat([batch["text"], batch["text_aug"], batch["part"]]))
        x, x_aug = map(gather, out["image_features"].chunk(2))
        t, t_aug, part = map(gather, out["text_features"].chunk(3))
        s = out["logit_scale"]
        cross, sub = both_ways(x, t, s), both_ways(x, part, s)
        inmodal = one_way(x, x_aug, t, t_aug, s)
        return {"loss": self.cross * cross + self.inmodal * inmodal + self.sub * sub, "cross": cross, "inmodal": inmodal, "sub": sub}
