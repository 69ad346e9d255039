"""PAR: beyond its threshold it is CLIP, within it each modality moves away from where the victim had it, and the victim stays put."""
from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from oracles import gradients
from torch import nn

from mmbackdoor import clip, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.par import PAR
from mmbackdoor.stream import collate

N = 6
PROJECTIONS = {"image": "visual.proj", "text": "text_projection"}


@pytest.fixture(scope="module")
def victim(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def batch(toy: Path, victim: CLIP) -> dict[str, Any]:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]
    return collate(victim, PAR().views, samples, seed=0, epoch=0)


def par(victim: CLIP, **options: Any) -> PAR:
    objective = PAR(**options)
    objective.setup(victim)
    return objective


def shifted(victim: CLIP, amount: float = 0.1) -> CLIP:
    """A model near the victim: noise on every weight."""
    net = copy.deepcopy(victim.net)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name != "logit_scale":
                p.add_(amount * p.std() * torch.randn(p.shape, generator=generator))
    return replace(victim, net=net)


def opposite(model: CLIP, *modalities: str) -> CLIP:
    """The same with features of other sign: a squared distance of 4 from those before."""
    net = copy.deepcopy(model.net)
    with torch.no_grad():
        for modality in modalities:
            net.get_parameter(PROJECTIONS[modality]).neg_()
    return replace(model, net=net)


def of(modality: str, name: str) -> bool:
    """Whether a parameter is of the modality's tower."""
    return name != "logit_scale" and name.startswith("visual.") == (modality == "image")


