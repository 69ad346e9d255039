"""SafeCLIP: modalities by themselves, then a slow epoch of CLIP, then CLIP for the pairs that two Gaussians call safe."""
from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Given, gradients, slow_cross_entropy, slow_nearest, units, unread
from torch import Tensor

from mmbackdoor import clip, keyed, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.safeclip import SafeCLIP, upper
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput, Batch

N = 6
WARM, SLOW, SPLIT = 0, 5, 6
"""Epochs of each kind, by the paper's numbers."""
SCALE = 5.0


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def batch(toy: Path, tiny: CLIP) -> Batch:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]
    return collate(tiny, SafeCLIP().views, samples, seed=0, epoch=0)


def begun(model: CLIP, epoch: int, safe: frozenset[str] = frozenset(), **numbers: Any) -> SafeCLIP:
    """At the start of an epoch; after the warm-up with these pairs safe, as a run is that goes on within the epoch."""
    objective = SafeCLIP(**numbers)
    objective.setup(model)
    if epoch >= SPLIT:
        objective.load_state_dict(objective.state_dict() | {"safe": sorted(safe), "share": 0.5, "split_for": epoch})
    objective.start_epoch(model, unread, epoch)
    return objective


def given() -> CLIP:
    return CLIP(Given(SCALE), lambda texts: torch.zeros(1), {})


def rows(n: int, seed: int) -> Batch:
    return {"key": [f"{i}" for i in range(n)]} | {k: units(keyed.rng(seed, k), n, 4) for k in SafeCLIP().views}


def of_cosines(cosines: Tensor) -> list[Batch]:
    """Two batches of pairs whose image and caption are that alike for the network `Given`."""
    text = torch.stack([cosines, (1 - cosines**2).sqrt()], 1)
    return [{"key": [f"{i}" for i in part.tolist()], "image": torch.tensor([[1.0, 0.0]]).repeat(len(part), 1), "text": text[part]}
            for part in torch.arange(len(cosines)).tensor_split(2)]


def groups(low: int, high: int, seed: int = 0, apart: float = 0.6) -> tuple[Tensor, Tensor]:
    """Cosines of two groups in a mixed order, and which are of the upper one."""
    g = keyed.rng(seed, "groups")
    values = torch.cat([0.1 + 0.02 * torch.randn(low, generator=g), 0.1 + apart + 0.02 * torch.randn(high, generator=g)])
    order = torch.randperm(low + high, generator=g)
    return values[order], (torch.arange(low + high) >= low)[order]


def keys(mask: Tensor) -> frozenset[str]:
    return frozenset(str(i) for i in mask.nonzero()[:, 0].tolist())


def restarted(objective: SafeCLIP, model: CLIP) -> SafeCLIP:
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    again = SafeCLIP(**{k: getattr(objective, k) for k in ("warmup", "slow", "most", "growth")})
    again.setup(model)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return again


def test_the_defaults_are_the_papers() -> None:
    s = SafeCLIP()
    assert (s.warmup, s.slow, s.slowness, s.threshold, s.growth, s.most, s.bank, s.cross_aug) == (5, 1, 0.01, 0.9, 0.01, 0.85, 256, True)
    assert set(s.views) == {"image", "text", "image_aug", "text_aug"}


@pytest.mark.parametrize("bank", [0, -1])
def test_a_bank_of_nothing_is_refused(bank: int) -> None:
    with pytest.raises(BadInput, match=r"^--objective.bank [^\n]*$"):
        SafeCLIP(bank=bank).setup(given())


# ---- phases


def test_only_the_slow_epoch_is_slow() -> None:
    assert [SafeCLIP().pace(e) for e in range(9)] == [1, 1, 1, 1, 1, 0.01, 1, 1, 1]
    assert [SafeCLIP(warmup=1, slow=2, slowness=0.5).pace(e) for e in range(5)] == [1, 0.5, 0.5, 1, 1]
    assert all(SafeCLIP(slow=0).pace(e) == 1 for e in range(9))


