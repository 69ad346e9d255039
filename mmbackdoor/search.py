"""Nearest neighbours by inner product, by FAISS or torch, with one rule for ties: (score rounded to 6 digits, id).

Both backends compute in single precision and leave open which of equal rows they return, so what they find is taken as
it is only where all gaps between scores exceed their error; the other queries are settled in double precision. Exact
search therefore gives the same ids with every backend.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import keyed
from .types import BadInput

Near = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(queries (Q, D), k) -> scores (Q, k) and ids (Q, k), best first; id -1 where nothing was found."""

SPARE = 8
"""Neighbours found beyond k: a tie at the k-th place mostly ends among them."""
SLACK = 1e-5
"""What two scores of unit rows must differ by to be certain of their order; single precision errs by about 1e-6, and what
errs by more, such as TF32, is noticed."""
DIGITS = 1e6
ROWS, BLOCK = 1024, 1 << 14
"""Queries and gallery rows multiplied at once: 64 MB of scores, and never a Q x G matrix."""
FAISS_BLOCK = 1 << 12
"""Gallery rows that FAISS multiplies at once on a CPU, with 4096 queries: 64 MB again. Its default, 1024, takes half as long again."""
GPU_MOST = 2048
"""Neighbours that FAISS gives on a GPU."""


def search(queries: Tensor, gallery: Tensor, k: int, index: str = "exact") -> np.ndarray:
    """(Q, min(k, G)) ids of the rows of the gallery (G, D) with the largest inner products with the queries (Q, D).

    Best first, ties to the smaller id. `index` is "exact", or "ivf" or "hnsw" of FAISS, whose shortfall
    `recall_against_exact` measures. BadInput for NaN or infinity, an empty gallery, and a missing FAISS.
    """
    return searcher(gallery, index)(queries, k)


def searcher(gallery: Tensor, index: str = "exact") -> Callable[[Tensor, int], np.ndarray]:
    """`search` over one gallery, indexed once: (queries, k) -> ids."""
    if index not in NEAR:
        raise BadInput(f"index={index!r}: no such index; choose one of {', '.join(NEAR)}")
    if not len(gallery):
        raise BadInput("the gallery to search is empty: no image or caption was read; check the set")
    g, largest = checked(gallery)
    near = NEAR[index](g)

    def find(queries: Tensor, k: int) -> np.ndarray:
        if queries.shape[-1] != g.shape[1]:
            raise BadInput(f"queries have {queries.shape[-1]} dimensions and the gallery {g.shape[1]}: they come from different models")
        q, norm = checked(queries.to(g.device))
        k = min(k, len(g))
        return settle(q, g, near, k, SLACK * max(1.0, norm * largest)).cpu().numpy() if len(q) else np.empty((0, k), np.int64)

    return find


def recall_against_exact(queries: Tensor, gallery: Tensor, found: np.ndarray, most: int = 1000) -> float:
    """Share of the ids found (Q, k) that score no less than the k-th exact neighbour, over at most `most` queries, drawn.

    By scores and not by ids, so that any of several equal rows will do.
    """
    at = keyed.permutation(len(found), 0, "recall")[:most]
    q, ids = queries[at].to(gallery.device), torch.from_numpy(found[at]).to(gallery.device)
    best = torch.from_numpy(search(q, gallery, ids.shape[1])).to(gallery.device)
    reached = rounded(q, gallery, ids) >= rounded(q, gallery, best[:, -1:])
    return float(reached.double().mean())


def checked(x: Tensor) -> tuple[Tensor, float]:
    """The rows in single precision, and the largest norm."""
    x = x.detach().float().contiguous()
    largest = float(x.norm(dim=1).max()) if len(x) else 0.0
    if not math.isfinite(largest):
        raise BadInput("the embeddings hold NaN or infinity: the model diverged or was loaded wrongly; check its checkpoint")
    return x, largest


# ---- ties


