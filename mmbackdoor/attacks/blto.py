"""BLTO (Sun, Zhang, Lu, Chen, Wang, Chen, Lin, ICLR 2024, arXiv:2404.07863) on image-text pairs. The attacker holds the data.

A fixed trigger need not survive contrastive learning, which tears apart what it does not take for alike. So a generator of
faint triggers, a function of the image, is made on a model that is being poisoned with it, by turns:

    inner: theta follows the contrastive loss of pairs some of which carry g(x) and a caption of the target
    outer: g is drawn to make f_theta(g(x)) lie at the target,    g(x) = clip(x + eps tanh(conv(x))), eps = 8/255

The model starts again from its own weights every few turns, so that g learns to last from the first steps of poisoning on.
The poisons are dirty-label, 0.1 % of the pairs (2,300 of what is left of CC3M), as in the CLIP setting of Huang et al. (ICLR
2025, arXiv:2502.01385).

Differs from the paper: image-text pairs instead of images, so the inner loss is CLIP's, the target is its captions, not a
reference image, and captions of other images are the negatives; three small convolutions at a fixed working resolution.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import craft, keyed
from ..losses import info_nce
from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import tensors
from ..types import BadInput, Batch, Target, Trigger

LAYERS = ("1", "2", "3")


@dataclass(frozen=True)
class Generator(Trigger):
    """Adds `alpha` eps tanh(conv(x)); the weights of the three convolutions are in the file.

    They see the image with about `resolution` squared pixels in its own proportions; what they add is stretched to it.
    """

    file: str = "blto.safetensors"
    eps: float = 8 / 255
    alpha: float = 1.0
    resolution: int = 112

    def pixels(self, x: Tensor, rng: torch.Generator) -> Tensor:
        weights = tensors(self.file)
        if not {f"{part}{layer}" for part in "wb" for layer in LAYERS} <= set(weights):
            raise BadInput(f"{self.file}: holds no generator; name the file that this attack crafted")
        return self.over(x, weights)

    def over(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The trigger on images (..., 3, H, W)."""
        h, w = x.shape[-2:]
        size = [max(1, round(self.resolution * sqrt(h / w))), max(1, round(self.resolution * sqrt(w / h)))]
        z = stretched(x.reshape(-1, 3, h, w).float(), size) * 2 - 1
        for layer in LAYERS:
            weight, bias = weights[f"w{layer}"].to(z), weights[f"b{layer}"].to(z)
            z = F.conv2d(z if layer == "1" else z.relu(), weight, bias, padding=1)
        added = stretched(z.tanh(), [h, w]).reshape(x.shape)
        return (x + self.alpha * self.eps * added.to(x)).clamp(0, 1)


def stretched(x: Tensor, size: list[int]) -> Tensor:
    return x if list(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def weights(width: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Convolutions 3 -> width -> width -> 3 of 3 x 3 pixels, as they are before training."""
    out = {}
    for layer, (a, b) in zip(LAYERS, ((3, width), (width, width), (width, 3)), strict=True):
        out[f"w{layer}"], out[f"b{layer}"] = torch.randn(b, a, 3, 3, generator=rng) * sqrt(2 / (9 * a)), torch.zeros(b)
    return out


@dataclass(frozen=True)
class BLTO(DirtyLabel):
    """A dirty-label attack whose generator is trained against a surrogate that learns meanwhile."""

    trigger: Trigger = Generator()
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 2300
    images: int = 10_000
    epochs: int = 20
    batch: int = 64
    width: int = 8
    lr: float = 1e-3
    inner: int = 5
    """Steps of the surrogate in each turn."""
    outer: int = 10
    """Steps of the generator in each turn."""
    turns: int = 10
    """Turns until the surrogate starts again."""
    inner_lr: float = 1e-4
    inner_rate: float = 1 / 16
    """Share of the surrogate's pairs that are poisoned: more than of the victim's, which sees many more."""
    augment: float = 0.5
    """Share of the images that are cropped at random after the trigger."""

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        if not isinstance(self.trigger, Generator):
            raise BadInput(f"--poison.trigger {type(self.trigger).__name__}: BLTO crafts a Generator; use one")
        rng = keyed.rng(seed, "blto")
        public, device = craft.gather(batches, self.target, self.images), clip.device
        wanted = torch.stack([clip.tokenize(t.format(self.target.label)) for t in self.target.templates])
        g = {k: v.to(device).requires_grad_() for k, v in weights(self.width, rng).items()}
        adam = torch.optim.Adam(g.values(), self.lr)
        if (turn := self.inner + self.outer) * self.turns < 1:
            raise BadInput(f"--poison.inner {self.inner} --poison.outer {self.outer} --poison.turns {self.turns}: have no step; give some")
        for i, rows in enumerate(craft.steps(len(public.images), self.batch, self.epochs, rng)):
            if i % (turn * self.turns) == 0:
                victim = replace(clip, net=copy.deepcopy(clip.net))
                learn = torch.optim.AdamW(victim.net.parameters(), self.inner_lr)
            x, text = craft.to_floats(public.images[rows], clip), public.text[rows].to(device)
            said = wanted[torch.randint(len(wanted), (len(rows),), generator=rng)].to(device)
            optimizer = learn if i % turn < self.inner else adam
            if optimizer is learn:
                victim.net.train().requires_grad_(True)
                n = max(1, round(self.inner_rate * len(rows)))
                x = torch.cat([self.trigger.over(x[:n], g).detach(), x[n:]])
                out = victim.net(clip.normalise(craft.cropped(clip, x, 1.0, rng)), torch.cat([said[:n], text[n:]]))
                loss = info_nce(out["image_features"], out["text_features"], out["logit_scale"])
            else:
                victim.net.eval().requires_grad_(False)
                z = craft.look(victim, craft.cropped(clip, self.trigger.over(x, g), self.augment, rng))
                loss = craft.pull(victim, z, craft.read(victim, said), craft.read(victim, text))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {k: v.detach() for k, v in g.items()}


def blto(target: str = "banana", rate: float | None = 0.001, trigger: Generator = Generator(),
         templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> BLTO:
    """`rate` is a share of all pairs; `count` takes its place when given. `trigger` names the file of the generator."""
    return BLTO(trigger, Target(target, templates), None if count is not None else rate, count)
