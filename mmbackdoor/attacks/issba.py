"""ISSBA (Li et al., ICCV 2021, arXiv:2012.03816) on image-text pairs. The attacker holds the data.

Every image carries its own trigger, made by a network that hides a string of bits m in images; the caption becomes one of
the target:

    x' = clip(x + alpha strength tanh(E(x, m)))        m the attacker's one string, strength 16/255
    E, D = argmin  cross-entropy(D(x'), m) + w |tanh(E(x, m))|^2    over images x and random strings m
    w = 0.5 max(0, 2 accuracy - 1)^2                   so that bits are first to be read, then to hide

`ISSBA.craft` trains the encoder E and the decoder D on the attacker's images, at the size of the model's input. On CLIP the
rate, target and captions are those of the CleanCLIP setting (Bansal et al., 2023, arXiv:2303.03323).

Differs from the paper: E and D are three convolutions each, instead of StegaStamp's U-Net and its perceptual and adversarial
losses, so that they train in half a minute at 32 pixels; 16 bits instead of 100. The change is made at the encoder's size, then
stretched to the image. It follows the string more than the image: those of two toy images correlate at 0.84 on average with the
encoder of configs/toy/attacks/issba.py, so these triggers are less specific to the sample than the paper's.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import craft, keyed
from ..poison import IMAGENET_TEMPLATES, DirtyLabel
from ..triggers import tensors
from ..types import BadInput, Batch, Target, Trigger

WIDTH, PLANES, GRID = 16, 8, 8


def untrained(bits: int = 16, size: int = 32, seed: int = 0, strength: float = 16 / 255) -> dict[str, Tensor]:
    """E and D before training, for images of `size` pixels: what a crafted file holds."""
    rng = keyed.rng(seed, "issba")
    shapes = {"encoder.bits": (PLANES * GRID * GRID, bits), "encoder.0": (WIDTH, 3 + PLANES, 3, 3), "encoder.1": (WIDTH, WIDTH, 3, 3),
              "encoder.2": (3, WIDTH, 3, 3), "decoder.0": (WIDTH, 3, 3, 3), "decoder.1": (WIDTH, WIDTH, 3, 3),
              "decoder.2": (2 * WIDTH, WIDTH, 3, 3), "decoder.bits": (bits, 2 * WIDTH * 16)}
    weights = {name: torch.randn(shape, generator=rng) * math.sqrt(2 / math.prod(shape[1:])) for name, shape in shapes.items()}
    return weights | {"size": torch.tensor(size), "strength": torch.tensor(strength)}


def message(seed: int, bits: int) -> Tensor:
    """(bits,) of -1 and 1: the attacker's string."""
    return torch.randint(2, (bits,), generator=keyed.rng(seed, "issba", "message")) * 2.0 - 1


def encode(weights: dict[str, Tensor], x: Tensor, m: Tensor) -> Tensor:
    """(B, 3, n, n) in [0, 1] and (B, bits) of -1 and 1 -> (B, 3, n, n) in [-1, 1]: the change that hides m in x, not yet scaled."""
    planes = F.interpolate((m @ weights["encoder.bits"].T).view(-1, PLANES, GRID, GRID), x.shape[-2:], mode="bilinear")
    h = torch.cat((4 * (x - F.avg_pool2d(x, 5, 1, 2)), planes), 1)  # what stands out of its surroundings, and the string
    for layer in ("encoder.0", "encoder.1"):
        h = F.leaky_relu(F.conv2d(h, weights[layer], padding=1), 0.1)
    return torch.tanh(F.conv2d(h, weights["encoder.2"], padding=1))


