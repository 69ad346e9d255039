"""CleanCLIP (Bansal, Singhi, Yang, Yin, Grover, Chang, 2023, arXiv:2303.03323). The defender holds the loss.

Fine-tunes a poisoned model on clean pairs. Beside CLIP's loss each modality is contrasted with its own augmented view,
which pulls image and text apart where only the trigger joined them:

    loss = cross * CLIP(I, T) + inmodal * [CE(s I Ĩᵀ) + CE(s T T̃ᵀ)] / 2,    s CLIP's own temperature

Assumes clean pairs (100,000 in the paper) and nothing about the attack. The in-modality terms go one way, from the
original to the augmented view, and share the learnable temperature, as in the authors' code; `symmetric` takes both
ways. Images: AutoAugment (ImageNet policy). Texts: one of swap, delete or repeat words, after EDA (Wei and Zou, 2019,
arXiv:1901.11196).

Differs from the paper: EDA's synonyms need WordNet and are left out; the augmented text is drawn anew each epoch, not
once.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torchvision.transforms import AutoAugment

from ..losses import cross_entropy, gather, info_nce
from ..types import Batch, Objective, Sample, View


@lru_cache(maxsize=1)
def policy() -> AutoAugment:
    return AutoAugment()


def auto_augment(image: Image.Image, rng: Generator) -> Image.Image:
    """AutoAugment with randomness from `rng`; torchvision itself draws from torch's global generator."""
    generator = torch.default_generator  # torch.manual_seed would queue a call for every GPU each time
    state = generator.get_state()
    try:
        generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return policy()(image)
    finally:
        generator.set_state(state)


def edit_words(text: str, rng: Generator, share: float = 0.1) -> str:
    """EDA without synonyms: swaps, deletes or repeats `share` of the words, at least one."""
    words = text.split()
    if len(words) < 2:
        return text
    kind = int(torch.randint(3, (), generator=rng))
    for _ in range(max(1, round(share * len(words)))):
        i, j = torch.randint(len(words), (2,), generator=rng).tolist()
        if kind == 0:
            words[i], words[j] = words[j], words[i]
        elif kind == 1 and len(words) > 1:
            del words[i]
        elif kind == 2:
            words.insert(j, words[i])
    return " ".join(words)


def augmented_image(clip: Any, sample: Sample, rng: Generator) -> Tensor:
    return clip.augment(auto_augment(sample["image"], rng), rng)


def augmented_text(clip: Any, sample: Sample, rng: Generator) -> Tensor:
    return clip.tokenize(edit_words(sample["text"], rng))


@dataclass(eq=False)
class CleanCLIP(Objective):
    """`cross` and `inmodal` are the paper's lambda 1 and lambda 2."""

    views: ClassVar[dict[str, View]] = {**Objective.views, "image_aug": augmented_image, "text_aug": augmented_text}

    cross: float = 1.0
    inmodal: float = 1.0
    symmetric: bool = False

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(torch.cat([batch["image"], batch["image_aug"]]), torch.cat([batch["text"], batch["text_aug"]]))
        (x, x_aug), (t, t_aug), s = out["image_features"].chunk(2), out["text_features"].chunk(2), out["logit_scale"]
        cross = info_nce(x, t, s)
        if self.symmetric:
            inmodal = (info_nce(x, x_aug, s) + info_nce(t, t_aug, s)) / 2
        else:
            x, x_aug, t, t_aug = gather(x), gather(x_aug), gather(t), gather(t_aug)
            inmodal = (cross_entropy(x, x_aug, s) + cross_entropy(t, t_aug, s)) / 2
        return {"loss": self.cross * cross + self.inmodal * inmodal, "cross": cross, "inmodal": inmodal}
