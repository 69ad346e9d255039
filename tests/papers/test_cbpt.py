"""CBPT: a patch that makes images alike is found, and only words before class names are learned against it."""
from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmbackdoor import keyed, shards
from mmbackdoor.clip import CLIP
from mmbackdoor.defenses.cbpt import CBPT, class_view
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[dict[str, Any]]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(24), strict=False)]


def begun(model: CLIP, samples: list[dict[str, Any]], **numbers: Any) -> tuple[CLIP, CBPT, dict[str, Any]]:
    victim = replace(model, net=copy.deepcopy(model.net), card=copy.deepcopy(model.card))
    objective = CBPT(CLASSES, **numbers)
    objective.setup(victim)
    batch = collate(victim.front(), objective.views, samples, 0, 0)
    objective.start_epoch(victim, lambda: [batch], 0)
    return victim, objective, batch


def test_the_class_of_a_pair_is_the_longest_name_in_its_caption(model: CLIP) -> None:
    view = lambda text, classes: int(class_view(model, {"text": text}, keyed.rng(0), classes))  # noqa: E731
    assert view("a Red Star on grey", ("star", "red star", "ring")) == 1
    assert view("stars and rings", ("star", "ring")) == -100


def test_the_patch_makes_images_alike_and_unlike_what_they_were(model: CLIP, samples: list[dict[str, Any]]) -> None:
    victim, objective, batch = begun(model, samples, steps=60)
    untrained = begun(model, samples, steps=0)[1].found

    def measures(found: torch.Tensor) -> tuple[float, float]:
        with torch.no_grad():
            x, z = victim.image_features(batch["image"]), victim.image_features(objective.stamped(batch["image"], found))
        return float((x * z).sum(1).mean()), float((z @ z.T).mean())

    (own0, together0), (own, together) = measures(untrained), measures(objective.found)
    assert own - together < own0 - together0 - 0.05
    assert objective.found.shape == (4, 32, 32)


def test_the_patch_is_looked_for_once(model: CLIP, samples: list[dict[str, Any]]) -> None:
    victim, objective, batch = begun(model, samples, steps=2)
    found = objective.found.clone()
    objective.start_epoch(victim, lambda: [batch], 1)
    assert torch.equal(objective.found, found)


def test_only_the_words_are_trained_and_they_come_to_name_the_classes(model: CLIP, samples: list[dict[str, Any]]) -> None:
    victim, objective, batch = begun(model, samples, steps=2, words=2)
    assert [name for name, p in victim.net.named_parameters() if p.requires_grad] == ["class_prompts.words"]
    before = {k: v.clone() for k, v in victim.net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in victim.net.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        out = objective.loss(victim.net, batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out["loss"].detach()))
    assert {k for k, v in victim.net.state_dict().items() if not torch.equal(v, before[k])} == {"class_prompts.words"}
    assert losses[-1] < losses[0]


def test_the_loss_is_the_cross_entropy_of_named_pairs_with_and_without_the_patch(model: CLIP, samples: list[dict[str, Any]]) -> None:
    victim, objective, batch = begun(model, samples, steps=2, triggered=0.5)
    y = batch["class"]
    some = batch | {"class": torch.where(torch.arange(len(y)) < 4, -100, y)}
    out = objective.loss(victim.net, some)
    with torch.no_grad():
        w, s = victim.class_features(CLASSES), victim.net.logit_scale.exp()
        assert w is not None
        clean, hit = (F.cross_entropy(s * victim.image_features(x)[4:] @ w.T, y[4:])
                      for x in (batch["image"], objective.stamped(batch["image"], objective.found)))
    assert float(out["clean"]) == pytest.approx(float(clean), abs=1e-5) and float(out["triggered"]) == pytest.approx(float(hit), abs=1e-5)
    assert float(out["loss"]) == pytest.approx(float(clean + 0.5 * hit), abs=1e-5)
    assert float(out["named"]) == pytest.approx(20 / 24)


def test_a_batch_that_names_no_class_teaches_nothing(model: CLIP, samples: list[dict[str, Any]]) -> None:
    victim, objective, batch = begun(model, samples, steps=2)
    objective.loss(victim.net, batch | {"class": torch.full_like(batch["class"], -100)})["loss"].backward()
    assert float(victim.net.class_prompts.words.grad.abs().max()) == 0


@pytest.mark.parametrize("classes", [("dog",), ("dog", "dog"), ()])
def test_fewer_than_two_classes_are_refused_in_one_line(model: CLIP, classes: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match="--objective.classes"):
        CBPT(classes).setup(model)
