"""Fine-Pruning (Liu, Dolan-Gavitt, Garg, 2018, arXiv:1805.12185). The defender holds the model, and fine-tunes it afterwards.

Units of the last hidden layer of the image tower that clean images hardly excite are free for a trigger, and go:

    m_u = mean over clean images and places of the activation of unit u;  the share of lowest m_u is cut off, both ways

A unit without weights before and behind it has no gradient either, so fine-tuning in the same recipe does not bring it back.

Assumes clean pairs, for the activations and for the fine-tuning. The hidden layer is, in a ResNet, that between the last two convolutions
of the last block; in a ViT, that of the last block's MLP.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..clip import CLIP
from ..losses import evaluating
from ..types import BadInput, Batch, Edit

Hidden = tuple[nn.Module, list[Tensor], Tensor]
"""What gives the activations, (B, U, H, W) before a convolution and (B, ..., U) elsewhere; weights that lead in, U rows each; those that
lead out, U columns."""


def hidden(net: nn.Module) -> Hidden:
    """The last hidden layer of the image tower. Raises BadInput for a tower of another kind."""
    parts = dict(net.named_modules())
    blocks = [name for name in parts if name.startswith(("visual.", "clip.vision_model."))]
    for name in reversed(blocks):
        block = parts[name]
        if {"act2", "bn2", "conv3"} <= set(dict(block.named_children())):
            return block.act2, [block.bn2.weight, block.bn2.bias], block.conv3.weight  # type: ignore[list-item,return-value]
        for act, first, second in (("gelu", "c_fc", "c_proj"), ("activation_fn", "fc1", "fc2"), ("act", "fc1", "fc2")):
            if {act, first, second} <= set(dict(block.named_children())):
                inner, outer = getattr(block, first), getattr(block, second)
                return getattr(block, act), [inner.weight, inner.bias], outer.weight
    raise BadInput(f"{type(net).__name__}: its image tower is neither a ResNet nor a ViT as open_clip, timm or transformers build them; "
                   "pruning does not know its hidden layer")


@dataclass(frozen=True)
class FinePruning(Edit):
    """`share` of the units that are cut off; `pairs` are looked at."""

    share: float = 0.5
    pairs: int = 10_000

    def __call__(self, clip: CLIP, batches: Callable[[], Iterable[Batch]], donor: CLIP | None = None) -> CLIP:
        if not 0 <= self.share < 1:
            raise BadInput(f"--edit.share {self.share}: is no share of the units; give a number from 0 to less than 1")
        source, leads_in, leads_out = hidden(clip.net)
        total, n = torch.zeros(len(leads_in[0]), device=clip.device), 0

        def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            nonlocal total
            total += (out.flatten(2).mean(2) if leads_out.ndim == 4 else out.reshape(len(out), -1, len(total)).mean(1)).sum(0)

        watch = source.register_forward_hook(see)
        with evaluating(clip.net):
            for batch in batches():
                clip.image_features(batch["image"].to(clip.device))
                if (n := n + len(batch["image"])) >= self.pairs:
                    break
        watch.remove()
        gone = total.argsort(stable=True)[: round(self.share * len(total))]
        with torch.no_grad():
            for weight in leads_in:
                weight[gone] = 0
            leads_out[:, gone] = 0
        return clip
