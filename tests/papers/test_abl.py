"""ABL: which pairs are set aside, that their loss goes up to chance and no further, that the others see CLIP, and when it begins."""
from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import gradients
from torch import Tensor

from mmbackdoor import clip, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.abl import ABL
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput

N = 8
Batches = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def batches(toy: Path, tiny: CLIP) -> Batches:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(4 * N), strict=False)]
    return [collate(tiny, ABL().views, samples[i:i + N], seed=0, epoch=0) for i in range(0, 4 * N, N)]


@pytest.fixture(scope="module")
def fitted(tiny: CLIP, batches: Batches) -> CLIP:
    """A model that knows the first batch's pairs better than chance."""
    model = replace(tiny, net=copy.deepcopy(tiny.net))
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=2e-3)
    for _ in range(25):
        losses.Clip().loss(model.net, batches[0])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def started(model: CLIP, **options: Any) -> ABL:
    objective = ABL(**options)
    objective.setup(model)
    return objective


def setting_aside(batch: dict[str, Any], rows: range, **options: Any) -> ABL:
    objective = ABL(**options)
    objective.isolated = frozenset(batch["key"][i] for i in rows)
    return objective


def never() -> Iterator[dict[str, Any]]:
    raise AssertionError("the data was read again")


def cosines(model: CLIP, batches: Batches) -> dict[str, float]:
    """Of each pair by its key, one by one."""
    found = {}
    model.net.eval()
    with torch.no_grad():
        for batch in batches:
            for key, image, text in zip(batch["key"], batch["image"], batch["text"], strict=True):
                x, t = model.net.encode_image(image[None])[0].tolist(), model.net.encode_text(text[None])[0].tolist()
                dot = sum(u * v for u, v in zip(x, t, strict=True))
                found[key] = dot / math.sqrt(sum(u * u for u in x) * sum(v * v for v in t))
    return found


def slow_isolated(model: CLIP, batch: dict[str, Any], rows: range) -> float:
    """-mean log softmax of each of these images' own caption among all captions of the batch, by loops."""
    with torch.no_grad():
        out = model.net(batch["image"], batch["text"])
    x, t, s = out["image_features"].tolist(), out["text_features"].tolist(), float(out["logit_scale"])
    total = 0.0
    for i in rows:
        dots = [s * sum(u * v for u, v in zip(x[i], row, strict=True)) for row in t]
        total -= dots[i] - math.log(sum(math.exp(d) for d in dots))
    return total / len(rows)


def same(g: dict[str, Tensor], h: dict[str, Tensor], names: Callable[[str], bool] = lambda name: True) -> bool:
    return g.keys() == h.keys() and all(torch.allclose(g[k], h[k], atol=1e-6, rtol=1e-4) for k in g if names(k))


def visual(name: str) -> bool:
    return name.startswith("visual.")


def test_the_defaults_are_the_papers() -> None:
    assert (ABL().share, ABL().early, ABL().local) == (0.01, 0, False)


def test_without_a_share_it_is_clip(tiny: CLIP, batches: Batches) -> None:
    objective = started(tiny, share=0.0)
    objective.start_epoch(tiny, lambda: iter(batches), 0)
    assert objective.isolated == frozenset()
    for batch in batches[:2]:
        (ours, g), (theirs, h) = gradients(tiny.net, objective, batch), gradients(tiny.net, losses.Clip(), batch)
        assert torch.equal(ours["loss"], theirs["loss"]) and same(g, h)


@pytest.mark.parametrize("share", [0.04, 0.25, 0.7])
def test_the_pairs_that_are_set_aside_are_those_most_alike(share: float, tiny: CLIP, batches: Batches) -> None:
    objective, alike = started(tiny, share=share), cosines(tiny, batches)
    objective.start_epoch(tiny, lambda: iter(batches), 0)
    ranked = sorted(alike, key=alike.__getitem__, reverse=True)
    n = round(share * len(alike))
    assert alike[ranked[n - 1]] - alike[ranked[n]] > 1e-6, "the example has a tie"
    assert len(alike) == 4 * N and objective.isolated == frozenset(ranked[:n])


def test_choosing_pairs_leaves_the_model_as_it_is(tiny: CLIP, batches: Batches) -> None:
    was = {k: v.clone() for k, v in tiny.net.state_dict().items()}
    for training in (True, False):
        tiny.net.train(training)
        started(tiny, share=0.5).start_epoch(tiny, lambda: iter(batches), 0)
        assert tiny.net.training is training
    assert all(torch.equal(v, was[k]) for k, v in tiny.net.state_dict().items())


