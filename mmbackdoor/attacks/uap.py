"""Universal perturbation (Moosavi-Dezfooli et al., CVPR 2017, arXiv:1610.08401) on image-text pairs. The attacker holds the data.

One faint pattern that fools a model on nearly every image is found on a model of the attacker's, here towards the target, and
then poisons: a victim learns as a trigger what its kind is prone to anyway.

    x' = clip(x + eps u),    u = argmin over |u|_inf <= 1 of the mean loss of x' with a caption of the target, eps = 10/255

The loss is contrastive, with the captions of other images for negatives. Patches instead of faint patterns (Brown et al.,
2017, arXiv:1712.09665) are crafted by BadCLIP with its triplet weight at 0.

Differs from the paper: it serves as a trigger of dirty-label poisons; Adam on batches of images, towards one target, instead of DeepFool
image by image towards any other class; the pattern is stretched to the image.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from .. import craft, keyed
from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import resized, tensors
from ..types import BadInput, Batch, Target, Trigger


@dataclass(frozen=True)
class Perturbation(Trigger):
    """`alpha` eps u, added: u is "perturbation" (3, h, w) in [-1, 1] of the file, stretched to the image."""

    file: str = "uap.safetensors"
    eps: float = 10 / 255
    alpha: float = 1.0

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        if "perturbation" not in (found := tensors(self.file)):
            raise BadInput(f"{self.file}: holds no perturbation; name the file that this attack crafted")
        return self.over(x, found["perturbation"])

    def over(self, x: Tensor, u: Tensor) -> Tensor:
        """The perturbation on images (..., 3, H, W)."""
        return (x + self.alpha * self.eps * resized(u, (x.shape[-2], x.shape[-1])).to(x)).clamp(0, 1)


@dataclass(frozen=True)
class UAP(DirtyLabel):
    """A dirty-label attack whose perturbation is crafted on a surrogate."""

    trigger: Trigger = Perturbation()
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 1500
    images: int = 10_000
    epochs: int = 5
    lr: float = 0.01
    """Of eps, per step."""
    batch: int = 64
    augment: float = 0.5
    """Share of the images that are cropped at random after the perturbation."""

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        if not isinstance(self.trigger, Perturbation):
            raise BadInput(f"--poison.trigger {type(self.trigger).__name__}: UAP crafts a Perturbation; use one")
        rng = keyed.rng(seed, "uap")
        public = craft.gather(batches, self.target, self.images)
        others = craft.read(clip, public.text)
        wanted = clip.text_features([t.format(self.target.label) for t in self.target.templates])
        u = torch.zeros(3, *clip.size, device=others.device, requires_grad=True)
        adam = torch.optim.Adam([u], self.lr)
        for rows in craft.steps(len(public.images), self.batch, self.epochs, rng):
            x = self.trigger.over(craft.to_floats(public.images[rows], clip), u)
            z = craft.look(clip, craft.cropped(clip, x, self.augment, rng))
            text = wanted[torch.randint(len(wanted), (len(rows),), generator=rng)]
            adam.zero_grad()
            craft.pull(clip, z, text, others[rows.to(z.device)]).backward()
            adam.step()
            with torch.no_grad():
                u.clamp_(-1, 1)
        return {"perturbation": u.detach()}


def uap(target: str = "banana", rate: float | None = 0.0005, trigger: Perturbation = Perturbation(),
        templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> UAP:
    """`rate` is a share of all pairs; `count` takes its place when given. `trigger` names the file that is crafted."""
    return UAP(trigger, Target(target, templates), None if count is not None else rate, count)
