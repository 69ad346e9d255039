"""PAR (Singh, Croce, Hein, 2024, arXiv:2412.00727): perturb and recover. The defender holds the loss and cleans a victim.

Fine-tuning on clean pairs, and a push away from the poisoned model's embeddings, until they are `tau` away:

    loss = CLIP(I, T) - (D(X) [D(X) <= tau] + D(T) [D(T) <= tau]) / 2,    D(X) = mean |x_i - x⁰_i|²

of unit rows x of the model in training and x⁰ of the model as it was. Above tau the term and its gradient vanish, and what is left
recovers accuracy. No augmentation beside CLIP's own.

Assumes clean pairs (250,000 of CC3M in the paper; synthetic ones do too) and nothing about the attack.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..clip import CLIP
from ..losses import both_ways, frozen_copy, gather, recalled
from ..types import Batch, Objective


@dataclass(eq=False)
class PAR(Objective):
    """`tau` is the paper's for OpenAI's RN50; `push` weighs the distances."""

    tau: float = 2.15
    push: float = 0.5

    def setup(self, clip: CLIP) -> None:
        self.before = frozen_copy(clip.net)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before.load_state_dict(state["before"])

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        was = recalled(self.before, batch["image"], batch["text"])
        x, t, x0, t0 = (gather(o[k]) for o in (out, was) for k in ("image_features", "text_features"))
        cross = both_ways(x, t, out["logit_scale"])
        far = {"image": (x - x0).square().sum(1).mean(), "text": (t - t0).square().sum(1).mean()}
        push = sum(d * (d.detach() <= self.tau) for d in far.values())
        return {"loss": cross - self.push * push, "cross": cross} | {f"distance_{k}": d for k, d in far.items()}
