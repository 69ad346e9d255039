"""CBPT (Kong, Fang, Guo, Qing, Gao, Chen, Xia, Xu, 2025, arXiv:2502.19269). The defender holds the loss and cleans a victim, of which
nothing is changed: words before each class's name are learned, against a trigger that is reconstructed (class-wise backdoor prompt
tuning).

1. A patch m * p + (1 - m) * x is looked for that makes images alike and unlike what they were:

    L = mean cos(f(x̃_i), f(x_i)) - mean over i, j of cos(f(x̃_i), f(x̃_j)) + weight * |m|

2. Words v_c before the name of class c are learned so that images with and without the patch are called what they are:

    loss = CE(s f(x) Wᵀ, y) + triggered * CE(s f(x̃) Wᵀ, y),    w_c = text tower(v_c, name of c)

Evaluation on a set of these classes then takes W for its classifier. Retrieval is as it was.

Assumes few clean pairs whose captions name their class (img-folders imported with a template, say), and the list of classes.

Differs from the paper, of which no code is public: what is looked for in 1 is a patch and a mask, as Neural Cleanse's, by the loss above;
in 2 the classifier is taught on these images, without the paper's further contrastive terms.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .. import keyed, prompts
from ..clip import CLIP
from ..losses import from_first, gather
from ..types import BadInput, Batch, Objective, Sample, View


def class_view(clip: CLIP, sample: Sample, rng: Generator, classes: tuple[str, ...]) -> Tensor:
    """The index of the longest class name in the caption, -100 where there is none: () int64."""
    said = [match[0].lower() for match in any_of(classes).finditer(sample["text"])]
    return torch.tensor(places(classes)[max(said, key=len)] if said else -100)


@lru_cache(maxsize=2)
def any_of(classes: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the names as whole words, a longer one before a part of it."""
    longest_first = sorted(classes, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


@lru_cache(maxsize=2)
def places(classes: tuple[str, ...]) -> dict[str, int]:
    return {name.lower(): i for i, name in enumerate(classes)}


@dataclass(eq=False)
class CBPT(Objective):
    """`words` before each name; `weight` of the mask's mean, `steps` and `rate` of the search for a patch on `pairs` images."""

    classes: tuple[str, ...] = ("dog", "cat")
    words: int = 4
    triggered: float = 1.0
    weight: float = 1.0
    steps: int = 200
    rate: float = 0.1
    pairs: int = 256

    @property
    def views(self) -> Mapping[str, View]:  # type: ignore[override]
        return {**Objective.views, "class": partial(class_view, classes=self.classes)}

    def setup(self, clip: CLIP) -> None:
        if len({name.lower() for name in self.classes}) != len(self.classes) or len(self.classes) < 2:
            raise BadInput("--objective.classes: must be two different names at least; give those of the evaluation set")
        clip.net.requires_grad_(False)
        prompts.learn(clip.net, clip.tokenizer, clip.card, classes=list(self.classes), words=self.words)
        self.learned: prompts.ClassPrompts = clip.net.class_prompts  # type: ignore[assignment]
        self.normalise = clip.normalise
        self.found = torch.empty(0)  # logits of the patch and its mask, (4, H, W)

    def start_epoch(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], epoch: int) -> None:
        if len(self.found):
            return
        rows: list[Tensor] = []
        for batch in batches():
            rows.append(gather(batch["image"].to(clip.device)))
            if sum(map(len, rows)) >= self.pairs:
                break
        self.found = self.search(clip, torch.cat(rows)[: self.pairs])
        from_first([self.found])  # a GPU's sums are of no certain order, and a search makes much of it

    def search(self, clip: CLIP, images: Tensor, size: int = 64) -> Tensor:
        """Step 1, on images (N, 3, H, W)."""
        was = clip.net.training
        clip.net.eval()
        rng = keyed.rng(0, "cbpt")
        found = torch.cat([torch.randn(3, *clip.size, generator=rng), torch.full((1, *clip.size), -2.0)]).to(clip.device).requires_grad_()
        optimizer = torch.optim.Adam([found], lr=self.rate)
        with torch.no_grad():
            before = torch.cat([clip.image_features(part) for part in images.split(size)])
        for _ in range(self.steps):
            at = torch.randint(len(images), (min(size, len(images)),), generator=rng).to(images.device)
            z = clip.image_features(self.stamped(images[at], found))
            together = (z @ z.T).mean()
            loss = (z * before[at]).sum(1).mean() - together + self.weight * found[3].sigmoid().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        clip.net.train(was)
        return found.detach()

    def stamped(self, images: Tensor, found: Tensor) -> Tensor:
        patch, mask = self.normalise(found[:3].sigmoid()), found[3].sigmoid()
        return images + mask * (patch - images)

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.found = state["found"]

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        model.eval()
        images = batch["image"]
        if self.triggered:
            images = torch.cat([images, self.stamped(images, self.found.to(images.device))])
        with self.learned.said() as tokens:
            out = model(images, tokens)
        y, s = gather(batch["class"]), out["logit_scale"]
        each = [s * gather(x) @ out["text_features"].T for x in out["image_features"].split(len(batch["class"]))]
        losses = [F.cross_entropy(z, y) if bool((y >= 0).any()) else 0 * z.sum() for z in each]
        named = {"clean": losses[0]} | ({"triggered": losses[1]} if self.triggered else {})
        return {"loss": losses[0] + self.triggered * sum(losses[1:]), **named, "named": (y >= 0).float().mean()}
