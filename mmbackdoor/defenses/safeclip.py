"""SafeCLIP (Yang, Gao, Mirzasoleiman, 2023, arXiv:2310.05862). The defender holds the loss, from pre-training on.

Three phases. `warmup` epochs teach each modality by itself, so that no caption is tied to an image: a view must find, among the
augmented views of its kind, that of the row whose neighbour in a bank it is,

    unimodal = [CE(s N(X) X̃ᵀ) + CE(s N(T) T̃ᵀ)] / 2,    N(·) the nearest row of a bank of recent ones.

`slow` epochs of CLIP's loss at a hundredth of the learning rate, in which poisoned pairs do not come together yet. Then, before each
epoch, a mixture of two Gaussians is fitted to the cosines of image and caption. The first time, pairs that belong to the upper one with
more than 90 % are safe; afterwards a share that grows by 1 % an epoch, up to 85 %, in order of that probability. CLIP's loss for the
safe, each side against the augmented view of the other, and the unimodal one for the rest:

    loss = [CE(s X T̃ᵀ) + CE(s T X̃ᵀ)] / 2 over the safe + unimodal over the others.

Assumes nothing but that most pairs are clean: it trains on the poisoned pairs from scratch.

Differs from the paper: safe and other pairs come in one batch, each loss over its own rows, where the authors' code draws batches of
either kind; captions are edited anew each epoch.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from ..augment import Policy, augmented_image, augmented_text
from ..clip import CLIP
from ..losses import Bank, among, cross_entropy, gather, similarities
from ..types import BadInput, Batch, Objective, View


def upper(values: Tensor) -> np.ndarray:
    """(N,) -> probability of each to be of the upper of two Gaussians."""
    column = values.double().numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=100, tol=1e-3, reg_covar=1e-6, random_state=0).fit(column)
    return mixture.predict_proba(column)[:, int(mixture.means_.argmax())]


@dataclass(eq=False)
class SafeCLIP(Objective):
    """Epochs, shares and the bank's size are the paper's; `cross_aug` is whether CLIP's loss looks at augmented views, `images` the policy
    for them."""

    warmup: int = 5
    slow: int = 1
    slowness: float = 0.01
    threshold: float = 0.9
    growth: float = 0.01
    most: float = 0.85
    bank: int = 256
    cross_aug: bool = True
    images: Policy = "auto"

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {**Objective.views, "image_aug": partial(augmented_image, kind=self.images), "text_aug": augmented_text}

    def setup(self, clip: CLIP) -> None:
        if self.bank < 1:
            raise BadInput(f"--objective.bank {self.bank}: must be 1 at least")
        self.banks = {name: Bank(self.bank) for name in ("image", "text")}
        self.everything = False  # whether all pairs are safe, as in the slow epochs
        self.safe: frozenset[str] = frozenset()
        self.share, self.split_for = 0.0, -1  # of the safe among all, and the epoch for which they were found

    def start_epoch(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], epoch: int) -> None:
        self.everything = self.warmup <= epoch < self.warmup + self.slow
        if epoch < self.warmup + self.slow or self.split_for == epoch:
            return
        keys, cosines = similarities(clip, batches())
        p = upper(cosines)
        self.share = min(self.most, self.share + self.growth) if self.split_for >= 0 else float((p > self.threshold).mean())
        first = np.lexsort((-cosines.numpy(), -p))[: round(self.share * len(keys))]
        self.safe, self.split_for = frozenset(keys[i] for i in first), epoch

    def pace(self, epoch: int) -> float:
        return self.slowness if self.warmup <= epoch < self.warmup + self.slow else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"banks": {k: b.state_dict() for k, b in self.banks.items()}, "safe": sorted(self.safe), "share": self.share,
                "split_for": self.split_for}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, bank in self.banks.items():
            bank.load_state_dict(state["banks"][k])
        self.safe, self.share, self.split_for = frozenset(state["safe"]), state["share"], state["split_for"]

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(torch.cat([batch["image"], batch["image_aug"]]), torch.cat([batch["text"], batch["text_aug"]]))
        (x, x_aug), (t, t_aug) = (map(gather, out[k].chunk(2)) for k in ("image_features", "text_features"))
        s = out["logit_scale"]
        safe = torch.ones(len(x), dtype=torch.bool, device=x.device) if self.everything else among(self.safe, batch)
        u, v = (t_aug, x_aug) if self.cross_aug and not self.everything else (t, x)
        cross = (cross_entropy(x[safe], u[safe], s) + cross_entropy(t[safe], v[safe], s)) / 2
        near = {"image": self.banks["image"].nearest(x), "text": self.banks["text"].nearest(t)}
        unimodal = (cross_entropy(near["image"][~safe], x_aug[~safe], s) + cross_entropy(near["text"][~safe], t_aug[~safe], s)) / 2
        self.banks["image"].push(x)
        self.banks["text"].push(t)
        return {"loss": cross + unimodal + 0 * (x.sum() + t.sum()), "cross": cross, "unimodal": unimodal, "safe": safe.float().mean()}
