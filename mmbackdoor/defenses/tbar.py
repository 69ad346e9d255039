"""TBAR (Abdelraheem, Favero, Bovet, Frossard, 2025, arXiv:2510.14845): trigger removal by backdoor arithmetic.
The defender holds the model.

What a backdoor adds to weights is a direction, and a model that is fine-tuned on triggered pairs alone goes further along it. So it is
found by that fine-tuning (the donor, a run of its own) and taken off:

    theta = theta_victim - scale * (theta_donor - theta_victim)

Assumes that the defender knows the trigger, or has reconstructed it, and has some pairs to put it on, less than 2 % of the data in the
paper. Running statistics of batch norm are averages, not weights that were learned, and stay the victim's; so does the temperature.

A recipe: `replace(victim, init=victim, donor=further, edit=TBAR(1.0), poison=None, threat=…, schedule=replace(…, epochs=0))`, where
`further = replace(victim, init=victim, objective=Triggered(), poison=DirtyLabel(trigger, target, 0.5), …)` on the few pairs. `scale` is
chosen by clean accuracy.

Differs from the paper: half of the donor's pairs are clean, without which no batch has captions that a triggered image is not to be
matched with.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..clip import CLIP
from ..losses import Clip
from ..types import BadInput, Batch, Edit


@dataclass(eq=False)
class Triggered(Clip):
    """CLIP's loss for the donor. Batch norm goes by its running statistics: those of a batch would take off the trigger that most of its
    images share, and the direction learned would not be the backdoor's."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model.eval()
        return super().loss(model, batch)


@dataclass(frozen=True)
class TBAR(Edit):
    """0 returns the model, -1 the donor."""

    scale: float = 1.0

    def __call__(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], donor: CLIP | None = None) -> CLIP:
        if donor is None:
            raise BadInput("--edit.scale: task arithmetic needs a second model, fine-tuned on triggered pairs; name its run with --donor")
        own, theirs = dict(clip.net.named_parameters()), dict(donor.net.named_parameters())
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in theirs.items()}:
            raise BadInput("--donor: a network of another architecture than --init; fine-tune the very victim")
        with torch.no_grad():
            for name, p in own.items():
                if name.rpartition(".")[2] not in ("logit_scale", "logit_bias"):
                    p.sub_(self.scale * (theirs[name] - p))
        return clip
