"""Contrastive losses over the global batch, what defenses keep beside a model, and the objectives that are nothing but losses."""
from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from .clip import CLIP
from .types import BadInput, Batch, Objective

T = TypeVar("T")


class Gather(torch.autograd.Function):
    """Rows of all processes. Backward sums what every process says of our rows: exact, where detached gathers are not."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)  # it may be another's too, and is summed in place
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


@torch.no_grad()
def from_first(tensors: Iterable[Tensor]) -> None:
    """Writes the first process's numbers into those of every process, which must be contiguous."""
    for x in tensors if world() > 1 else ():
        dist.broadcast(x, 0)


def gather_list(rows: list[T]) -> list[T]:
    """The entries of all processes' lists, in the order of the processes."""
    if world() == 1:
        return rows
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, rows)
    return [row for part in found for row in part]


def cross_entropy(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """-mean log softmax(scale a bᵀ)[i, i]: each of the rows a (N, D) must find its own among the rows b (N, D). 0 where N is."""
    if not len(a):
        return 0 * (a.sum() + b.sum())
    return F.cross_entropy(scale * a @ b.T, torch.arange(len(a), device=a.device))


def both_ways(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of matching unit rows (N, D) that are gathered already (Radford et al., 2021, arXiv:2103.00020)."""
    return (cross_entropy(a, b, scale) + cross_entropy(b, a, scale)) / 2


def one_way(x: Tensor, x_aug: Tensor, t: Tensor, t_aug: Tensor, scale: Tensor | float) -> Tensor:
    """CleanCLIP's terms within a modality, of gathered rows: each must find its own augmented view among those of its kind."""
    return (cross_entropy(x, x_aug, scale) + cross_entropy(t, t_aug, scale)) / 2


def info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The same of this process's rows (B, D), over the global batch."""
    return both_ways(gather(a), gather(b), scale)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al., 2020, arXiv:2002.05709) of two views' unit rows (N, D): each of the 2 N rows must find the other view of
    it among all the rest. Takes rows that are gathered already."""
    z = torch.cat([a, b])
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


def precise(x: Tensor) -> Tensor:
    """In float32 at least: halves are too coarse to keep, or to compare."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Bank:
    """The last `size` unit rows that were pushed. Pushed gathered rows, it is the same on every process."""

    def __init__(self, size: int):
        self.size, self.next = size, 0
        self.rows = torch.empty(0)  # (at most size, D), in no order

    def push(self, rows: Tensor) -> None:
        """Adds rows (N, D), of which only the last `size` are kept."""
        rows = precise(rows.detach()[-self.size:])
        held = self.rows.to(rows.device) if len(self.rows) else rows[:0]
        room = self.size - len(held)
        self.rows, rows = torch.cat([held, rows[:room]]) if room else held, rows[room:]
        if len(rows):
            at = torch.arange(self.next, self.next + len(rows), device=rows.device) % self.size
            self.rows[at], self.next = rows, (self.next + len(rows)) % self.size

    def nearest(self, x: Tensor) -> Tensor:
        """(N, D) -> for each row the one of the bank that is most alike, without a gradient; itself while the bank is empty. One matrix
        product, where the rows are. (On one core FAISS's exact index would take two thirds of its time, which is little of a step's.)"""
        if not len(self.rows):
            return x.detach()
        self.rows = self.rows.to(x.device)
        return self.rows[(x.detach().to(self.rows.dtype) @ self.rows.T).argmax(1)].to(x.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.next = state["rows"].clone(), state["next"]


def frozen_copy(net: nn.Module) -> nn.Module:
    """The network as it is, to compare with while it is trained."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def recalled(before: nn.Module, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """What a frozen copy says, computed in the precision of the run, as what is trained is, and returned in float32 at least."""
    kind = AcceleratorState().mixed_precision if AcceleratorState._shared_state else "no"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
    with torch.autocast(image.device.type, half, enabled=half is not None):
        out = before(image, text)
    return {k: precise(v) for k, v in out.items()}


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode, in here."""
    was = net.training
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        net.train(was)


def similarities(clip: CLIP, batches: Iterable[Batch]) -> tuple[list[str], Tensor]:
    """Keys, and cosines of image and caption as the network sees them now, of the data of all processes. (N,) on the CPU, in the order of
    the keys, which no number of processes changes."""
    keys: list[str] = []
    cosines: list[float] = []
    with evaluating(clip.net):
        for batch in batches:
            x = clip.net.encode_image(batch["image"].to(clip.device), normalize=True)  # type: ignore[operator]
            t = clip.net.encode_text(batch["text"].to(clip.device), normalize=True)  # type: ignore[operator]
            keys += batch["key"]
            cosines += (x * t).sum(1).tolist()
    found = sorted(zip(gather_list(keys), gather_list(cosines), strict=True))
    return [key for key, _ in found], torch.tensor([cosine for _, cosine in found])


def among(keys: frozenset[str], batch: Batch) -> Tensor:
    """Which pairs of all processes' batches are of these keys: (processes * B,) bool."""
    return gather(torch.tensor([key in keys for key in batch["key"]], device=batch["image"].device).float()) > 0.5


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

    def setup(self, clip: CLIP) -> None:
        bias = getattr(clip.net, "logit_bias", None)
        if bias is None:
            raise BadInput("--objective: SigLip's loss needs a model with a bias; add --model.siglip, or take Clip")
        bias.requires_grad_(True)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        out = model(batch["image"], batch["text"])
        x, t = gather(out["image_features"]), gather(out["text_features"])
        z = 2 * torch.eye(len(x), device=x.device) - 1
        logits = out["logit_scale"] * x @ t.T + out["logit_bias"]
        return {"loss": -F.logsigmoid(z * logits).sum() / len(x)}
