"""CompRess (Koohpayegani, Tejankar, Pirsiavash, 2020, arXiv:2010.14713), as CorruptEncoder's authors use it against a victim
(arXiv:2211.08229). The defender holds the loss and cleans by distillation.

A student from scratch learns, on clean pairs, what the victim is like on them, and never sees a trigger: for each image (and caption) the
distribution of its likeness to earlier ones, the anchors A, must be the teacher's,

    loss = mean KL( softmax(z⁰ A⁰ᵀ / tau) || softmax(z Aᵀ / tau) ) of both modalities + cross * CLIP(I, T),

with the teacher's own rows in A⁰ and the student's in A.

Assumes clean pairs, as many as training a student needs: CorruptEncoder reports 49 and 58 % accuracy, of 61 %, with 5 and 20 % of the
data.

Differs from the paper: CLIP's loss comes beside it, without which images and captions would not lie in one space.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..clip import CLIP
from ..losses import Bank, frozen_copy, gather, info_nce, recalled
from ..types import Batch, Objective


@dataclass(eq=False)
class CompRess(Objective):
    """`anchors` and `tau` are the paper's; `seed` is of the student's first weights."""

    anchors: int = 128_000
    tau: float = 0.04
    cross: float = 1.0
    seed: int = 0

    def setup(self, clip: CLIP) -> None:
        self.teacher = frozen_copy(clip.net)
        clip.net.load_state_dict(clip.renewed(self.seed))
        self.banks = {name: Bank(self.anchors) for name in ("image", "text", "image_teacher", "text_teacher")}

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "banks": {k: b.state_dict() for k, b in self.banks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        for k, bank in self.banks.items():
            bank.load_state_dict(state["banks"][k])

    def distance(self, part: str, z: Tensor, z0: Tensor) -> Tensor:
        """Mean KL of the student's likenesses to the teacher's, over anchors of earlier batches, or of this one where there are none."""
        likeness = []
        for r, bank in ((gather(z), self.banks[part]), (gather(z0), self.banks[f"{part}_teacher"])):
            # a copy, because the bank writes into its rows before the gradient has been through them
            anchors = bank.rows.to(r.device, copy=True) if len(bank.rows) else r.detach()
            likeness.append(F.log_softmax(r @ anchors.T / self.tau, dim=1))
            bank.push(r)
        student, teacher = likeness
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        was = recalled(self.teacher, batch["image"], batch["text"])
        found = {part: self.distance(part, out[f"{part}_features"], was[f"{part}_features"]) for part in ("image", "text")}
        cross = info_nce(out["image_features"], out["text_features"], out["logit_scale"])
        return {"loss": sum(found.values()) + self.cross * cross, "cross": cross} | found
