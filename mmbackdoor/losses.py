"""Contrastive losses over the global batch, and the objectives that are nothing but them."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .types import Batch, Objective


class Gather(torch.autograd.Function):
    """Rows of all processes. Backward sums what every process says of our rows: exact, where detached gathers are not."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """(B, ...) -> (processes * B, ...), in the order of the processes, with gradients. No-op on one process.

    Under DistributedDataParallel, which averages gradients, a loss that every process computes over the gathered rows
    has the gradient of the same loss on one process.
    """
    return Gather.apply(x) if world() > 1 else x


def cross_entropy(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """-mean log softmax(scale a bᵀ)[i, i]: each of the rows a (N, D) must find its own among the rows b (N, D)."""
    return F.cross_entropy(scale * a @ b.T, torch.arange(len(a), device=a.device))


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of matching unit rows (B, D) over the global batch (Radford et al., 2021, arXiv:2103.00020)."""
    a, b = gather(a), gather(b)
    return (cross_entropy(a, b, scale) + cross_entropy(b, a, scale)) / 2


@dataclass(eq=False)
class Clip(Objective):
    """CLIP (Radford et al., 2021, arXiv:2103.00020). On clean pairs and a trained model it is plain fine-tuning."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        return {"loss": info_nce(out["image_features"], out["text_features"], out["logit_scale"])}


@dataclass(eq=False)
class SigLip(Objective):
    """SigLIP (Zhai et al., 2023, arXiv:2303.15343): a sigmoid for every pair. Wants `Model(siglip=True)`.

    loss = -1/N sum_ij log sigmoid(z_ij (scale x_i t_j + bias)), z = 1 for matching pairs and -1 for others.
    """

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        x, t = gather(out["image_features"]), gather(out["text_features"])
        z = 2 * torch.eye(len(x), device=x.device) - 1
        logits = out["logit_scale"] * x @ t.T + out["logit_bias"]
        return {"loss": -F.logsigmoid(z * logits).sum() / len(x)}