def test_no_pair_is_safe_in_the_warm_up_every_pair_in_the_slow_epoch_and_neither_reads_the_data_before() -> None:
    model = given()
    for epoch in range(SPLIT):
        out = begun(model, epoch).loss(model.net, rows(4, 0))
        if epoch < SLOW:
            assert float(out["safe"]) == float(out["cross"]) == 0 and torch.equal(out["loss"], out["unimodal"])
        else:
            assert float(out["safe"]) == 1 and float(out["unimodal"]) == 0 and torch.equal(out["loss"], out["cross"])


def test_the_phases_follow_each_other_in_one_run() -> None:
    model, (cosines, _) = given(), groups(60, 40)
    objective = SafeCLIP(warmup=1, slow=1)
    objective.setup(model)
    shares = []
    for epoch in range(4):
        objective.start_epoch(model, lambda: of_cosines(cosines), epoch)
        shares.append(float(objective.loss(model.net, rows(100, epoch))["safe"]))
    assert shares == pytest.approx([0, 1, 0.4, 0.41])


# ---- the warm-up


def test_in_the_warm_up_it_does_not_matter_which_caption_belongs_to_which_image(tiny: CLIP, batch: Batch) -> None:
    turned = batch | {k: batch[k].roll(1, 0) for k in ("text", "text_aug")}
    one, other = begun(tiny, WARM), begun(tiny, WARM)
    for _ in range(2):  # from an empty bank, and from one that is not
        (a, g), (b, h) = gradients(tiny.net, one, batch), gradients(tiny.net, other, turned)
        assert torch.allclose(a["loss"], b["loss"], atol=1e-6) and float(a["loss"]) > 0
        assert all(torch.allclose(g[k], h[k], atol=1e-5, rtol=1e-3) for k in g)
    plain = [gradients(tiny.net, begun(tiny, SLOW), b)[0]["loss"] for b in (batch, turned)]
    assert not torch.allclose(*plain, atol=1e-4), "the example does not tell pairings apart"


def test_in_the_warm_up_the_nearest_of_a_bank_must_find_the_augmented_view() -> None:
    model, held = given(), {"image": [], "text": []}
    objective = begun(model, WARM, bank=7)
    for seed in range(4):
        b = rows(5, seed)
        near = {k: slow_nearest(b[k], held[k]) for k in held}
        want = sum(slow_cross_entropy(near[k], b[f"{k}_aug"], SCALE) for k in held) / 2
        assert float(objective.loss(model.net, b)["loss"].detach()) == pytest.approx(want, abs=1e-5)
        held = {k: [*held[k], *b[k]][-7:] for k in held}


# ---- safe pairs


@pytest.mark.parametrize("how", ["slow", "safe"])
def test_with_everything_safe_and_no_augmented_partners_it_is_clip(tiny: CLIP, batch: Batch, how: str) -> None:
    plain = {k: batch[k] for k in ("image", "text")}
    objective = begun(tiny, SLOW if how == "slow" else SPLIT, frozenset(batch["key"]), cross_aug=False)
    (ours, g), (theirs, h) = gradients(tiny.net, objective, batch), gradients(tiny.net, losses.Clip(), plain)
    assert torch.allclose(ours["loss"], theirs["loss"], atol=1e-6) and g.keys() == h.keys()
    for name in g:
        assert torch.allclose(g[name], h[name], atol=1e-6, rtol=1e-4), name
    model, b = given(), rows(5, 0)
    exact = begun(model, SLOW if how == "slow" else SPLIT, frozenset(b["key"]), cross_aug=False)
    assert torch.equal(exact.loss(model.net, b)["loss"], losses.Clip().loss(model.net, b)["loss"])