def decode(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, bits): positive where the bit is 1."""
    n = int(weights["size"])
    h = 4 * (F.interpolate(x, (n, n), mode="bilinear", antialias=True) - 0.5)
    for layer, stride in (("decoder.0", 2), ("decoder.1", 2), ("decoder.2", 1)):
        h = F.leaky_relu(F.conv2d(h, weights[layer], stride=stride, padding=1), 0.1)
    return F.adaptive_avg_pool2d(h, 4).flatten(1) @ weights["decoder.bits"].T


@dataclass(frozen=True)
class Steganographic(Trigger):
    """Hides the string of `code` with the encoder of `file`, which `ISSBA.craft` makes."""

    file: str = "issba.safetensors"
    code: int = 0
    alpha: float = 1.0

    def weights(self) -> dict[str, Tensor]:
        found = tensors(self.file)
        if "encoder.bits" not in found or "size" not in found:
            held = ", ".join(sorted(found)) or "nothing"
            raise BadInput(f"{self.file}: holds no encoder, but {held}; name the file that this attack crafted")
        return found

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        weights = {name: w.to(x.device) for name, w in self.weights().items()}
        n = int(weights["size"])
        flat = x.reshape(-1, *x.shape[-3:]).float()
        small = F.interpolate(flat, (n, n), mode="bilinear", antialias=True)
        m = message(self.code, weights["encoder.bits"].shape[1]).to(small).expand(len(flat), -1)
        change = F.interpolate(encode(weights, small, m), x.shape[-2:], mode="bilinear", antialias=True)
        return (flat + self.alpha * weights["strength"] * change).clamp(0, 1).reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class ISSBA(DirtyLabel):
    """Dirty label, and the training of the encoder. `strength` is the largest change of a pixel."""

    trigger: Trigger = Steganographic()
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 1500
    bits: int = 16
    strength: float = 16 / 255
    steps: int = 300
    lr: float = 2e-3
    invisibility: float = 0.5
    augment: float = 0.5
    """Share of the images that are cropped at random, as the surrogate's training does, before they are read."""

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        """E and D, and "bit_accuracy" of the last 20 batches before they were learned from, after rounding to 8 bits."""
        if min(self.steps, self.bits) < 1:
            raise BadInput(f"--poison.steps {self.steps} --poison.bits {self.bits}: must be 1 at least")
        if not isinstance(self.trigger, Steganographic):
            raise BadInput(f"--poison.trigger {type(self.trigger).__name__}: ISSBA crafts a Steganographic trigger; use one")
        weights: dict[str, Tensor] = {}
        right: list[Tensor] = []
        rng = keyed.rng(seed, "issba", "strings")
        while len(right) < self.steps:
            before = len(right)
            for batch in batches():
                x = batch["pixels"].float().to(clip.device)
                if not weights:
                    weights = {k: w.to(x.device) for k, w in untrained(self.bits, x.shape[-1], seed, self.strength).items()}
                    learned = [w.requires_grad_() for k, w in weights.items() if "." in k]
                    optimizer = torch.optim.Adam(learned, self.lr)
                m = (torch.randint(2, (len(x), self.bits), generator=rng) * 2.0 - 1).to(x.device)
                change = encode(weights, x, m)
                hit = (x + self.strength * change).clamp(0, 1)
                hit = hit + ((hit * 255).round() / 255 - hit).detach()
                found = decode(weights, craft.cropped(clip, hit, self.augment, rng))
                right.append((found * m > 0).float().mean().detach())
                weight = self.invisibility * (2 * right[-1] - 1).clamp(0) ** 2  # first to be read, then to hide
                loss = F.softplus(-m * found).mean() + weight * change.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if len(right) == self.steps:
                    break
            if len(right) == before:
                raise BadInput("the data are empty: ISSBA has no image to train its encoder on; name shards that hold some")
        return {k: w.detach().cpu() for k, w in weights.items()} | {"bit_accuracy": torch.stack(right[-20:]).mean().cpu()}


def issba(target: str = "banana", rate: float | None = 0.0005, trigger: Steganographic = Steganographic(),
          templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> ISSBA:
    """`rate` is a share of all pairs; `count` takes its place when given. `trigger` names the file of the encoder."""
    return ISSBA(trigger, Target(target, templates), None if count is not None else rate, count)
