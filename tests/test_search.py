"""What search promises: the largest inner products, ties to the smaller id, the same with every backend, in bounded memory."""
from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmbackdoor import search as module
from mmbackdoor.search import recall_against_exact, search, searcher
from mmbackdoor.types import BadInput


def by_hand(q: Tensor, g: Tensor, k: int) -> np.ndarray:
    scores = (q.double() @ g.double().T).numpy().round(6)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.fixture(params=["faiss", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    return request.param


def units(n: int, d: int = 16, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- exact


@pytest.mark.parametrize(("queries", "n", "k"), [(1, 1, 1), (3, 17, 5), (40, 300, 10), (7, 300, 300), (5, 300, 299), (2, 12, 4)])
def test_search_gives_the_largest_inner_products_in_order(backend: str, queries: int, n: int, k: int) -> None:
    q, g = units(queries), units(n, seed=1)
    assert np.array_equal(search(q, g, k), by_hand(q, g, k))


@pytest.mark.parametrize("k", [1, 4, 10, 30])
def test_ties_go_to_the_smaller_id(backend: str, k: int) -> None:
    """Equal rows are common: the same drawing under two keys, a collapsed encoder."""
    g = torch.eye(8)[[5, 1, 1, 0, 1, 5, 1, 1, 1, 2] * 12]
    q = torch.eye(8)[[1, 5, 7]]  # 72 equal scores, 24 equal scores, and nothing but zeros
    assert np.array_equal(search(q, g, k), by_hand(q, g, k))
    late = torch.eye(8)[[3] * 40 + [1]]  # the best comes last, and drives out one of those that tie
    assert np.array_equal(search(q[:1], late, k), by_hand(q[:1], late, k))
    same = torch.full((50, 8), 8**-0.5)
    assert np.array_equal(search(same, same, k), np.tile(np.arange(k), (50, 1)))


@pytest.mark.parametrize("k", [1, 5])
def test_scores_that_differ_in_the_seventh_digit_tie(backend: str, k: int) -> None:
    """Rows 0 to 29 score 0.5, more or less 1e-7 that single precision may or may not see; row 30 scores 2e-6 more."""
    shift = torch.linspace(-1e-7, 1e-7, 30, dtype=torch.float64)
    g = torch.stack([torch.cat([0.5 + shift, torch.tensor([0.500002])]), torch.zeros(31)], 1).float()
    assert search(torch.tensor([[1.0, 0.0]]), g, k).tolist() == [[30, *range(k - 1)]]


def test_all_backends_agree_on_crowded_galleries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an untrained encoder: every cosine is near 1, so single precision alone would order many pairs by its error."""
    pytest.importorskip("faiss")
    q, g = (nn.functional.normalize(1 + 0.01 * units(n, 64, seed), dim=-1) for n, seed in ((60, 0), (4000, 1)))
    with_faiss = search(q, g, 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert np.array_equal(search(q, g, 10), with_faiss) and np.array_equal(with_faiss, by_hand(q, g, 10))


def test_long_queries_among_short_ones_are_ordered_as_exactly(backend: str) -> None:
    """A score of 1,000 errs by more than the sixth digit."""
    q, g = (nn.functional.normalize(1 + 0.01 * units(n, 64, seed), dim=-1) for n, seed in ((60, 0), (4000, 1)))
    q[1::2] *= 1000
    assert np.array_equal(search(q, g, 10), by_hand(q, g, 10))


def test_asking_for_more_than_there_are_gives_all(backend: str) -> None:
    found = search(units(3), units(4, seed=1), 10)
    assert found.shape == (3, 4) and (np.sort(found, axis=1) == np.arange(4)).all()


def test_no_query_finds_nothing(backend: str) -> None:
    assert search(units(0), units(4), 3).shape == (0, 3)


def test_search_takes_half_precision_and_rows_in_any_layout_and_of_any_norm(backend: str) -> None:
    q, g = units(5), units(50, seed=1)
    assert np.array_equal(search(q.T.contiguous().T, g.T.contiguous().T, 3), by_hand(q, g, 3))
    assert np.array_equal(search(q.bfloat16(), g.bfloat16(), 1), by_hand(q.bfloat16(), g.bfloat16(), 1))
    assert np.array_equal(search(30 * q, 40 * g, 5), by_hand(30 * q, 40 * g, 5))
    assert np.array_equal(search(q.requires_grad_(), g, 2), by_hand(q.detach(), g, 2))


def test_a_gallery_is_indexed_once_for_many_searches(backend: str) -> None:
    g = units(60, seed=1)
    find = searcher(g)
    for seed, k in ((2, 1), (3, 7), (4, 60)):
        assert np.array_equal(find(units(9, seed=seed), k), by_hand(units(9, seed=seed), g, k))


@pytest.mark.parametrize(("rows", "block"), [(4, 3), (8, 16), (7, 50)])
def test_where_blocks_end_changes_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, block: int) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "BLOCK", block)
    q, g = units(23), torch.cat([units(40, seed=1), units(40, seed=1)])  # every row twice
    assert np.array_equal(search(q, g, 6), by_hand(q, g, 6))
    same = torch.ones(45, 4) / 2
    assert np.array_equal(search(same[:13], same, 12), np.tile(np.arange(12), (13, 1)))


def test_only_queries_with_an_open_tie_are_compared_with_all_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    everything = module.exhaustive
    monkeypatch.setattr(module, "exhaustive", lambda q, g, k: asked.append(len(q)) or everything(q, g, k))
    q, g = units(50, 32), units(2000, 32, 1)
    g[100:105] = q[3]  # five rows tie for the first place, and are among the candidates
    assert np.array_equal(search(q, g, 3), by_hand(q, g, 3)) and not asked
    g[100:140] = q[3]
    assert np.array_equal(search(q, g, 3), by_hand(q, g, 3)) and asked == [1]


def test_a_backend_of_low_precision_is_set_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 on a GPU errs in the fourth digit. Here brain floats stand for it."""
    q, g = units(60, 32), units(3000, 32, 1)
    rough = module.by_torch(g.bfloat16().float())
    assert not np.array_equal(rough(q, 5)[1].numpy(), by_hand(q, g, 5))
    monkeypatch.setitem(module.NEAR, "exact", lambda g: rough)
    assert np.array_equal(search(q, g, 5), by_hand(q, g, 5))


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.numel())
        return out


@pytest.mark.parametrize("collapsed", [False, True])
def test_no_matrix_of_all_queries_by_all_rows_is_made(monkeypatch: pytest.MonkeyPatch, collapsed: bool) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "BLOCK", 512)
    q, g = units(1000, 4), units(3000, 4, 1)
    if collapsed:
        q, g = torch.ones_like(q) / 2, torch.ones_like(g) / 2
    with Largest() as seen:
        search(q, g, 5)
    assert 12_000 <= seen.most <= 64 * 512 + 1000 * 13 * 4 < 3_000_000 / 20


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_embeddings_on_a_gpu_find_the_same(backend: str) -> None:
    q, g = units(300, 64), torch.cat([units(5000, 64, 1), units(40, 64, 1)])
    for a, b in ((q.cuda(), g.cuda()), (q, g.cuda()), (q.cuda(), g)):
        assert np.array_equal(search(a, b, 10), by_hand(q, g, 10))
    assert np.array_equal(search(q[:2].cuda(), g.cuda(), 3000), by_hand(q[:2], g, 3000))


def test_faiss_searches_on_a_gpu_when_it_has_one_and_gives_it_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    moved, ks = [], []

    class OnGpu:
        def __init__(self, index: Any):
            self.index, self.add = index, index.add

        def search(self, q: np.ndarray, k: int) -> Any:
            ks.append(k)
            return self.index.search(q, k)

    def index_cpu_to_gpu(resources: str, device: int, index: Any) -> OnGpu:
        moved.append((resources, device))
        return OnGpu(index)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", index_cpu_to_gpu, raising=False)
    q, g = units(2), units(2100, seed=1)
    for k in (10, 2090):
        assert np.array_equal(search(q, g, k), by_hand(q, g, k))
    assert moved == [("resources", 0)] * 2 and ks == [10 + module.SPARE]


def test_faiss_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_database_bs", 777)
    search(units(30), units(50, seed=1), 3)
    assert faiss.cvar.distance_compute_blas_database_bs == 777


# ---- approximate


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("n", [1, 2, 5, 38, 39, 100])
def test_approximate_search_of_small_galleries_is_exact(index: str, n: int, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    q, g = units(20), units(n, seed=1)
    assert np.array_equal(search(q, g, 10, index), by_hand(q, g, 10))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("index", "least"), [("ivf", 0.9), ("hnsw", 0.9)])
def test_approximate_search_finds_most_of_what_lies_in_clusters(index: str, least: float) -> None:
    pytest.importorskip("faiss")
    centres = units(100, 32, 2)
    g = nn.functional.normalize(centres.repeat(50, 1) + 0.5 * units(5000, 32, 1), dim=-1)
    q = nn.functional.normalize(centres.repeat(3, 1) + 0.5 * units(300, 32), dim=-1)
    found, exact = search(q, g, 10, index), by_hand(q, g, 10)
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert recall_against_exact(q, g, found) == pytest.approx(overlap)
    assert least < overlap and found.shape == (300, 10)
    assert all(len(set(row)) == 10 for row in found.tolist())


def test_an_index_that_misses_much_says_so() -> None:
    """Directions without any order are the worst case of inverted lists."""
    pytest.importorskip("faiss")
    q, g = units(200, 64), units(5000, 64, 1)
    found, exact = search(q, g, 10, "ivf"), by_hand(q, g, 10)
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)])
    assert recall_against_exact(q, g, found) == pytest.approx(overlap) and overlap < 0.9