def test_with_everything_safe_it_is_clip_against_the_augmented_view_of_the_other_side() -> None:
    model, b = given(), rows(5, 0)
    objective = begun(model, SPLIT, frozenset(b["key"]))
    want = (slow_cross_entropy(b["image"], b["text_aug"], SCALE) + slow_cross_entropy(b["text"], b["image_aug"], SCALE)) / 2
    assert float(objective.loss(model.net, b)["loss"].detach()) == pytest.approx(want, abs=1e-5)


def test_slow_epochs_are_clip_of_the_pairs_as_they_are() -> None:
    model, b = given(), rows(5, 0)
    objective = begun(model, SLOW, frozenset())
    want = (slow_cross_entropy(b["image"], b["text"], SCALE) + slow_cross_entropy(b["text"], b["image"], SCALE)) / 2
    assert float(objective.loss(model.net, b)["loss"].detach()) == pytest.approx(want, abs=1e-5)


def test_each_loss_is_over_its_own_rows() -> None:
    model, first, b = given(), rows(5, 1), rows(7, 0)
    safe, rest = [1, 2, 4, 6], [0, 3, 5]
    objective = begun(model, SPLIT, frozenset(str(i) for i in safe) | {"of another batch"})
    objective.loss(model.net, first)  # fills the banks, with safe rows and others
    near = {k: slow_nearest(b[k], [*first[k]]) for k in ("image", "text")}
    cross = (slow_cross_entropy(b["image"][safe], b["text_aug"][safe], SCALE)
             + slow_cross_entropy(b["text"][safe], b["image_aug"][safe], SCALE)) / 2
    alone = sum(slow_cross_entropy(near[k][rest], b[f"{k}_aug"][rest], SCALE) for k in near) / 2
    out = {k: float(v.detach()) for k, v in objective.loss(model.net, b).items()}
    assert out == pytest.approx({"loss": cross + alone, "cross": cross, "unimodal": alone, "safe": 4 / 7}, abs=1e-5)


def test_it_does_not_matter_whose_the_captions_of_unsafe_pairs_are(tiny: CLIP, batch: Batch) -> None:
    """Which is the defense: the caption of a poisoned pair is not tied to its image."""
    def turned(at: list[int]) -> Batch:
        order = torch.arange(N)
        order[at] = order[at].roll(1)
        return batch | {k: batch[k][order] for k in ("text", "text_aug")}

    unsafe, safe = [0, 2, 5], [1, 3, 4]
    of_safe = frozenset(batch["key"][i] for i in safe)
    straight, swapped, wrong = (gradients(tiny.net, begun(tiny, SPLIT, of_safe), b) for b in (batch, turned(unsafe), turned(safe)))
    assert torch.allclose(straight[0]["loss"], swapped[0]["loss"], atol=1e-6)
    assert all(torch.allclose(straight[1][k], swapped[1][k], atol=1e-5, rtol=1e-3) for k in straight[1])
    assert not torch.allclose(straight[0]["loss"], wrong[0]["loss"], atol=1e-4)


# ---- the split


@pytest.mark.parametrize("low, high", [(170, 30), (30, 170), (100, 100), (3, 2)])
def test_two_groups_that_are_apart_are_found(low: int, high: int) -> None:
    cosines, of_upper = groups(low, high)
    p = upper(cosines)
    assert p.shape == (low + high,) and ((p >= 0) & (p <= 1)).all()
    assert ((p > 0.9) == of_upper.numpy()).all() and ((p < 0.1) == ~of_upper.numpy()).all()


def test_the_mixture_is_a_function_of_the_cosines_and_disturbs_no_generator() -> None:
    cosines, _ = groups(60, 40, apart=0.05)
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = upper(cosines)
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert (upper(cosines) == first).all()


def test_the_first_split_takes_the_upper_group() -> None:
    model, (cosines, high) = given(), groups(70, 30)
    objective = SafeCLIP()
    objective.setup(model)
    model.net.train()
    objective.start_epoch(model, lambda: of_cosines(cosines), SPLIT)
    assert objective.safe == keys(high) and objective.share == pytest.approx(0.3)
    assert model.net.training and not any(model.net.modes), "the network is looked at in evaluation mode"


