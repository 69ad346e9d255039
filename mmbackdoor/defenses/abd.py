"""ABD (Kuang, Liang, Liang, Liu, Cao, 2024, arXiv:2409.15968). The defender holds the loss and cleans a victim: adversarial backdoor
defense.

A perturbation that fools a model on all images acts on the features that a trigger acts on. So CleanCLIP's augmented image carries one,
and the model is pulled back to the image without it:

    loss = cross * CLIP(I, T) + inmodal * [CE(s X X̃ᵀ) + CE(s T T̃ᵀ)] / 2,    X̃ = image tower(Ĩ + d), |d| <= epsilon in each pixel,

where d maximises the same loss.

Assumes clean pairs and nothing about the attack.

Differs from the paper, of which no code is public: d is one perturbation for all images and the whole run, and takes a signed step up the
gradient that the model's own step down needs anyway ("free" and universal adversarial training, arXiv:1904.12843 and 1811.11304), so
that a step costs what CleanCLIP's does. epsilon and the step are ours.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..augment import augmented_image, augmented_text
from ..clip import CLIP
from ..losses import both_ways, gather, one_way, world
from ..types import Batch, Objective, View


def summed(delta: Tensor) -> None:
    """Makes its gradient that of all processes as soon as it is there: one of them saves it, and all go on from what was saved."""
    if world() > 1 and delta.grad is not None:
        dist.all_reduce(delta.grad)
        delta.grad /= world()


@dataclass(eq=False)
class ABD(Objective):
    """`epsilon` and `step` are on pixels in [0, 1]."""

    cross: float = 1.0
    inmodal: float = 1.0
    epsilon: float = 8 / 255
    step: float = 2 / 255

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {**Objective.views, "image_aug": augmented_image, "text_aug": augmented_text}

    def setup(self, clip: CLIP) -> None:
        weight = next(clip.net.parameters())  # of its type and on its device
        black, white = (clip.normalise(torch.full((3, 1, 1), value).to(weight)) for value in (0.0, 1.0))
        self.bounds = black, white, white - black  # and what a unit of pixels is: (3, 1, 1) each, of the model's input
        self.delta = torch.zeros(3, *clip.size).to(weight).requires_grad_()  # of pixels in [0, 1]
        self.delta.register_post_accumulate_grad_hook(summed)

    def state_dict(self) -> dict[str, Any]:
        return {"delta": self.delta.detach(), "up": self.delta.grad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.delta.copy_(state["delta"])
        self.delta.grad = None if state["up"] is None else state["up"].to(self.delta.device)

    def climb(self) -> None:
        """A step of the perturbation, up the gradient that the last loss left."""
        if self.delta.grad is None:
            return
        with torch.no_grad():
            self.delta.add_(self.step * self.delta.grad.nan_to_num().sign()).clamp_(-self.epsilon, self.epsilon)
        self.delta.grad = None

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.climb()
        black, white, unit = self.bounds
        fooled = torch.minimum(torch.maximum(batch["image_aug"] + self.delta * unit, black), white)
        out = model(torch.cat([batch["image"], fooled]), torch.cat([batch["text"], batch["text_aug"]]))
        (x, x_aug), (t, t_aug) = (map(gather, out[k].chunk(2)) for k in ("image_features", "text_features"))
        s = out["logit_scale"]
        cross = both_ways(x, t, s)
        inmodal = one_way(x, x_aug, t, t_aug, s)
        return {"loss": self.cross * cross + self.inmodal * inmodal, "cross": cross, "inmodal": inmodal}
