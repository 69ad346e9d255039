"""ABD: without a perturbation it is CleanCLIP; the perturbation is one for all images, within bounds, climbs the loss, and is resumed."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import gradients
from torch import Tensor, nn

from mmbackdoor import clip, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses import abd
from mmbackdoor.defenses.abd import ABD
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.stream import collate

N = 6


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def batch(toy: Path, tiny: CLIP) -> dict[str, Any]:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]
    return collate(tiny, CleanCLIP().views, samples, seed=0, epoch=0)


@pytest.fixture(scope="module")
def grey(tiny: CLIP, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with augmented images that are far from black and white."""
    pixels = 0.25 + 0.5 * torch.rand(N, 3, *tiny.size, generator=torch.Generator().manual_seed(0))
    return batch | {"image_aug": tiny.normalise(pixels)}


class Recording(nn.Module):
    """A network, and the images that it was shown."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        self.seen.append((image.detach().clone(), text))
        return self.net(image, text)


def started(model: CLIP, **options: Any) -> ABD:
    objective = ABD(**options)
    objective.setup(model)
    return objective


def pixels(model: CLIP, x: Tensor) -> Tensor:
    """(N, 3, H, W) normalised -> in [0, 1]."""
    mean, std = (torch.tensor(model.cfg[k])[:, None, None] for k in ("mean", "std"))
    return x * std + mean


def same_as_cleanclip(model: CLIP, objective: ABD, batch: dict[str, Any], **weights: float) -> bool:
    ours, g = gradients(model.net, objective, batch)
    theirs, h = gradients(model.net, CleanCLIP(**weights), batch)
    return (ours.keys() == theirs.keys() and g.keys() == h.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
            and all(torch.equal(g[k], h[k]) for k in g))


@pytest.mark.parametrize("weights", [{}, {"cross": 0.3, "inmodal": 2.0}], ids=["defaults", "weighed"])
def test_without_room_it_is_cleanclip_at_every_step(weights: dict[str, float], tiny: CLIP, batch: dict[str, Any]) -> None:
    objective = started(tiny, epsilon=0.0, **weights)
    assert all(same_as_cleanclip(tiny, objective, batch, **weights) for _ in range(3))
    assert not objective.delta.any()


def test_the_first_step_is_cleanclips_and_the_second_is_not(tiny: CLIP, batch: dict[str, Any]) -> None:
    objective = started(tiny)
    assert same_as_cleanclip(tiny, objective, batch) and not same_as_cleanclip(tiny, objective, batch)


def test_its_views_are_cleanclips(tiny: CLIP, toy: Path, batch: dict[str, Any]) -> None:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]
    ours = collate(tiny, ABD().views, samples, seed=0, epoch=0)
    assert ours.keys() == batch.keys() and all(torch.equal(ours[k], batch[k]) for k in ours if k != "key")


def test_the_perturbation_stays_within_epsilon_and_pixels_within_black_and_white(tiny: CLIP, batch: dict[str, Any]) -> None:
    extreme = torch.zeros(N, 3, *tiny.size)
    extreme[N // 2:] = 1
    batch = batch | {"image_aug": tiny.normalise(extreme)}
    objective, net = started(tiny, epsilon=0.25, step=0.1), Recording(tiny.net)
    for i in range(5):
        objective.loss(net, batch)["loss"].backward()
        assert objective.delta.abs().max() <= min(0.25, 0.1 * i) + 1e-7
    assert float(objective.delta.detach().abs().max()) == pytest.approx(0.25), "the example does not reach the bound"
    shown = pixels(tiny, net.seen[-1][0].chunk(2)[1])
    assert shown.min() >= -1e-6 and shown.max() <= 1 + 1e-6
    away = (shown - extreme).abs()
    assert away.max() <= 0.25 + 1e-6 and away[:N // 2].max() > 0.2 and away[N // 2:].max() > 0.2


def test_all_augmented_images_carry_the_same_perturbation_and_the_originals_none(tiny: CLIP, grey: dict[str, Any]) -> None:
    objective, net = started(tiny), Recording(tiny.net)
    for _ in range(3):
        objective.loss(net, grey)["loss"].backward()
    assert len(net.seen) == 3, "more than one pass through the network a step"
    shown, texts = net.seen[-1]
    assert torch.equal(shown[:N], grey["image"]) and torch.equal(texts, torch.cat([grey["text"], grey["text_aug"]]))
    added = pixels(tiny, shown[N:]) - pixels(tiny, grey["image_aug"])
    assert torch.allclose(added, objective.delta.detach().expand_as(added), atol=1e-6) and added.abs().max() > 2 / 255


def test_a_climb_is_a_signed_step_up_the_loss(tiny: CLIP, grey: dict[str, Any]) -> None:
    d = torch.zeros(3, *tiny.size, requires_grad=True)
    perturbed = grey | {"image_aug": tiny.normalise(pixels(tiny, grey["image_aug"]) + d)}
    up = torch.autograd.grad(CleanCLIP().loss(tiny.net, perturbed)["loss"], d)[0]
    objective = started(tiny, step=0.01)
    for _ in range(2):
        gradients(tiny.net, objective, grey)
    clear = up.abs() > 1e-3 * up.abs().max()  # what is next to nothing has a sign by rounding
    assert clear.float().mean() > 0.9
    assert torch.equal(objective.delta.detach()[clear], (0.01 * up.sign())[clear])


def test_a_gradient_is_climbed_once(tiny: CLIP, grey: dict[str, Any]) -> None:
    objective = started(tiny)
    gradients(tiny.net, objective, grey)
    objective.climb()
    once = objective.delta.detach().clone()
    objective.climb()
    assert once.any() and torch.equal(objective.delta.detach(), once)


def test_climbing_raises_the_loss_of_a_model_that_stands_still(tiny: CLIP, grey: dict[str, Any]) -> None:
    objective = started(tiny)
    plain = gradients(tiny.net, objective, grey)[0]
    for _ in range(5):
        climbed = gradients(tiny.net, objective, grey)[0]
    assert climbed["inmodal"] > plain["inmodal"] + 1e-3 and torch.allclose(climbed["cross"], plain["cross"], atol=1e-6)
    mirrored = started(tiny)
    mirrored.delta = -objective.delta.detach()
    assert mirrored.loss(tiny.net, grey)["inmodal"] < climbed["inmodal"]


def test_a_gradient_that_is_no_number_does_not_spoil_the_perturbation(tiny: CLIP, grey: dict[str, Any]) -> None:
    """Half precision overflows now and then, and the optimizer skips that step."""
    objective = started(tiny)
    objective.delta.grad = torch.full_like(objective.delta, torch.nan)
    objective.delta.grad[0] = torch.inf
    objective.climb()
    assert objective.delta.isfinite().all() and gradients(tiny.net, objective, grey)[0]["loss"].isfinite()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_resumed_run_climbs_as_an_unbroken_one(steps: int, tiny: CLIP, grey: dict[str, Any]) -> None:
    unbroken = started(tiny)
    for _ in range(steps):
        gradients(tiny.net, unbroken, grey)
    torch.save(unbroken.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = started(tiny)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        a, b = (gradients(tiny.net, o, grey)[0] for o in (unbroken, resumed))
        assert torch.equal(unbroken.delta, resumed.delta) and all(torch.equal(a[k], b[k]) for k in a)
    assert unbroken.delta.any()


def test_the_gradient_that_is_saved_is_that_of_all_processes(tiny: CLIP, grey: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process saves, and every process goes on from what it saved."""
    alone = started(tiny)
    gradients(tiny.net, alone, grey)
    objective = started(tiny)
    others = torch.full_like(alone.delta.grad, -1.0)
    monkeypatch.setattr(abd, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda g: g.add_(others))
    gradients(tiny.net, objective, grey)
    saved = {k: v.clone() for k, v in objective.state_dict().items()}
    objective.climb()
    assert torch.equal(saved["up"].sign(), (alone.delta.grad + others).sign())
    assert torch.equal(objective.delta.detach(), (2 / 255 * saved["up"].sign()).clamp(-8 / 255, 8 / 255))