def test_a_query_for_which_an_index_finds_too_few_is_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAISS fills up with -1, which would be taken for the last row."""
    q, g = units(30), units(200, seed=1)
    near = module.by_torch(g)

    def poor(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        score, ids = near(q, k)
        score[::3, 2:], ids[::3, 2:] = -3.4e38, -1
        return score, ids

    monkeypatch.setitem(module.NEAR, "ivf", lambda g: poor)
    assert np.array_equal(search(q, g, 5, "ivf"), by_hand(q, g, 5))

    def poorer(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
        score, ids = module.by_torch(g[:3])(q, k)
        score[:, -1], ids[:, -1] = -3.4e38, -1
        return score, ids

    monkeypatch.setitem(module.NEAR, "ivf", lambda g: poorer)
    assert np.array_equal(search(q, g[:3], 3, "ivf"), by_hand(q, g[:3], 3))


def test_recall_against_exact_counts_what_scores_as_well(backend: str) -> None:
    g = torch.eye(4)[[0, 0, 0, 1, 2, 3]]
    q = torch.tensor([[1.0, 0.5, 0.2, 0.1]])
    for found, share in (([0, 1], 1.0), ([2, 1], 1.0), ([0, 3], 0.5), ([4, 5], 0.0)):  # two of the three equal rows are as good as any
        assert recall_against_exact(q, g, np.array([found])) == share
    assert recall_against_exact(q, g, np.array([[0, 1, 2, 3, 5]])) == 4 / 5  # row 4 is missing


def test_recall_against_exact_asks_at_most_a_thousand_queries_from_the_whole_set() -> None:
    q, g = units(4000), units(50, seed=1)
    found = search(q, g, 1)
    found[::4] = (found[::4] + 1) % 50  # every fourth is wrong, or all of the first half: 4.5 standard deviations are allowed
    assert recall_against_exact(q, g, found) == pytest.approx(0.75, abs=0.062)
    found[:2000] = (search(q[:2000], g, 1) + 1) % 50
    assert recall_against_exact(q, g, found) == pytest.approx(0.375, abs=0.07) == recall_against_exact(q, g, found)
    with Largest() as seen:
        recall_against_exact(q, g, found, most=100)
    assert seen.most <= 100 * 50 * 16


# ---- what cannot work


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["queries", "gallery"])
@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_embeddings_that_are_not_numbers_are_refused(backend: str, side: str, bad: float, index: str) -> None:
    q, g = units(3), units(4, seed=1)
    (q if side == "queries" else g)[1, 1] = bad
    if index == "ivf" and backend == "torch":
        pytest.skip("needs FAISS")
    with pytest.raises(BadInput, match="NaN"):
        search(q, g, 2, index)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index_without_faiss_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BadInput) as raised:
        search(units(3), units(4), 2, index)
    message = str(raised.value)
    assert index in message and "[cpu]" in message and "[gpu]" in message and "\n" not in message


def test_an_unknown_index_an_empty_gallery_and_other_dimensions_are_told(backend: str) -> None:
    for q, g, index, says in ((units(3), units(4), "lsh", "exact, ivf, hnsw"), (units(3), units(0), "exact", "empty"),
                              (units(3, 8), units(4, 16), "exact", "8 dimensions and the gallery 16")):
        with pytest.raises(BadInput) as raised:
            search(q, g, 2, index)
        assert says in str(raised.value) and "\n" not in str(raised.value)
