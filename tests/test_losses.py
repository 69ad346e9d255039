"""Losses against loops, a bank against a list, and looking at a network without changing it."""
from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Given, dot, gradients, slow_both_ways, slow_cross_entropy, slow_nearest, slow_nt_xent, units
from torch import Tensor

from mmbackdoor.clip import CLIP
from mmbackdoor.keyed import rng
from mmbackdoor.losses import Bank, Clip, SigLip, among, both_ways, cross_entropy, evaluating, info_nce, nt_xent, similarities
from mmbackdoor.types import BadInput

SIZES = pytest.mark.parametrize("n", [1, 2, 5])


def pair(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return units(rng(seed, "a"), n, 4), units(rng(seed, "b"), n, 4)


# ---- losses


@SIZES
def test_cross_entropy_and_both_ways_are_what_loops_compute(n: int) -> None:
    a, b = pair(n)
    assert float(cross_entropy(a, b, 7.0)) == pytest.approx(slow_cross_entropy(a, b, 7.0), abs=1e-5)
    assert float(both_ways(a, b, torch.tensor(7.0))) == pytest.approx(slow_both_ways(a, b, 7.0), abs=1e-5)
    assert torch.equal(info_nce(a, b, torch.tensor(7.0)), both_ways(a, b, 7.0))


def test_both_ways_has_no_direction_and_cross_entropy_has() -> None:
    a, b = pair(5)
    assert torch.equal(both_ways(a, b, 7.0), both_ways(b, a, 7.0))
    assert abs(float(cross_entropy(a, b, 7.0) - cross_entropy(b, a, 7.0))) > 1e-3


def test_no_rows_lose_nothing_and_teach_nothing() -> None:
    """A batch without safe pairs, say: a mean over nothing must not be NaN, nor leave anything out of the graph."""
    a, b = (torch.empty(0, 4, requires_grad=True) for _ in range(2))
    loss = both_ways(a, b, 7.0)
    loss.backward()
    assert float(loss.detach()) == 0 and a.grad is not None and b.grad is not None


@SIZES
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_is_what_loops_compute(n: int, temperature: float) -> None:
    a, b = pair(n)
    assert float(nt_xent(a, b, temperature)) == pytest.approx(slow_nt_xent(a, b, temperature), abs=1e-5)


def test_nt_xent_of_one_pair_is_nothing_and_of_its_views_in_order_least() -> None:
    a, b = pair(1)
    assert float(nt_xent(a, b, 0.1)) == pytest.approx(0, abs=1e-6), "with a row itself left out there is one place to look"
    a, b = pair(6)
    assert nt_xent(a, a, 0.1) < nt_xent(a, b, 0.1) and nt_xent(a, a, 0.1) < nt_xent(a, a.roll(1, 0), 0.1)
    assert torch.allclose(nt_xent(a, b, 0.1), nt_xent(b, a, 0.1), atol=1e-6)


def test_clip_is_both_ways_over_the_features() -> None:
    a, b = pair(5)
    out, grads = gradients(Given(), Clip(), {"image": 3 * a, "text": b})
    assert float(out["loss"]) == pytest.approx(slow_both_ways(a, b, 5.0), abs=1e-5) and grads["scale"].abs() > 0


# ---- the bank


def numbered(first: int, n: int) -> Tensor:
    return torch.arange(first, first + n).float()[:, None].repeat(1, 3)


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 7), pushes=st.lists(st.integers(0, 16), min_size=1, max_size=8), restart=st.integers(0, 8))
def test_a_bank_holds_exactly_the_last_rows_that_were_pushed(size: int, pushes: list[int], restart: int) -> None:
    """However they came, and across a restart."""
    bank, pushed = Bank(size), 0
    for i, n in enumerate(pushes):
        if i == restart:
            file = io.BytesIO()
            torch.save(bank.state_dict(), file)
            bank = Bank(size)
            bank.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        bank.push(numbered(pushed, n))
        pushed += n
        held = sorted(bank.rows.tolist())
        assert held == numbered(0, pushed)[-size:].tolist()