def settle(q: Tensor, g: Tensor, near: Near, k: int, slack: float) -> Tensor:
    """(Q, k) ids by (rounded score, id): as found where that is certain, else from the candidates, else from all rows."""
    score, ids = near(q, min(len(g), k + SPARE))
    few = torch.arange(0, len(q), 1 + len(q) // 32, device=g.device)
    error = (score[few] - rounded(q[few], g, ids[few].clamp(min=0)) / DIGITS)[ids[few] >= 0].abs()
    slack = max(slack, 4 * float(error.max())) if len(error) else slack
    out = ids[:, :k].clone()
    full = (ids >= 0).all(1)
    unsure = (~(full & (-score[:, : k + 1].diff(dim=1) > slack).all(1))).nonzero()[:, 0]
    if not len(unsure):
        return out
    key = (rounded(q[unsure], g, ids[unsure].clamp(min=0)) * len(g) - ids[unsure]).topk(k).values
    out[unsure] = -key % len(g)
    last = (key[:, -1] + out[unsure, -1]) // len(g) / DIGITS
    closed = full[unsure] & ((score[unsure, -1] + slack < last) | (ids.shape[1] == len(g)))
    if len(still := unsure[~closed]):
        out[still] = exhaustive(q[still], g, k)
    return out


def rounded(q: Tensor, g: Tensor, ids: Tensor) -> Tensor:
    """(Q, k) scores of the rows `ids` of the gallery in units of 1e-6, computed in double precision."""
    parts = zip(q.split(ROWS // 4), ids.split(ROWS // 4), strict=True)
    return torch.cat([(g[i].double() @ a.double()[:, :, None])[:, :, 0].mul(DIGITS).round().long() for a, i in parts])


def exhaustive(q: Tensor, g: Tensor, k: int) -> Tensor:
    """(Q, k) ids from all rows in double precision. A whole number holds score and id, so that no two are equal."""
    out = []
    for part in q.split(ROWS // 4):
        best = []
        for start, block in blocks(g):
            ids = torch.arange(start, start + len(block), device=g.device)
            key = (part.double() @ block.double().T).mul(DIGITS).round().long() * len(g) - ids
            best.append(key.topk(min(k, len(block))).values)
        out.append(-torch.cat(best, 1).topk(k).values % len(g))
    return torch.cat(out)


def blocks(g: Tensor) -> Iterator[tuple[int, Tensor]]:
    return ((start, g[start : start + BLOCK]) for start in range(0, len(g), BLOCK))


# ---- backends


def library() -> Any:
    """FAISS, or None. Imported when first needed and after torch: both bring an OpenMP, and the other order has crashed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def exact(g: Tensor) -> Near:
    """FAISS on the GPU if it can, on the CPU for what lies there; otherwise torch, where the gallery is."""
    faiss = library()
    gpus = faiss.get_num_gpus() if faiss else 0
    if not faiss or (g.is_cuda and not gpus):
        return by_torch(g)
    flat = faiss.IndexFlatIP(g.shape[1])
    if gpus:
        device = g.device.index if g.is_cuda else torch.cuda.current_device() if torch.cuda.is_available() else 0
        flat = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device, flat)
    few, many, knobs = by_faiss(flat, g), by_torch(g), faiss.cvar

    def near(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if gpus and k > GPU_MOST:
            return many(q, k)
        before, knobs.distance_compute_blas_database_bs = knobs.distance_compute_blas_database_bs, FAISS_BLOCK
        try:
            return few(q, k)
        finally:
            knobs.distance_compute_blas_database_bs = before

    return near


def ivf(g: Tensor) -> Near:
    """Inverted lists: k-means of about 4 sqrt(G) centroids, the low end of FAISS's advice, each with the 39 training rows
    that FAISS asks for; an eighth of them is probed, since texts ask among images, which cluster apart from them."""
    faiss = library() or missing("ivf")
    lists = max(1, min(round(4 * len(g) ** 0.5), len(g) // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(g.shape[1]), g.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # or FAISS warns of a gallery of fewer than 39 rows
    index.nprobe = max(min(8, lists), math.ceil(lists / 8))
    index.train(g.cpu().numpy())
    return by_faiss(index, g)


def hnsw(g: Tensor) -> Near:
    """A graph of 32 links a node, the usual choice for hundreds of dimensions; 128 candidates, or two for each neighbour.
    For rows of one norm. Threads build it in no fixed order, so its ids may vary where its recall is below 1."""
    faiss = library() or missing("hnsw")
    index = faiss.IndexHNSWFlat(g.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 128
    near = by_faiss(index, g)

    def wide_enough(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        index.hnsw.efSearch = max(128, 2 * k)
        return near(q, k)

    return wide_enough


def missing(index: str) -> Any:
    raise BadInput(f"index={index!r} needs FAISS, which is not installed: pip install -e '.[cpu]' (or '.[gpu]'), or use index='exact'")


def by_faiss(index: Any, g: Tensor) -> Near:
    index.add(g.cpu().numpy())

    def near(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        score, ids = index.search(q.cpu().numpy(), k)
        return torch.from_numpy(score).to(g.device), torch.from_numpy(ids).to(g.device)

    return near


def by_torch(g: Tensor) -> Near:
    def near(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, ids = [], []
        for part in q.split(ROWS):
            best = [((part @ block.T).topk(min(k, len(block))), start) for start, block in blocks(g)]
            score, at = torch.cat([top.values for top, _ in best], 1).topk(k)
            scores.append(score)
            ids.append(torch.cat([top.indices + start for top, start in best], 1).gather(1, at))
        return torch.cat(scores), torch.cat(ids)

    return near


NEAR: dict[str, Callable[[Tensor], Near]] = {"exact": exact, "ivf": ivf, "hnsw": hnsw}
