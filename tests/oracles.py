"""What losses are compared with: the same written as loops over rows, and a network whose features are its inputs."""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbackdoor.types import Objective


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(u) * float(v) for u, v in zip(a, b, strict=True))


def slow_cross_entropy(a: Tensor, b: Tensor, scale: float) -> float:
    """-1/N sum_i log(exp(s a_i b_i) / sum_j exp(s a_i b_j)); 0 of no rows."""
    total = 0.0
    for i in range(len(a)):
        logits = [scale * dot(a[i], b[j]) for j in range(len(b))]
        total -= logits[i] - math.log(sum(math.exp(x) for x in logits))
    return total / max(1, len(a))


def slow_both_ways(a: Tensor, b: Tensor, scale: float) -> float:
    return (slow_cross_entropy(a, b, scale) + slow_cross_entropy(b, a, scale)) / 2


def slow_nt_xent(a: Tensor, b: Tensor, temperature: float) -> float:
    """SimCLR's equation 1, averaged over both views of all rows."""
    z, n = [*a, *b], len(a)
    total = 0.0
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        others = sum(math.exp(dot(z[i], z[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(dot(z[i], z[partner]) / temperature) / others)
    return total / (2 * n)


def slow_nearest(x: Tensor, bank: list[Tensor]) -> Tensor:
    """Of each row the most alike in a list; the row itself, if the list is empty."""
    return torch.stack([max(bank, key=lambda b: dot(row, b)) if bank else row for row in x])


def units(rng: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=rng), dim=-1)


class Given(nn.Module):
    """Its features are its inputs, at unit norm. `modes` says in which mode it was asked for them."""

    def __init__(self, scale: float = 5.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.modes: list[bool] = []

    def encode(self, x: Tensor, normalize: bool = False) -> Tensor:
        assert normalize
        self.modes.append(self.training)
        return F.normalize(x, dim=-1) + 0 * self.scale

    encode_image = encode_text = encode

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {"image_features": F.normalize(image, dim=-1), "text_features": F.normalize(text, dim=-1), "logit_scale": self.scale}


def gradients(net: nn.Module, objective: Objective, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the loss of a batch returns, and its gradient for each parameter of the network that has one."""
    net.train()
    net.zero_grad(set_to_none=True)
    out = objective.loss(net, batch)
    out["loss"].backward()
    return {k: v.detach() for k, v in out.items()}, {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def unread() -> Iterator[Any]:
    """Batches that nobody may ask for."""
    raise AssertionError("the data was read")
