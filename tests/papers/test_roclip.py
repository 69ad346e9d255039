"""RoCLIP: CLIP in most epochs; in the last of each K an image is matched with the nearest caption of a bank, and captions learn nothing."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import Given, gradients, slow_both_ways, slow_nearest, units, unread
from torch import Tensor

from mmbackdoor import clip, keyed, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.roclip import RoCLIP
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput, Batch

N = 6


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def batches(toy: Path, tiny: CLIP) -> list[Batch]:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(4 * N), strict=False)]
    return [collate(tiny, RoCLIP().views, samples[i : i + N], seed=0, epoch=0) for i in range(0, 4 * N, N)]


def captions(model: CLIP, batch: Batch) -> Tensor:
    with losses.evaluating(model.net):
        return model.net.encode_text(batch["text"], normalize=True)


def begun(model: CLIP, **numbers: int) -> RoCLIP:
    objective = RoCLIP(**numbers)
    objective.setup(model)
    return objective


def rows(n: int, seed: int, twisted: float = 0.3) -> dict[str, Any]:
    """Images, and captions that are not far from them."""
    x = units(keyed.rng(seed), n, 4)
    return {"image": x, "text": torch.nn.functional.normalize(x + twisted * units(keyed.rng(seed, "text"), n, 4), dim=-1)}


def given() -> CLIP:
    return CLIP(Given(), lambda texts: torch.zeros(1), {})


def test_the_defaults_are_the_papers() -> None:
    assert (RoCLIP().every, RoCLIP().bank) == (2, 21_845)
    assert set(RoCLIP().views) == {"image", "text"}


@pytest.mark.parametrize("numbers", [{"every": 0}, {"every": -2}, {"bank": 0}, {"bank": -1}])
def test_a_bank_of_nothing_or_no_epochs_is_refused(tiny: CLIP, numbers: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=r"^[^\n]*--objective.every[^\n]*--objective.bank[^\n]*$"):
        begun(tiny, **numbers)
    begun(tiny, every=1, bank=1)


def test_images_and_captions_are_both_augmented(toy: Path, tiny: CLIP) -> None:
    sample = next(iter(shards.read(str(toy / "train"))))
    for name in ("image", "text"):
        seen = [RoCLIP().views[name](tiny, sample, keyed.rng(i)) for i in range(12)]
        assert len({v.numpy().tobytes() for v in seen}) >= 4


def test_with_every_beyond_the_epochs_it_is_clip(tiny: CLIP, batches: list[Batch]) -> None:
    objective = begun(tiny, every=5, bank=8)
    for epoch in range(4):
        objective.start_epoch(tiny, unread, epoch)
        for batch in batches:
            (ours, g), (theirs, h) = gradients(tiny.net, objective, batch), gradients(tiny.net, losses.Clip(), batch)
            assert torch.equal(ours["loss"], theirs["loss"]) and float(ours["matched"]) == 0
            assert g.keys() == h.keys() and all(torch.equal(g[k], h[k]) for k in g)


@pytest.mark.parametrize("every, matched", [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (6, [5])])
def test_the_last_of_each_k_epochs_is_matched(every: int, matched: list[int]) -> None:
    model, found = given(), []
    objective = begun(model, every=every, bank=4)
    for epoch in range(6):
        objective.start_epoch(model, lambda: [rows(3, 0)], epoch)
        found += [epoch] * bool(objective.loss(model.net, rows(3, 1))["matched"])
    assert found == matched


def test_in_a_matched_epoch_images_learn_and_captions_do_not(tiny: CLIP, batches: list[Batch]) -> None:
    objective = begun(tiny, every=1, bank=2 * N)
    objective.start_epoch(tiny, lambda: batches[:2], 0)
    _, grads = gradients(tiny.net, objective, batches[2])
    assert grads.keys() == {k for k, _ in tiny.net.named_parameters()}, "a tower is left out of the graph"
    images = {k for k in grads if k.startswith("visual.")}
    assert any(grads[k].abs().max() > 0 for k in images) and grads["logit_scale"].abs() > 0
    assert all(not grads[k].any() for k in grads.keys() - images - {"logit_scale"})


def test_in_a_matched_epoch_each_image_is_matched_with_the_nearest_caption_of_the_bank() -> None:
    """Of the bank as it was: the batch's own captions, which are nearer, are not in it yet."""
    model, seen = given(), [rows(5, i) for i in range(3)]
    objective = begun(model, bank=8)
    objective.start_epoch(model, unread, 0)
    for batch in seen:
        objective.loss(model.net, batch)
    held = [row for batch in seen for row in batch["text"]][-8:]
    objective.start_epoch(model, unread, 1)
    for i in range(3, 6):
        batch = rows(5, i, twisted=0.01)
        said = slow_nearest(batch["image"], held)
        loss = float(objective.loss(model.net, batch)["loss"].detach())
        assert loss == pytest.approx(slow_both_ways(batch["image"], said, 5.0), abs=1e-5)
        assert abs(loss - slow_both_ways(batch["image"], batch["text"], 5.0)) > 1e-2, "the example does not tell them apart"
        held = [*held, *batch["text"]][-8:]


