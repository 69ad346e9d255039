"""SLIP (Mu, Kirillov, Wagner, Xie, 2021, arXiv:2112.12750). The defender holds the loss, or whoever pre-trains: no defense by itself, but
what several of them are made of.

CLIP's loss, and SimCLR's between two crops of the image in other colours, through a head that training alone uses; and the same of two
edits of the caption, where `text` is not 0:

    loss = CLIP(I, T) + image * NTXent(h(C1), h(C2)) + text * NTXent(g(T1), g(T2))

Models that are pre-trained with terms within a modality keep their backdoor
under CleanCLIP and fine-tuning (arXiv:2311.14948).

Differs from the paper: the heads (three layers, batch norm) stand on CLIP's own embedding, not on the features before its projection;
the term of text is not SLIP's, but the same for captions.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import keyed
from ..augment import Policy, augmented_text, cropped_image
from ..clip import CLIP
from ..losses import gather, info_nce, nt_xent
from ..types import Batch, Objective, View


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """(N, width) -> (N, out)."""
    inner = [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden, bias=False),
             nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*inner, nn.Linear(hidden, out, bias=False))


@dataclass(eq=False)
class SLIP(Objective):
    """`image` and `text` weigh the terms within a modality; `crop` is the share of the area that a crop of SimCLR's has, and
    `images` the policy for it."""

    image: float = 1.0
    text: float = 0.0
    temperature: float = 0.1
    crop: tuple[float, float] = (0.08, 1.0)
    images: Policy = "colour"
    hidden: int = 4096
    out: int = 256

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        crop: View = partial(cropped_image, scale=self.crop, kind=self.images)
        texts: dict[str, View] = {"text_1": augmented_text, "text_2": augmented_text} if self.text else {}
        return {**Objective.views, "crop_1": crop, "crop_2": crop} | texts

    def setup(self, clip: CLIP) -> None:
        parts = ["image"] + ["text"] * bool(self.text)
        with keyed.drawing_from(keyed.rng(0, "slip")):
            self.mlps = nn.ModuleDict({part: mlp(clip.width, self.hidden, self.out) for part in parts}).to(clip.device)

    def heads(self) -> nn.Module:
        return self.mlps

    def state_dict(self) -> dict[str, Any]:
        return {"mlps": self.mlps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mlps.load_state_dict(state["mlps"])

    def within(self, part: str, a: Tensor, b: Tensor) -> Tensor:
        """NTXent of two views of one modality, over the global batch."""
        a, b = F.normalize(self.mlps[part](torch.cat([gather(a), gather(b)])), dim=-1).chunk(2)
        return nt_xent(a, b, self.temperature)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        texts = ["text", *(["text_1", "text_2"] if self.text else [])]
        out = model(torch.cat([batch[k] for k in ("image", "crop_1", "crop_2")]), torch.cat([batch[k] for k in texts]))
        (x, c1, c2), (t, *edited) = out["image_features"].chunk(3), out["text_features"].chunk(len(texts))
        found = {"cross": info_nce(x, t, out["logit_scale"]), "image": self.within("image", c1, c2)}
        loss = found["cross"] + self.image * found["image"]
        if self.text:
            found["text"] = self.within("text", *edited)
            loss = loss + self.text * found["text"]
        return {"loss": loss} | found