def test_the_share_grows_by_the_growth_each_epoch_up_to_the_most() -> None:
    """In order of the probability, so that what was surely safe stays so."""
    model, (cosines, high) = given(), groups(140, 60)
    objective, sizes = SafeCLIP(most=0.335), []
    objective.setup(model)
    for epoch in range(SPLIT, SPLIT + 6):
        objective.start_epoch(model, lambda: of_cosines(cosines), epoch)
        sizes.append(len(objective.safe))
        assert objective.safe >= keys(high)
    assert sizes == [60, 62, 64, 66, 67, 67]


def wide_and_narrow() -> Tensor:
    """Cosines of a narrow group inside a wide one: the highest of all are of the lower Gaussian."""
    g = keyed.rng(0, "wide")
    return torch.cat([0.3 + 0.15 * torch.randn(120, generator=g), 0.5 + 0.01 * torch.randn(80, generator=g)])


@pytest.mark.parametrize("cosines", [groups(120, 80, apart=0.05)[0], wide_and_narrow()], ids=["alike", "wide and narrow"])
def test_those_of_the_highest_probability_are_safe_when_the_groups_overlap(cosines: Tensor) -> None:
    model = given()
    objective = SafeCLIP(growth=0.2)
    objective.setup(model)
    for epoch in (SPLIT, SPLIT + 1):
        objective.start_epoch(model, lambda: of_cosines(cosines), epoch)
        names, seen = losses.similarities(model, of_cosines(cosines))
        safe = np.array([name in objective.safe for name in names])
        p = upper(seen)
        assert 0 < safe.sum() < 200 and p[safe].min() >= p[~safe].max()
        assert ((p > 0.9) == safe).all() or epoch > SPLIT


def test_among_equal_probabilities_the_higher_cosine_comes_first() -> None:
    model, (cosines, high) = given(), groups(80, 20)
    assert (upper(cosines)[high.numpy()] == 1).all(), "the example has no ties"
    objective = SafeCLIP(most=0.1)
    objective.setup(model)
    for epoch in (SPLIT, SPLIT + 1):
        objective.start_epoch(model, lambda: of_cosines(cosines), epoch)
    assert objective.safe == keys(cosines >= cosines.sort(descending=True).values[10 - 1])


def test_going_on_within_an_epoch_keeps_the_split() -> None:
    """The network has changed since; another split would show the rest of the epoch other pairs."""
    model, (cosines, high) = given(), groups(70, 30)
    objective = SafeCLIP()
    objective.setup(model)
    objective.start_epoch(model, lambda: of_cosines(cosines), SPLIT)
    again = restarted(objective, model)
    for o in (objective, again):
        o.start_epoch(model, lambda: of_cosines(cosines.flip(0)), SPLIT)
        assert (o.safe, o.share) == (keys(high), pytest.approx(0.3))
    for o in (objective, again):
        o.start_epoch(model, lambda: of_cosines(cosines.flip(0)), SPLIT + 1)
        assert o.share == pytest.approx(0.31) and o.safe >= keys(high.flip(0)), "the next epoch splits anew"
    assert objective.safe == again.safe


def test_a_run_that_goes_on_within_the_slow_epoch_is_still_in_it() -> None:
    model, b = given(), rows(4, 0)
    objective = restarted(begun(model, SLOW), model)
    objective.start_epoch(model, unread, SLOW)
    assert float(objective.loss(model.net, b)["safe"]) == 1


def test_without_warm_up_and_slow_epochs_the_first_epoch_splits() -> None:
    model, (cosines, high) = given(), groups(70, 30)
    objective = SafeCLIP(warmup=0, slow=0)
    objective.setup(model)
    objective.start_epoch(model, lambda: of_cosines(cosines), 0)
    assert objective.safe == keys(high) and math.isclose(objective.share, 0.3)
