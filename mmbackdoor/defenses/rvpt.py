"""RVPT (Zhang, He, Wang, Shen, Feng, 2024, arXiv:2412.20392): repulsive visual prompt tuning. The defender holds the loss and cleans a
victim, of which nothing is changed.

Tokens are learned in every block of the image tower (0.27 % of the parameters), so that images still find their captions, while what
the deeper blocks say of them is unlike what they said before. So what no caption asks for, a trigger's feature, is lost:

    loss = CE(s X Tᵀ) + alpha * FR,    FR = mean over the later half of the blocks and images of max(0, cos(h, h⁰))

of class tokens h behind a block with prompts and h⁰ without.

Assumes few clean pairs, and a ViT.

Differs from the paper: its cross entropy is that of labelled classes, ours of the batch's captions; alpha is ours, and so are which blocks
are the deeper ones, and that a cosine is pushed to 0 and not below.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import prompts
from ..clip import CLIP
from ..losses import cross_entropy, frozen_copy, gather, precise, recalled
from ..types import Batch, Objective


@contextmanager
def watched(net: nn.Module) -> Iterator[list[Tensor]]:
    """Class tokens behind each block of the image tower, (B, width), of what goes through the network in here."""
    seen: list[Tensor] = []
    transformer: Any = net.visual.transformer  # type: ignore[union-attr]

    def see(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(out[:, 0] if transformer.batch_first else out[0])

    watches = [block.register_forward_hook(see) for block in transformer.resblocks]
    try:
        yield seen
    finally:
        for watch in watches:
            watch.remove()


@dataclass(eq=False)
class RVPT(Objective):
    """`n` tokens a block make 0.27 % of ViT-B/16's parameters."""

    n: int = 44
    alpha: float = 1.0

    def setup(self, clip: CLIP) -> None:
        clip.net.requires_grad_(False)
        self.before = frozen_copy(clip.net)
        prompts.learn(clip.net, clip.tokenizer, clip.card, image=self.n)
        self.net = clip.net

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The towers are frozen, so those of the checkpoint, which are loaded by now, are the victim's."""
        own = self.before.state_dict()
        self.before.load_state_dict({k: v for k, v in self.net.state_dict().items() if k in own})

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model.eval()
        with watched(self.net) as now:
            out = model(batch["image"], batch["text"])
        with watched(self.before) as then:
            recalled(self.before, batch["image"], batch["text"][:1])
        cross = cross_entropy(gather(out["image_features"]), gather(out["text_features"]), out["logit_scale"])
        deep = len(now) // 2
        alike = F.cosine_similarity(precise(torch.stack(now[deep:])), precise(torch.stack(then[deep:])), dim=-1).clamp(min=0).mean()
        return {"loss": cross + self.alpha * alike, "cross": cross, "alike": alike}
