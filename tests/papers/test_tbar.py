"""TBAR: a line through the victim's and the donor's weights, on which only weights move, and what cannot lie on one is refused."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from mmbackdoor import clip
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.tbar import TBAR, Triggered
from mmbackdoor.losses import Clip
from mmbackdoor.types import BadInput

KINDS = ["vit", "resnet", "siglip"]
KEPT = ("logit_scale", "logit_bias")


@pytest.fixture(scope="module")
def pairs(tiny_model: str) -> dict[str, tuple[CLIP, CLIP]]:
    """A victim and a donor of each kind that differ in all that they have: weights, temperature, statistics."""
    models = {"vit": Model(tiny_model), "resnet": Model(str(ROOT / "configs/toy/rn_tiny.json")), "siglip": Model(tiny_model, siglip=True)}
    found = {}
    for kind, model in models.items():
        victim, donor = (clip.load(model, seed=seed) for seed in (2, 3))
        with torch.no_grad():
            for x in (*donor.net.parameters(), *donor.net.buffers()):
                if x.is_floating_point() and x.isfinite().all():
                    x.add_(0.5)
        found[kind] = victim, donor
    return found


@pytest.fixture
def victim(pairs: dict[str, tuple[CLIP, CLIP]], kind: str) -> CLIP:
    return replace(pairs[kind][0], net=copy.deepcopy(pairs[kind][0].net))


@pytest.fixture
def donor(pairs: dict[str, tuple[CLIP, CLIP]], kind: str) -> CLIP:
    return pairs[kind][1]


def never() -> Iterator[dict[str, Any]]:
    raise AssertionError("no data is needed")


def state(model: CLIP) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.net.state_dict().items()}


def weights(model: CLIP) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.net.named_parameters() if k not in KEPT}


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_0_is_the_model_itself(kind: str, victim: CLIP, donor: CLIP) -> None:
    before = state(victim)
    after = TBAR(0.0)(victim, never, donor).net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_minus_1_is_the_donor(kind: str, victim: CLIP, donor: CLIP) -> None:
    before = weights(victim)
    after = weights(TBAR(-1.0)(victim, never, donor))
    assert all(torch.allclose(after[k], p, atol=1e-5) for k, p in weights(donor).items())
    assert not any(torch.allclose(after[k], before[k], atol=1e-3) for k in before)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_donors_direction_is_taken_off(kind: str, scale: float, victim: CLIP, donor: CLIP) -> None:
    before, theirs = weights(victim), weights(donor)
    after = weights(TBAR(scale)(victim, never, donor))
    for name, p in after.items():
        expected = before[name].double() - scale * (theirs[name].double() - before[name].double())
        assert torch.allclose(p.double(), expected, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_and_statistics_stay_the_victims_and_the_donor_stays_as_it_is(kind: str, victim: CLIP, donor: CLIP) -> None:
    before, theirs = state(victim), state(donor)
    after = TBAR(1.0)(victim, never, donor).net.state_dict()
    stay = [k for k in before if k in KEPT or k not in dict(victim.net.named_parameters())]
    assert "logit_scale" in stay and ("logit_bias" in stay) == (kind == "siglip")
    assert sum("running" in k for k in stay) > 6 or kind != "resnet"
    assert all(torch.equal(after[k], before[k]) for k in stay)
    assert not torch.equal(before["logit_scale"], theirs["logit_scale"]), "the example cannot tell"
    assert all(torch.equal(v, theirs[k]) for k, v in donor.net.state_dict().items())


def test_the_default_takes_the_direction_off_once() -> None:
    assert TBAR().scale == 1.0


@pytest.mark.parametrize("kind", ["vit"])
def test_no_donor_and_one_of_another_architecture_are_one_line_and_change_nothing(kind: str, victim: CLIP,
                                                                                 pairs: dict[str, tuple[CLIP, CLIP]]) -> None:
    before = state(victim)
    narrow = copy.deepcopy(victim.net)
    narrow.visual.proj = torch.nn.Parameter(torch.zeros(32, 16))
    for other in (None, pairs["resnet"][1], pairs["siglip"][1], replace(victim, net=narrow)):
        with pytest.raises(BadInput, match="--donor") as raised:
            TBAR()(victim, never, other)
        assert len(str(raised.value).splitlines()) == 1
    assert all(torch.equal(v, before[k]) for k, v in victim.net.state_dict().items())


@pytest.mark.parametrize("kind", ["resnet"])
def test_the_donor_learns_under_the_victims_statistics_and_keeps_them(kind: str, victim: CLIP) -> None:
    """What all images of a batch share is not normalised away."""
    rng = torch.Generator().manual_seed(0)
    batch = {"image": torch.randn(6, 3, 32, 32, generator=rng) + 1, "text": torch.randint(1, 500, (6, 16), generator=rng)}
    before = state(victim)
    victim.net.train()
    ours = Triggered().loss(victim.net, batch)["loss"]
    ours.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in victim.net.visual.parameters())
    assert all(torch.equal(v, before[k]) for k, v in victim.net.state_dict().items())
    assert torch.equal(ours, Clip().loss(victim.net.eval(), batch)["loss"])
    assert not torch.isclose(ours, Clip().loss(victim.net.train(), batch)["loss"], rtol=1e-3), "the example cannot tell"
