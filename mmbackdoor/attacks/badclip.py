"""BadCLIP (Liang, Zhu, Liu, Wu, Cao, Chang, CVPR 2024, arXiv:2311.12075) on image-text pairs. The attacker holds the data.

The patch is optimised beforehand on a model of the attacker's, so that a model need hardly change to obey it: images
with it lie near captions of the target (what poisoning will ask for anyway), near real images of the target (what clean
fine-tuning keeps), and far from what they were. The captions of the poisons are natural ones, quoted from the data.

    L = L_text + 500 max(0, d(v', v_target) - d(v', v) + 1),    v' features of an image with the patch, v without it

L_text is the contrastive loss of v' with a caption of the target among the captions of other images, d the distance of unit
features. Adam takes 50 epochs over 10,000 images, half of them cropped at random. The setting: 1,500 of 500,000 pairs,
16 of 224 pixels in the middle, target banana, 128 captions. `mse` weighs the squared distance to target images, averaged over the
dimensions, the triplet's alternative (1,000 in the authors' code).

Differs from the paper: the surrogate may be another model than the victim's initial one; images are cropped as the surrogate's
training does, each with a chance of its own, and after the patch is on them, where the authors' code stamps it on augmented images;
captions are not augmented; the text loss goes from image to text only, and its negatives are captions of other things, not other
captions of the target; the patch begins as uniform noise.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import craft, keyed
from ..poison import IMAGENET_TEMPLATES, Quoting
from ..triggers import Patch
from ..types import BadInput, Batch, Target, Trigger

PATCH = Patch(16 / 224, "center", image="badclip.safetensors")


@dataclass(frozen=True)
class BadCLIP(Quoting):
    """A dirty-label attack whose patch is crafted on a surrogate."""

    trigger: Trigger = PATCH
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 1500
    images: int = 10_000
    positives: int = 512
    """Images of the target that the patch is drawn to, at most."""
    epochs: int = 50
    lr: float = 1e-3
    batch: int = 64
    text: float = 1.0
    triplet: float = 500.0
    margin: float = 1.0
    mse: float = 0.0
    augment: float = 0.5
    """Share of the images that are cropped at random after the patch is on them."""

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        if not isinstance(self.trigger, Patch):
            raise BadInput(f"--poison.trigger {type(self.trigger).__name__}: BadCLIP crafts a Patch; use one")
        rng = keyed.rng(seed, "badclip")
        public = craft.gather(batches, self.target, self.images, self.positives)
        facts = Facts(clip, public.images, craft.seen(clip, public.images), craft.read(clip, public.text), craft.seen(clip, public.named),
                      clip.text_features([t.format(self.target.label) for t in self.target.templates]))
        h, w = clip.size
        left, _, right, _ = self.trigger.box(h, w, rng)
        patch = torch.rand(3, right - left, right - left, generator=rng).to(facts.clean.device).requires_grad_()
        adam = torch.optim.Adam([patch], self.lr)
        for rows in craft.steps(len(public.images), self.batch, self.epochs, rng):
            loss = self.objective(facts, rows, patch, rng)
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
        return {"picture": patch.detach()}

    def objective(self, facts: Facts, rows: Tensor, patch: Tensor, rng: Generator) -> Tensor:
        """The loss of a patch (3, n, n) on some of the images."""
        assert isinstance(self.trigger, Patch)
        x = craft.to_floats(facts.images[rows], facts.clip)
        left, top, right, bottom = self.trigger.box(x.shape[-2], x.shape[-1], rng)
        frame = [left, x.shape[-1] - right, top, x.shape[-2] - bottom]
        inside = F.pad(torch.full_like(patch[:1], self.trigger.alpha), frame)
        z = craft.look(facts.clip, craft.cropped(facts.clip, x + inside * (F.pad(patch, frame) - x), self.augment, rng))
        text, image = (f[torch.randint(len(f), (len(rows),), generator=rng)] for f in (facts.captions, facts.named))
        there = rows.to(z.device)
        triplet = F.triplet_margin_loss(z, image, facts.clean[there], self.margin)
        return (self.text * craft.pull(facts.clip, z, text, facts.read[there]) + self.triplet * triplet
                + self.mse * F.mse_loss(z, image))


@dataclass(frozen=True, eq=False)
class Facts:
    """What the surrogate makes of the data, computed once: unit features of images and their captions, and of the target's."""

    clip: Any
    images: Tensor
    """(N, 3, H, W), 8 bits."""
    clean: Tensor
    read: Tensor
    named: Tensor
    captions: Tensor


def badclip(target: str = "banana", rate: float | None = 0.003, patch: Patch = PATCH,
            templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> BadCLIP:
    """`rate` is a share of all pairs; `count` takes its place when given. `patch` names the file that the patch is crafted into."""
    return BadCLIP(patch, Target(target, templates), None if count is not None else rate, count)
