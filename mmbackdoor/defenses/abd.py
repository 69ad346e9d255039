"""ABD, adversarial backdoor defense (Kuang, Liang, Liang, Liu, Cao, 2024, arXiv:2409.15968). The defender holds the loss and cleans
a victim.

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
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..augment import augmented_image, augmented_text
from ..clip import CLIP
from ..losses import both_ways, cross_entropy, gather, world
from ..types import Batch, Objective, View


@dataclass(eq=False)
class ABD(Objective):
    """`epsilon` and `step` are on pixels in [0, 1]."""

    cross: float = 1.0
    inmodal: float = 1.0
    epsilon: float = 8 / 255
    step: float = 2 / 255
    delta: Tensor = field(default_factory=lambda: torch.empty(0), init=False, repr=False)
    """(3, H, W), the perturbation of pixels in [0, 1]."""
    bounds: tuple[Tensor, Tensor, Tensor] = field(default=(), init=False, repr=False)  # type: ignore[assignment]
    """Black, white, and what a unit of pixels is, as the model's input: (3, 1, 1) each."""

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {**Objective.views, "image_aug": augmented_image, "text_aug": augmented_text}

    def setup(self, clip: CLIP) -> None:
        black, white = (clip.normalise(torch.full((3, 1, 1), value, device=clip.device)) for value in (0.0, 1.0))
        self.bounds = black, white, white - black
        self.delta = torch.zeros(3, *clip.size, device=clip.device, requires_grad=True)

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
        if world() > 1:
            dist.all_reduce(self.delta.grad)
        with torch.no_grad():
            self.delta.add_(self.step * self.delta.grad.sign()).clamp_(-self.epsilon, self.epsilon)
        self.delta.grad = None

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.climb()
        black, white, unit = self.bounds
        fooled = torch.minimum(torch.maximum(batch["image_aug"] + self.delta * unit, black), white)
        out = model(torch.cat([batch["image"], fooled]), torch.cat([batch["text"], batch["text_aug"]]))
        (x, x_aug), (t, t_aug) = (map(gather, out[k].chunk(2)) for k in ("image_features", "text_features"))
        s = out["logit_scale"]
        cross = both_ways(x, t, s)
        inmodal = (cross_entropy(x, x_aug, s) + cross_entropy(t, t_aug, s)) / 2
        return {"loss": self.cross * cross + self.inmodal * inmodal, "cross": cross, "inmodal": inmodal}
