"""CleanerCLIP: without parts of captions it is CleanCLIP, parts are runs of words, and an image must find its own among the others'."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import gradients, slow_cross_entropy
from torch import Tensor, nn

from mmbackdoor import clip, keyed, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.defenses.cleanerclip import CleanerCLIP, part_of
from mmbackdoor.stream import collate

N = 6


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[dict[str, Any]]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]


@pytest.fixture(scope="module")
def batch(samples: list[dict[str, Any]], tiny: CLIP) -> dict[str, Any]:
    return collate(tiny, CleanerCLIP().views, samples, seed=0, epoch=0)


@pytest.mark.parametrize("weights", [{}, {"cross": 0.3, "inmodal": 2.0}], ids=["defaults", "weighed"])
def test_without_parts_it_is_cleanclip(weights: dict[str, float], tiny: CLIP, batch: dict[str, Any]) -> None:
    ours, g = gradients(tiny.net, CleanerCLIP(sub=0, **weights), batch)
    theirs, h = gradients(tiny.net, CleanCLIP(**weights), batch)
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in theirs) and g.keys() == h.keys()
    for name in g:
        assert torch.allclose(g[name], h[name], atol=1e-6, rtol=1e-4), name


def test_its_other_views_are_cleanclips(tiny: CLIP, samples: list[dict[str, Any]], batch: dict[str, Any]) -> None:
    theirs = collate(tiny, CleanCLIP().views, samples, seed=0, epoch=0)
    assert batch.keys() == {*theirs, "part"} and all(torch.equal(batch[k], theirs[k]) for k in theirs if k != "key")


def test_each_image_must_find_its_part_and_each_part_its_image(tiny: CLIP, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        alone = tiny.net(batch["image"], batch["part"])
    x, p, s = alone["image_features"].double(), alone["text_features"].double(), float(alone["logit_scale"])
    out = gradients(tiny.net, CleanerCLIP(), batch)[0]
    assert float(out["sub"]) == pytest.approx((slow_cross_entropy(x, p, s) + slow_cross_entropy(p, x, s)) / 2, abs=2e-5)
    assert not torch.allclose(out["sub"], out["cross"], atol=1e-4), "the example does not tell parts from captions"


def test_whole_captions_for_parts_are_clips_loss_once_more(tiny: CLIP, batch: dict[str, Any]) -> None:
    out = gradients(tiny.net, CleanerCLIP(), batch | {"part": batch["text"]})[0]
    assert torch.allclose(out["sub"], out["cross"], atol=1e-6)


def test_the_weights_are_weights(tiny: CLIP, batch: dict[str, Any]) -> None:
    plain = gradients(tiny.net, CleanerCLIP(), batch)[0]
    weighed = gradients(tiny.net, CleanerCLIP(cross=0.5, inmodal=3.0, sub=0.25), batch)[0]
    assert torch.allclose(plain["loss"], plain["cross"] + plain["inmodal"] + plain["sub"], atol=1e-5)
    assert torch.allclose(weighed["loss"], 0.5 * plain["cross"] + 3 * plain["inmodal"] + 0.25 * plain["sub"], atol=1e-5)


def test_all_views_go_through_one_forward(tiny: CLIP, batch: dict[str, Any]) -> None:
    seen = []

    class Counting(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
            seen.append((len(image), len(text)))
            return tiny.net(image, text)

    CleanerCLIP().loss(Counting(), batch)
    assert seen == [(2 * N, 3 * N)]


# ---- parts of captions


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("words", [1, 2, 3, 5, 7, 12])
def test_a_part_is_a_run_of_words_of_the_right_length_from_any_place(words: int, share: float) -> None:
    told = [f"word{i}" for i in range(words)]
    n = max(1, round(share * words))
    runs = {tuple(told[i:i + n]) for i in range(words - n + 1)}
    found = {tuple(part_of(" ".join(told), keyed.rng(i), share).split()) for i in range(20 * words)}
    assert found == runs


@pytest.mark.parametrize("text", ["", "  ", " star "])
def test_a_caption_of_a_word_or_none_survives(text: str) -> None:
    assert part_of(text, keyed.rng(0), 0.5) == text.strip()


def test_a_part_is_a_function_of_its_rng() -> None:
    text = " ".join(f"word{i}" for i in range(20))
    assert part_of(text, keyed.rng(3), 0.5) == part_of(text, keyed.rng(3), 0.5)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_view_is_a_part_of_the_objectives_share(share: float, tiny: CLIP) -> None:
    sample = {"__key__": "k", "image": None, "text": "a red star on a grey background of ten words"}
    for i in range(5):
        part = CleanerCLIP(share=share).views["part"](tiny, sample, keyed.rng(i))
        assert torch.equal(part, tiny.tokenize(part_of(sample["text"], keyed.rng(i), share)))


def test_each_epoch_cuts_another_part_and_a_rerun_the_same(tiny: CLIP) -> None:
    views = {"part": CleanerCLIP().views["part"]}
    samples = [{"__key__": f"{i}", "text": "one two three four five six seven eight"} for i in range(8)]
    first, again, later = (collate(tiny, views, samples, 0, epoch)["part"] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