def test_a_bank_keeps_values_and_no_ties() -> None:
    bank, rows = Bank(3), torch.ones(2, 3, requires_grad=True)
    bank.push(rows)
    with torch.no_grad():
        rows.zero_()
    assert not bank.rows.requires_grad and torch.equal(bank.rows, torch.ones(2, 3))


def test_a_bank_that_was_loaded_goes_its_own_way() -> None:
    first, second = Bank(3), Bank(3)
    first.push(numbered(0, 3))
    second.load_state_dict(first.state_dict())
    first.push(numbered(9, 2))
    assert sorted(second.rows[:, 0].tolist()) == [0, 1, 2]


def test_the_nearest_row_is_the_most_alike_of_a_loop() -> None:
    g, bank, pushed = rng(0), Bank(20), []
    for n in (8, 8, 8):
        rows = units(g, n, 4)
        bank.push(rows)
        pushed += [*rows]
    x = units(g, 30, 4)
    assert torch.equal(bank.nearest(x), slow_nearest(x, pushed[-20:]))


def test_an_empty_bank_gives_the_row_itself() -> None:
    x = units(rng(0), 3, 4).requires_grad_()
    assert torch.equal(Bank(4).nearest(x), x)


@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_a_bank_keeps_halves_in_single_precision_and_finer_rows_as_they_are(dtype: torch.dtype, kept: torch.dtype) -> None:
    bank, rows = Bank(4), units(rng(0), 6, 4).to(dtype)
    bank.push(rows)
    assert bank.rows.dtype == kept and sorted(bank.rows.tolist()) == sorted(rows[-4:].to(kept).tolist())


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_bank_gives_is_constant_and_of_the_type_that_asks(filled: bool, dtype: torch.dtype) -> None:
    bank, x = Bank(4), units(rng(0), 3, 4).to(dtype).requires_grad_()
    if filled:
        bank.push(x)
    assert bank.nearest(x).dtype == dtype and not bank.nearest(x).requires_grad


# ---- looking at a network


@pytest.mark.parametrize("was", [True, False])
def test_evaluating_leaves_the_mode_as_it_was_and_takes_no_gradients(was: bool) -> None:
    net = Given().train(was)
    with evaluating(net):
        assert not net.training and not torch.is_grad_enabled()
    assert net.training == was and torch.is_grad_enabled()


def test_similarities_are_cosines_in_the_order_of_the_keys_whatever_the_batches() -> None:
    net = Given().train()
    clip = CLIP(net, lambda texts: torch.zeros(1), {})
    a, b = pair(5)
    keys, found = ["d", "b", "e", "a", "c"], []
    for cuts in ((3,), (1, 2), ()):
        batches: list[dict[str, Any]] = [{"key": [keys[i] for i in at], "image": 2 * a[at], "text": b[at]}
                                         for at in map(torch.Tensor.tolist, torch.arange(5).tensor_split(cuts))]
        named, cosines = similarities(clip, batches)
        assert named == sorted(keys) and not cosines.requires_grad
        want = dict(zip(keys, map(dot, a, b), strict=True))
        assert cosines.tolist() == pytest.approx([want[k] for k in named], abs=1e-6)
        found.append(cosines)
    assert all(torch.allclose(f, found[0], atol=1e-7) for f in found)
    assert net.training and not any(net.modes) and len(net.modes) == 12


def test_among_says_which_rows_of_a_batch_are_of_some_keys() -> None:
    batch = {"key": ["a", "b", "c"], "image": torch.zeros(3, 1)}
    found = among(frozenset({"c", "a", "elsewhere"}), batch)
    assert found.tolist() == [True, False, True] and found.dtype == torch.bool
    assert not among(frozenset(), batch).any()


def test_siglip_without_a_bias_is_refused_in_one_line(model):
    with pytest.raises(BadInput, match="--model.siglip"):
        SigLip().setup(model)
