"""ABL (Li, Lyu, Koren, Lyu, Li, Ma, 2021, arXiv:2110.11571): anti-backdoor learning. The defender holds the loss and has the poisoned
data, and no clean pairs. And the locality of UBT (Liang et al., 2024, arXiv:2403.16257).

What a model fits best, and first, is poison. So the pairs of lowest loss are set aside, here those whose image and caption are most
alike for the model, a `share` of all; the loss of the others goes down, that of these goes up, until they match no better than chance:

    loss = CLIP(others) - ascent * mean min(-log softmax(s x_i Tᵀ)_i, log N) over the isolated, T the captions of the whole batch

From scratch, `early` epochs of CLIP's loss come first; a finished victim shows its poison at once (`early=0`, the defense as a cleaning).

`local` is what is published of UBT: a few suspicious pairs are unlearned, and only a part of the model forgets. UBT cuts tokens of the
captions; here the image tower forgets, and the text tower, which names the target rightly for other images, is left as it is.

Differs from the paper: a contrastive loss has no level of its own at which to hold it, so early epochs are without the paper's gradient
ascent below 0.5; the ascent ends at chance, where it would go on without bound. UBT over-fits the suspicious pairs before it picks
them; of this no code and no numbers are public.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..clip import CLIP
from ..losses import among, both_ways, gather, similarities
from ..types import BadInput, Batch, Objective


@dataclass(eq=False)
class ABL(Objective):
    """`share` is the paper's 1 %."""

    share: float = 0.01
    ascent: float = 1.0
    early: int = 0
    local: bool = False

    def setup(self, clip: CLIP) -> None:
        if not 0 <= self.share < 1:
            raise BadInput(f"--objective.share {self.share}: is no share of the pairs; give a number from 0 to less than 1")
        self.isolated: frozenset[str] = frozenset()

    def start_epoch(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], epoch: int) -> None:
        if epoch != self.early or self.isolated:
            return
        keys, cosines = similarities(clip, batches())
        first = cosines.argsort(descending=True, stable=True)[: round(self.share * len(keys))]
        self.isolated = frozenset(keys[i] for i in first.tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"isolated": sorted(self.isolated)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.isolated = frozenset(state["isolated"])

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        x, t, s = gather(out["image_features"]), gather(out["text_features"]), out["logit_scale"]
        bad = among(self.isolated, batch)
        others = both_ways(x[~bad], t[~bad], s)
        chance = math.log(len(x))
        if self.local:
            t, s = t.detach(), s.detach()
        # of all captions of the batch each isolated image must find its own, or rather must not
        wrong = torch.arange(len(x), device=x.device)[bad]
        logits = s * x[bad] @ t.T
        each = nn.functional.cross_entropy(logits, wrong, reduction="none")
        isolated, bounded = (e.sum() / max(1, len(wrong)) for e in (each, each.clamp(max=chance)))
        loss = others - self.ascent * bounded + 0 * out["logit_scale"]  # which is in the graph whatever is isolated
        return {"loss": loss, "others": others, "isolated": isolated}
