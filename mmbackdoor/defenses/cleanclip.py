"""CleanCLIP (Bansal, Singhi, Yang, Yin, Grover, Chang, 2023, arXiv:2303.03323). The defender holds the loss.

Fine-tunes a poisoned model on clean pairs. Beside CLIP's loss each modality is contrasted with its own augmented view,
which pulls image and text apart where only the trigger joined them:

    loss = cross * CLIP(I, T) + inmodal * [CE(s I Ĩᵀ) + CE(s T T̃ᵀ)] / 2,    s CLIP's own temperature

Assumes clean pairs (100,000 in the paper) and nothing about the attack. The in-modality terms go one way, from the
original to the augmented view, and share the learnable temperature, as in the authors' code; `symmetric` takes both
ways. Images: AutoAugment (ImageNet policy). Texts: one of swap, delete or repeat words, or put in synonyms.

Differs from the paper: synonyms need WordNet and are off by default; the augmented text is drawn anew each epoch, not
once.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..augment import augmented_image, augmented_text, check_synonyms
from ..clip import CLIP
from ..losses import both_ways, gather, one_way
from ..types import Batch, Objective, View


@dataclass(eq=False)
class CleanCLIP(Objective):
    """`cross` and `inmodal` are the paper's lambda 1 and lambda 2."""

    cross: float = 1.0
    inmodal: float = 1.0
    symmetric: bool = False
    synonyms: bool = False
    """Whether captions are augmented by WordNet's synonyms too."""

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {**Objective.views, "image_aug": augmented_image, "text_aug": partial(augmented_text, synonyms=self.synonyms)}

    def setup(self, clip: CLIP) -> None:
        check_synonyms(self.synonyms)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(torch.cat([batch["image"], batch["image_aug"]]), torch.cat([batch["text"], batch["text_aug"]]))
        (x, x_aug), (t, t_aug), s = out["image_features"].chunk(2), out["text_features"].chunk(2), out["logit_scale"]
        x, x_aug, t, t_aug = gather(x), gather(x_aug), gather(t), gather(t_aug)
        cross = both_ways(x, t, s)
        inmodal = (both_ways(x, x_aug, s) + both_ways(t, t_aug, s)) / 2 if self.symmetric else one_way(x, x_aug, t, t_aug, s)
        return {"loss": self.cross * cross + self.inmodal * inmodal, "cross": cross, "inmodal": inmodal}