def test_early_epochs_are_clip_and_pairs_are_chosen_once(tiny: CLIP, fitted: CLIP, batches: Batches) -> None:
    objective = started(tiny, share=0.25, early=2)
    for epoch in range(2):
        objective.start_epoch(tiny, never, epoch)
        (ours, g), (theirs, h) = gradients(tiny.net, objective, batches[0]), gradients(tiny.net, losses.Clip(), batches[0])
        assert torch.equal(ours["loss"], theirs["loss"]) and same(g, h)
    objective.start_epoch(tiny, lambda: iter(batches), 2)
    chosen = objective.isolated
    assert len(chosen) == N
    other = started(fitted, share=0.25)
    other.start_epoch(fitted, lambda: iter(batches), 0)
    assert other.isolated != chosen, "the example cannot tell"
    for epoch in (2, 3, 4):
        objective.start_epoch(fitted, never, epoch)
    assert objective.isolated == chosen


def test_the_choice_survives_a_restart(tiny: CLIP, fitted: CLIP, batches: Batches) -> None:
    objective = started(tiny, share=0.25, early=1)
    objective.start_epoch(tiny, lambda: iter(batches), 1)
    torch.save(objective.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed = started(fitted, share=0.25, early=1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.start_epoch(fitted, never, 1)
    assert resumed.isolated == objective.isolated and len(resumed.isolated) == N
    ours, theirs = (gradients(fitted.net, o, batches[0])[0] for o in (objective, resumed))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("ascent", [1.0, 0.3])
@pytest.mark.parametrize("local", [False, True])
def test_the_loss_is_clips_of_the_others_less_what_the_isolated_images_find(ascent: float, local: bool, fitted: CLIP,
                                                                            batches: Batches) -> None:
    batch, rows = batches[0], range(3)
    out = gradients(fitted.net, setting_aside(batch, rows, ascent=ascent, local=local), batch)[0]
    others = losses.Clip().loss(fitted.net, {k: batch[k][3:] for k in ("image", "text")})["loss"].detach()
    assert torch.allclose(out["others"], others, atol=1e-5)
    assert float(out["isolated"]) == pytest.approx(slow_isolated(fitted, batch, rows), abs=1e-4) and out["isolated"] < math.log(N)
    assert torch.allclose(out["loss"], out["others"] - ascent * out["isolated"], atol=1e-6)


@pytest.mark.parametrize("local", [False, True])
def test_a_step_down_the_loss_makes_isolated_pairs_match_worse(local: bool, fitted: CLIP, batches: Batches) -> None:
    batch, rows = batches[0], range(N)
    before = slow_isolated(fitted, batch, rows)
    _, g = gradients(fitted.net, setting_aside(batch, rows, local=local), batch)
    model = replace(fitted, net=copy.deepcopy(fitted.net))
    length = torch.stack([v.square().sum() for v in g.values()]).sum().sqrt()
    with torch.no_grad():
        for name, step in g.items():
            model.net.get_parameter(name).sub_(0.02 / length * step)
    assert before < 0.8 * math.log(N) and slow_isolated(model, batch, rows) > before + 1e-3


def test_above_chance_isolated_pairs_have_no_gradient(fitted: CLIP, batches: Batches) -> None:
    batch = batches[0] | {"text": batches[0]["text"].roll(1, 0)}
    ours, g = gradients(fitted.net, setting_aside(batch, range(3)), batch)
    others, h = gradients(fitted.net, setting_aside(batch, range(3), ascent=0.0), batch)
    assert ours["isolated"] > math.log(N) and torch.allclose(ours["loss"], others["others"] - math.log(N), atol=1e-5)
    assert same(g, h) and any(v.any() for v in g.values())
    below, _ = gradients(fitted.net, setting_aside(batches[0], range(3)), batches[0])
    assert below["isolated"] < math.log(N)
    assert not same(*(gradients(fitted.net, setting_aside(batches[0], range(3), ascent=a), batches[0])[1] for a in (1.0, 0.0)))


def test_local_unlearning_teaches_the_text_tower_and_the_temperature_nothing(fitted: CLIP, batches: Batches) -> None:
    batch, rows = batches[0], range(3)
    local, both, others = (gradients(fitted.net, setting_aside(batch, rows, **o), batch)[1]
                           for o in ({"local": True}, {}, {"ascent": 0.0}))
    assert same(local, others, lambda name: not visual(name)) and same(local, both, visual)
    assert not same(both, others, lambda name: not visual(name)) and not same(local, others, visual)
    alone = gradients(fitted.net, setting_aside(batch, range(N), local=True), batch)[1]
    assert not any(g.any() for name, g in alone.items() if not visual(name)) and alone["visual.proj"].any()


def test_a_batch_without_isolated_pairs_is_clips(fitted: CLIP, batches: Batches) -> None:
    objective = setting_aside(batches[1], range(N))
    (ours, g), (theirs, h) = gradients(fitted.net, objective, batches[0]), gradients(fitted.net, losses.Clip(), batches[0])
    assert torch.equal(ours["loss"], theirs["loss"]) and same(g, h) and not ours["isolated"]


@pytest.mark.parametrize("share", [-0.1, 1.0, 5])
def test_a_share_that_is_none_is_one_line(share: float, tiny: CLIP) -> None:
    with pytest.raises(BadInput, match="--objective.share") as raised:
        ABL(share=share).setup(tiny)
    assert len(str(raised.value).splitlines()) == 1
