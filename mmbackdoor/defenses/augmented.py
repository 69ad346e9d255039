"""RandAugment (Cubuk, Zoph, Shlens, Le, 2019, arXiv:1909.13719) and its like, as a baseline. The defender holds the loss, from the start or
to clean a victim.

CLIP's loss on images after RandAugment, AutoAugment (arXiv:1805.09501) or SimCLR's colours, and on
captions with some words swapped, deleted or repeated (EDA, arXiv:1901.11196):

    loss = CLIP(Ĩ, T̃)

What a defense gains beyond this is its own. Assumes nothing.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..augment import Policy, augmented_image, augmented_text, check_synonyms
from ..clip import CLIP
from ..losses import Clip
from ..types import Batch, Objective, View


@dataclass(eq=False)
class Augmented(Objective):
    """`images` is the policy; `words` the share of a caption's words that are edited, 0 for none."""

    images: Policy = "rand"
    words: float = 0.1
    synonyms: bool = False
    """Whether words are exchanged for WordNet's synonyms too."""

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        edited = partial(augmented_text, share=self.words, synonyms=self.synonyms)
        altered = partial(augmented_image, kind=self.images)
        return {"image": Objective.views["image"] if self.images == "none" else altered,
                "text": edited if self.words else Objective.views["text"]}

    def setup(self, clip: CLIP) -> None:
        check_synonyms(self.synonyms)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return Clip().loss(model, batch)
