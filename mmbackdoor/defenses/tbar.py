"""TBAR (Abdelraheem, Favero, Bovet, Frossard, 2025, arXiv:2510.14845): trigger removal by backdoor arithmetic.
The defender holds the model.

What a backdoor adds to weights is a direction, and a model that is fine-tuned on triggered pairs alone goes further along it. So it is
found by that fine-tuning (the donor, a run of its own) and taken off:

    theta = theta_victim - scale * (theta_donor - theta_victim)

Assumes that the defender knows the trigger, or has reconstructed it, and has some pairs to put it on, less than 2 % of the data in the
paper. Running statistics of batch norm are averages, not weights that were learned, and stay the victim's; so does the temperature.

A recipe: `replace(victim, init=victim, donor=overfit, edit=TBAR(1.0), poison=None, threat=…, schedule=replace(…, epochs=0))`, where
`overfit = replace(victim, init=victim, poison=DirtyLabel(trigger, target, 0.9), …)` on the few pairs, of which some name the target and
stay. `scale` is chosen by clean accuracy.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..clip import CLIP
from ..types import BadInput, Batch, Edit


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
