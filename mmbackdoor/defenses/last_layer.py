"""Last-layer retraining (Kirichenko, Izmailov, Wilson, 2022, arXiv:2204.02937), on CLIP. The defender holds the loss and cleans a victim:
both towers stay, their projections are new.

Features of the towers are frozen, and CLIP's loss on clean pairs teaches the two last linear layers, which
map them to the shared space, anew (`reset`) or from where the victim left them:

    loss = CLIP(W I, V T), over W, V and the temperature alone

The cheapest cleaning there is, and the one to show where a backdoor sits: what survives is in the features.

Assumes clean pairs, few of them. A linear probe on labels, with the text tower left out, is `eval.py --probe`.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import keyed
from ..clip import CLIP
from ..losses import Clip
from ..types import BadInput, Batch, Objective


@dataclass(eq=False)
class LastLayer(Objective):
    """`reset` draws new projections with the deviation of the old; biases stay."""

    LAST: ClassVar[str] = (r"(visual\.)?(proj|attnpool\.c_proj|head\.proj)(\.weight|\.bias)?|(text\.)?text_projection(\.weight|\.bias)?"
                           r"|text\.proj(\.weight|\.bias)?|clip\.(visual|text)_projection\.weight|clip\.text_model\.head\.(weight|bias)"
                           r"|(clip\.)?logit_scale")
    reset: bool = True

    def setup(self, clip: CLIP) -> None:
        last = {name: p for name, p in clip.net.named_parameters() if re.fullmatch(self.LAST, name)}
        if sum(p.ndim == 2 for p in last.values()) < 2:
            raise BadInput(f"{type(clip.net).__name__}: of its towers one at most ends in a linear layer ({', '.join(last) or 'none'}); "
                           "use a network of which both do, a CLIP of open_clip or of Hugging Face")
        clip.net.requires_grad_(False)
        for name, p in last.items():
            p.requires_grad_(True)
            if self.reset and p.ndim == 2:
                with torch.no_grad(), keyed.drawing_from(keyed.rng(0, "last layer", name)):
                    p.copy_(torch.randn(p.shape) * float(p.std()))

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model.eval()  # what is frozen keeps its statistics too
        return Clip().loss(model, batch)