def test_in_a_matched_epoch_it_does_not_matter_which_caption_belongs_to_which_image(tiny: CLIP, batches: list[Batch]) -> None:
    found = []
    for turned in (0, 1):
        objective = begun(tiny, every=1, bank=2 * N)
        objective.start_epoch(tiny, lambda: batches[:2], 0)
        found.append(gradients(tiny.net, objective, batches[2] | {"text": batches[2]["text"].roll(turned, 0)}))
    (a, g), (b, h) = found
    assert torch.equal(a["loss"], b["loss"]) and all(torch.equal(g[k], h[k]) for k in g)


def test_the_bank_holds_exactly_the_last_captions_of_all_epochs() -> None:
    model, pushed = given(), []
    objective = begun(model, bank=7)
    for epoch in range(4):
        objective.start_epoch(model, unread, epoch)
        for i, n in enumerate((4, 1, 9, 3)):
            batch = rows(n, 10 * epoch + i)
            objective.loss(model.net, batch)
            pushed += [*batch["text"]]
            want = torch.stack(pushed[-7:])
            alike = objective.captions.rows @ want.T
            assert alike.shape == (len(want), len(want)) and sorted(alike.argmax(0).tolist()) == list(range(len(want)))
            assert torch.allclose(alike.amax(0), torch.ones(len(want)), atol=1e-5)


def test_the_bank_is_filled_before_it_is_first_used(tiny: CLIP, batches: list[Batch]) -> None:
    """With the captions as the model sees them in evaluation, and without reading on when it is full."""
    read = []

    def watched() -> Iterator[Batch]:
        for batch in batches:
            read.append(batch)
            yield batch

    objective = begun(tiny, every=1, bank=N + 2)
    tiny.net.train()
    objective.start_epoch(tiny, watched, 0)
    assert tiny.net.training and len(read) == 2
    want = torch.cat([captions(tiny, b) for b in batches[:2]])[-(N + 2):]
    assert sorted(objective.captions.rows.tolist()) == sorted(want.tolist())
    assert not objective.captions.rows.requires_grad
    objective.start_epoch(tiny, unread, 1)
    watching = given()
    watching.net.train()
    begun(watching, every=1, bank=8).start_epoch(watching, lambda: [rows(5, 0), rows(5, 1)], 0)
    assert watching.net.modes == [False, False] and watching.net.training, "as in evaluation"


def test_a_bank_larger_than_the_data_holds_all_of_it(tiny: CLIP, batches: list[Batch]) -> None:
    objective = begun(tiny, every=1)
    objective.start_epoch(tiny, lambda: batches, 0)
    assert len(objective.captions.rows) == len(batches) * N


def test_a_bank_that_was_fed_in_other_epochs_needs_no_filling_and_survives_a_restart() -> None:
    model = given()
    first, second = begun(model, bank=8), begun(model, bank=8)
    first.start_epoch(model, unread, 0)
    first.loss(model.net, rows(12, 0))
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        objective.start_epoch(model, unread, 1)
    assert torch.equal(first.loss(model.net, rows(5, 1))["loss"], second.loss(model.net, rows(5, 1))["loss"])
    assert torch.equal(first.captions.rows, second.captions.rows)