def slow_distances(a: nn.Module, b: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    """Mean over pairs of the squared distance of unit rows, by loops."""
    found = {}
    for modality in PROJECTIONS:
        with torch.no_grad():
            rows = [getattr(net, f"encode_{modality}")(batch[modality]).double() for net in (a, b)]
        x, x0 = ([[v / sum(u * u for u in row) ** 0.5 for v in row] for row in r.tolist()] for r in rows)
        found[modality] = sum((u - v) ** 2 for p, q in zip(x, x0, strict=True) for u, v in zip(p, q, strict=True)) / len(x)
    return found


def test_the_defaults_are_the_papers() -> None:
    assert (PAR().tau, PAR().push) == (2.15, 0.5)
    assert PAR().views is losses.Clip().views


@pytest.mark.parametrize("case", ["tau 0, at the victim", "tau 0, near the victim", "far from the victim"])
def test_beyond_the_threshold_it_is_clip(case: str, victim: CLIP, batch: dict[str, Any]) -> None:
    far = "far" in case
    model = opposite(shifted(victim), "image", "text") if far else shifted(victim) if "near" in case else victim
    out, g = gradients(model.net, par(victim) if far else par(victim, tau=0), batch)
    theirs, h = gradients(model.net, losses.Clip(), batch)
    assert torch.equal(out["loss"], theirs["loss"]) and g.keys() == h.keys()
    assert all(torch.equal(g[k], h[k]) for k in g)
    assert far == (float(out["distance_image"]) > 2.15) and ("at" in case) == (float(out["distance_image"]) < 1e-9)


def test_the_distances_are_means_of_squares_between_unit_rows(victim: CLIP, batch: dict[str, Any]) -> None:
    model = shifted(victim)
    out = gradients(model.net, par(victim), batch)[0]
    expected = slow_distances(model.net, victim.net, batch)
    assert expected["image"] > 1e-3 and abs(expected["image"] - expected["text"]) > 1e-4
    for modality, distance in expected.items():
        assert float(out[f"distance_{modality}"]) == pytest.approx(distance, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("push", [0.5, 3.0])
def test_within_the_threshold_the_loss_is_clips_less_the_weighed_distances(push: float, victim: CLIP, batch: dict[str, Any]) -> None:
    model = shifted(victim)
    out = gradients(model.net, par(victim, push=push), batch)[0]
    assert torch.equal(out["cross"], gradients(model.net, losses.Clip(), batch)[0]["loss"])
    away = float(out["distance_image"] + out["distance_text"])
    assert away > 1e-3 and float(out["loss"]) == pytest.approx(float(out["cross"]) - push * away, abs=1e-5)


def test_descending_the_term_alone_moves_both_modalities_away(victim: CLIP, batch: dict[str, Any]) -> None:
    model, objective = shifted(victim), par(victim, tau=4.0)
    before = slow_distances(model.net, victim.net, batch)
    pushed, plain = (gradients(model.net, o, batch)[1] for o in (objective, losses.Clip()))
    term = {k: pushed[k] - plain[k] for k in pushed}
    length = torch.stack([g.square().sum() for g in term.values()]).sum().sqrt()
    assert length > 1e-4
    with torch.no_grad():
        for name, p in model.net.named_parameters():
            p.sub_(0.02 / length * term[name])
    after = slow_distances(model.net, victim.net, batch)
    assert all(after[k] > before[k] + 1e-4 for k in before)


@pytest.mark.parametrize(("far", "near"), [("image", "text"), ("text", "image")])
def test_each_modality_has_its_own_threshold(far: str, near: str, victim: CLIP, batch: dict[str, Any]) -> None:
    model = opposite(shifted(victim), far)
    out, g = gradients(model.net, par(victim), batch)
    theirs, h = gradients(model.net, losses.Clip(), batch)
    assert float(out[f"distance_{far}"]) > 2.15 > float(out[f"distance_{near}"]) > 1e-3
    assert float(out["loss"]) == pytest.approx(float(theirs["loss"] - 0.5 * out[f"distance_{near}"]), abs=1e-5)
    assert all(torch.equal(g[k], h[k]) for k in g if not of(near, k))
    pushed = [k for k in g if of(near, k) and not torch.allclose(g[k], h[k], atol=1e-7, rtol=1e-4)]
    assert PROJECTIONS[near] in pushed


def test_at_the_threshold_itself_there_still_is_a_push(victim: CLIP, batch: dict[str, Any]) -> None:
    model = shifted(victim)
    distance = float(gradients(model.net, par(victim), batch)[0]["distance_image"])
    at, below = (gradients(model.net, par(victim, tau=tau), batch)[1]["visual.proj"] for tau in (distance, distance * (1 - 1e-6)))
    assert torch.equal(below, gradients(model.net, losses.Clip(), batch)[1]["visual.proj"]) and not torch.equal(at, below)


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_the_victim_stays_as_it_was_while_the_model_trains(network: str, tiny_model: str, batch: dict[str, Any]) -> None:
    model = clip.load(Model(tiny_model if network == "vit" else str(ROOT / "configs/toy/rn_tiny.json")), seed=2)
    was = {k: v.clone() for k, v in model.net.state_dict().items()}
    objective = par(model)
    model.net.train()
    optimizer = torch.optim.AdamW([p for p in model.net.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        objective.loss(model.net, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(m.training for m in objective.before.modules()) and all(p.grad is None for p in objective.before.parameters())
    assert not all(torch.equal(v, was[k]) for k, v in model.net.state_dict().items())
    kept = objective.before.state_dict()
    assert kept.keys() == was.keys() and all(torch.equal(kept[k], was[k]) for k in was)


def test_a_resumed_run_is_pushed_from_the_same_victim(victim: CLIP, batch: dict[str, Any], tiny_model: str) -> None:
    model, objective = shifted(victim), par(victim)
    torch.save(objective.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = par(clip.load(Model(tiny_model), seed=9))
    elsewhere = gradients(model.net, resumed, batch)[0]["distance_image"]
    resumed.load_state_dict(torch.load(file, weights_only=True))
    ours, theirs = (gradients(model.net, o, batch)[0] for o in (objective, resumed))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and not torch.equal(elsewhere, ours["distance_image"])
