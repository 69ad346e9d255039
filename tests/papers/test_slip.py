"""SLIP: CLIP, and SimCLR's loss between two crops through a head that trains along; nothing of it is left at weight 0."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from oracles import gradients, slow_both_ways, slow_nt_xent
from torch import Tensor, nn

from mmbackdoor import clip, fit, keyed, losses, shards
from mmbackdoor.clip import CLIP, Augment, Model
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.index import find
from mmbackdoor.stream import Stream, collate
from mmbackdoor.types import Batch, Sample

N = 6
Small = partial(SLIP, hidden=16, out=8)


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[Sample]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]


@pytest.fixture(scope="module")
def batch(tiny: CLIP, samples: list[Sample]) -> Batch:
    """All views, those of captions too."""
    return collate(tiny, SLIP(text=1).views, samples, seed=0, epoch=0)


def begun(model: CLIP, **numbers: Any) -> SLIP:
    objective = Small(**numbers)
    objective.setup(model)
    return objective


def expected(model: CLIP, objective: SLIP, batch: Batch) -> dict[str, float]:
    """The three terms by loops over features of unit norm."""
    with torch.no_grad():
        x, c1, c2 = (model.net.encode_image(batch[k], normalize=True) for k in ("image", "crop_1", "crop_2"))
        t, t1, t2 = (model.net.encode_text(batch[k], normalize=True) for k in ("text", "text_1", "text_2"))
        found = {"cross": slow_both_ways(x, t, float(model.net.logit_scale.exp()))}
        for part, (a, b) in {"image": (c1, c2), "text": (t1, t2)}.items():
            if part in objective.mlps:
                h = F.normalize(objective.mlps[part](torch.cat([a, b])), dim=-1)
                found[part] = slow_nt_xent(h[:N], h[N:], objective.temperature)
    return found


def test_the_defaults_are_the_papers() -> None:
    s = SLIP()
    assert (s.image, s.text, s.temperature, s.crop, s.hidden, s.out) == (1.0, 0.0, 0.1, (0.08, 1.0), 4096, 256)
    assert set(s.views) == {"image", "text", "crop_1", "crop_2"}
    assert set(SLIP(text=0.1).views) == {"image", "text", "crop_1", "crop_2", "text_1", "text_2"}


def test_at_weight_0_it_is_clip(tiny: CLIP, batch: Batch) -> None:
    objective = begun(tiny, image=0)
    (ours, g), (theirs, h) = gradients(tiny.net, objective, batch), gradients(tiny.net, losses.Clip(), batch)
    assert torch.allclose(ours["loss"], theirs["loss"], atol=1e-6) and g.keys() == h.keys()
    for name in g:
        assert torch.allclose(g[name], h[name], atol=1e-6, rtol=1e-4), name
    assert all(not p.grad.any() for p in objective.mlps.parameters())


@pytest.mark.parametrize("numbers", [{}, {"image": 0.5}, {"text": 2.0}, {"image": 3.0, "text": 0.1, "temperature": 0.5}], ids=str)
def test_the_terms_are_what_loops_compute_and_the_weights_are_weights(tiny: CLIP, batch: Batch, numbers: dict[str, float]) -> None:
    objective = begun(tiny, **numbers)
    want = expected(tiny, objective, batch)
    out = {k: float(v.detach()) for k, v in objective.loss(tiny.net, batch).items()}
    assert out.keys() == {"loss"} | want.keys()
    total = want["cross"] + objective.image * want["image"] + objective.text * want.get("text", 0)
    assert out == pytest.approx(want | {"loss": total}, abs=1e-4)


def test_without_a_term_of_captions_their_views_and_their_head_are_not_there(tiny: CLIP, batch: Batch) -> None:
    """And the other terms are the same with it."""
    without, with_text = begun(tiny), begun(tiny, text=1)
    assert set(without.mlps) == {"image"} and set(with_text.mlps) == {"image", "text"}
    bare = {k: v for k, v in batch.items() if k not in ("text_1", "text_2")}
    a, b, c = without.loss(tiny.net, bare), without.loss(tiny.net, batch), with_text.loss(tiny.net, batch)
    assert torch.equal(a["loss"], b["loss"]) and "text" not in a
    assert torch.allclose(a["cross"], c["cross"], atol=1e-6) and torch.allclose(a["image"], c["image"], atol=1e-6)
    assert torch.allclose(c["loss"], a["loss"] + c["text"], atol=1e-5) and float(c["text"].detach()) > 0


def test_within_a_modality_it_does_not_matter_what_the_other_says(tiny: CLIP, batch: Batch) -> None:
    turned = batch | {k: batch[k].roll(1, 0) for k in ("text", "text_1", "text_2")}
    a, b = (begun(tiny, text=1).loss(tiny.net, x) for x in (batch, turned))
    assert torch.allclose(a["image"], b["image"], atol=1e-6) and torch.allclose(a["text"], b["text"], atol=1e-4)
    assert not torch.allclose(a["cross"], b["cross"], atol=1e-4)


@pytest.mark.parametrize("text, seen", [(0, (3 * N, N)), (1, (3 * N, 3 * N))])
def test_all_views_go_through_one_forward(tiny: CLIP, batch: Batch, text: float, seen: tuple[int, int]) -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
            calls.append((len(image), len(text)))
            return tiny.net(image, text)

    begun(tiny, text=text).loss(Counting(), batch)
    assert calls == [seen]


def test_its_crops_have_a_share_of_the_area_of_their_own_and_other_colours(tiny: CLIP, samples: list[Sample]) -> None:
    """The image that is matched with the caption is cropped as ever."""
    whole = CLIP(tiny.net, tiny.tokenizer, tiny.card, Augment(scale=(1, 1), ratio=(1, 1)))
    views = SLIP(crop=(0.1, 0.2)).views
    assert torch.equal(views["image"](whole, samples[0], keyed.rng(0)), whole.preprocess(samples[0]["image"]))
    shares: list[float] = []

    class Watched(Augment):
        def box(self, w: int, h: int, rng: torch.Generator) -> tuple[int, int, int, int]:
            left, top, right, bottom = found = super().box(w, h, rng)
            shares.append((right - left) * (bottom - top) / (w * h))
            return found

    watched = CLIP(tiny.net, tiny.tokenizer, tiny.card, Watched())
    crops = [views[name](watched, samples[0], keyed.rng(i)) for i in range(20) for name in ("crop_1", "crop_2")]
    assert len(shares) == 40 and 0.08 < min(shares) < max(shares) < 0.22
    assert len({c.numpy().tobytes() for c in crops}) == 20, "a function of its rng"
    first, second = (collate(tiny, views, samples, 0, 0)[k] for k in ("crop_1", "crop_2"))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the heads


@pytest.mark.parametrize("text", [0, 1])
def test_heads_are_taught_with_the_towers(tiny: CLIP, batch: Batch, text: float) -> None:
    objective = begun(tiny, text=text)
    gradients(tiny.net, objective, batch)
    assert objective.heads() is objective.mlps
    weights = dict(objective.mlps.named_parameters())
    assert weights and all(p.grad is not None and p.grad.abs().max() > 0 for p in weights.values())


def test_heads_begin_alike_whatever_was_drawn_before_and_leave_no_trace(tiny: CLIP) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = begun(tiny, text=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = begun(tiny, text=1)
    a, b = first.mlps.state_dict(), second.mlps.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["image.0.weight"], a["text.0.weight"])


def test_heads_are_three_layers_of_the_given_widths(tiny: CLIP) -> None:
    shapes = [tuple(p.shape) for p in begun(tiny).mlps["image"].parameters() if p.ndim == 2]
    assert shapes == [(16, tiny.width), (16, 16), (8, 16)]


class Killed(Exception):
    pass


def killed(epoch: int) -> dict[str, Any]:
    if epoch == 2:
        raise Killed
    return {}


def test_heads_train_along_are_saved_and_go_on_after_a_restart(toy: Path, tiny_model: str, tmp_path: Path) -> None:
    def trained(name: str, resume: bool = False, each_epoch: Callable[[int], dict[str, Any]] = lambda epoch: {}) -> dict[str, Tensor]:
        net, objective = clip.load(Model(tiny_model), seed=3), Small(text=0.5)
        stream = Stream(find(str(toy / "pairs")), net, objective.views, 25, seed=5)
        fit.fit(net, objective, stream, Accelerator(cpu=True), fit.Schedule(epochs=2, lr=1e-2, warmup=1), tmp_path / name, seed=7,
                resume=resume, each_epoch=each_epoch)
        return net.net.state_dict() | objective.mlps.state_dict(prefix="mlps.")

    whole = trained("whole")
    state = torch.load(tmp_path / "whole/checkpoints/epoch_latest.pt", weights_only=True)
    new = begun(clip.load(Model(tiny_model), seed=3), text=0.5)
    for name, value in new.mlps.state_dict().items():
        assert torch.equal(whole[f"mlps.{name}"], state["objective"]["mlps"][name])
        assert not torch.equal(whole[f"mlps.{name}"], value), f"{name} has not moved"
    assert state["state_dict"].keys() == clip.load(Model(tiny_model)).net.state_dict().keys(), "a head is no part of the model"
    with pytest.raises(Killed):
        trained("broken", each_epoch=killed)
    again = trained("broken", resume=True)
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) for k in whole)
