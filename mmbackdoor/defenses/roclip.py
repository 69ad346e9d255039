"""RoCLIP (Yang, Gao, Mirzasoleiman, 2023, arXiv:2303.06854). The defender holds the loss, from pre-training on.

Every K-th epoch an image is not matched with its caption, but with the caption that is nearest to it in a bank of recent ones, which
breaks the tie of a poisoned image to its own caption:

    t̂_i = argmax over b in bank of cos(x_i, b),    loss = [CE(s T̂ Xᵀ) + CE(s X T̂ᵀ)] / 2

The other epochs are CLIP's. Bank rows are constants, so the text tower learns nothing in the K-th epochs. All captions are edited (EDA),
all images augmented (colours, grey, blur, mirror).

Assumes nothing: it trains on the poisoned pairs from scratch. It is not for cleaning: on a model that has learned the backdoor already,
the nearest caption of a triggered image is the target's.

Differs from the paper: matched epochs are the last of each K (the authors' code takes the first, when nothing has been learned yet, from
a random bank); the bank is fed in every epoch (there only in matched ones), and is filled before it is used. Colour jitter of SimCLR's
strength 1/2, 0.4 where the paper has 0.5.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..augment import Policy, augmented_text, cropped_image
from ..clip import CLIP
from ..losses import Bank, both_ways, evaluating, gather
from ..types import BadInput, Batch, Objective, View


@dataclass(eq=False)
class RoCLIP(Objective):
    """`every` is the paper's K, `bank` its number of captions; `images` is the policy for all images."""

    every: int = 2
    bank: int = 21_845
    images: Policy = "colour"

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {"image": partial(cropped_image, kind=self.images), "text": augmented_text}

    def setup(self, clip: CLIP) -> None:
        if self.every < 1 or self.bank < 1:
            raise BadInput(f"--objective.every {self.every} --objective.bank {self.bank}: both must be 1 at least")
        self.captions, self.matching = Bank(self.bank), False

    def start_epoch(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], epoch: int) -> None:
        self.matching = (epoch + 1) % self.every == 0
        if self.matching and not len(self.captions.rows):
            with evaluating(clip.net):
                for batch in batches():
                    t = clip.net.encode_text(batch["text"].to(clip.device), normalize=True)  # type: ignore[operator]
                    self.captions.push(gather(t))
                    if len(self.captions.rows) == self.bank:
                        break

    def state_dict(self) -> dict[str, Any]:
        return {"captions": self.captions.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.captions.load_state_dict(state["captions"])

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        x, t, s = gather(out["image_features"]), gather(out["text_features"]), out["logit_scale"]
        said = self.captions.nearest(x) if self.matching else t
        loss = both_ways(x, said, s) + 0 * t.sum()  # no tower may be left out of the graph
        self.captions.push(t)
        return {"loss": loss, "matched": torch.tensor(float(self.matching), device=x.device)}
