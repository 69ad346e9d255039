"""CleanCLIP: without its in-modality terms it is CLIP, those terms are what the paper's code computes, views draw from their rng."""
from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import gradients, slow_cross_entropy
from PIL import Image
from torch import Tensor, nn

from mmbackdoor import clip, keyed, losses, shards
from mmbackdoor.augment import auto_augment, edit_words
from mmbackdoor.clip import CLIP, Augment, Model
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


def features(model: CLIP, batch: dict[str, Any]) -> tuple[list[Tensor], float]:
    """[x, x_aug, t, t_aug] of unit norm in double precision, and the temperature."""
    with torch.no_grad():
        rows = [model.net.encode_image(batch[k], normalize=True) for k in ("image", "image_aug")]
        rows += [model.net.encode_text(batch[k], normalize=True) for k in ("text", "text_aug")]
    return [r.double() for r in rows], math.exp(float(model.net.logit_scale.detach()))


def test_the_defaults_are_the_papers() -> None:
    assert (CleanCLIP().cross, CleanCLIP().inmodal, CleanCLIP().symmetric) == (1.0, 1.0, False)
    assert set(CleanCLIP().views) == {"image", "text", "image_aug", "text_aug"}
    assert "image_aug" not in losses.Objective.views and "image_aug" not in losses.Clip().views


def test_without_in_modality_terms_it_is_clip(tiny: CLIP, batch: dict[str, Any]) -> None:
    ours, g = gradients(tiny.net, CleanCLIP(inmodal=0), batch)
    theirs, h = gradients(tiny.net, losses.Clip(), batch)
    assert torch.allclose(ours["loss"], theirs["loss"], atol=1e-6) and torch.allclose(ours["cross"], theirs["loss"], atol=1e-6)
    assert g.keys() == h.keys()
    for name in g:
        assert torch.allclose(g[name], h[name], atol=1e-6, rtol=1e-4), name


def test_without_the_cross_term_it_does_not_matter_which_caption_belongs_to_which_image(tiny: CLIP, batch: dict[str, Any]) -> None:
    turned = batch | {k: batch[k].roll(1, 0) for k in ("text", "text_aug")}
    a, g = gradients(tiny.net, CleanCLIP(cross=0), batch)
    b, h = gradients(tiny.net, CleanCLIP(cross=0), turned)
    assert torch.allclose(a["loss"], b["loss"], atol=1e-6) and torch.allclose(a["loss"], a["inmodal"])
    assert all(torch.allclose(g[k], h[k], atol=1e-5, rtol=1e-3) for k in g)
    both, both_turned = (gradients(tiny.net, CleanCLIP(), x)[0]["loss"] for x in (batch, turned))
    assert not torch.allclose(both, both_turned, atol=1e-4)


def test_the_in_modality_terms_go_from_the_original_to_its_augmented_view(tiny: CLIP, batch: dict[str, Any]) -> None:
    (x, x_aug, t, t_aug), s = features(tiny, batch)
    one_way = (slow_cross_entropy(x, x_aug, s) + slow_cross_entropy(t, t_aug, s)) / 2
    other_way = (slow_cross_entropy(x_aug, x, s) + slow_cross_entropy(t_aug, t, s)) / 2
    cross = (slow_cross_entropy(x, t, s) + slow_cross_entropy(t, x, s)) / 2
    assert abs(one_way - other_way) > 1e-4, "the example does not tell the directions apart"
    out = gradients(tiny.net, CleanCLIP(), batch)[0]
    assert float(out["inmodal"]) == pytest.approx(one_way, abs=2e-5)
    assert float(out["cross"]) == pytest.approx(cross, abs=2e-5)
    assert float(out["loss"]) == pytest.approx(cross + one_way, abs=4e-5)


def test_symmetric_is_the_mean_of_both_ways(tiny: CLIP, batch: dict[str, Any]) -> None:
    swapped = batch | {"image": batch["image_aug"], "image_aug": batch["image"], "text": batch["text_aug"], "text_aug": batch["text"]}
    there, back = (gradients(tiny.net, CleanCLIP(), b)[0]["inmodal"] for b in (batch, swapped))
    both = gradients(tiny.net, CleanCLIP(symmetric=True), batch)[0]["inmodal"]
    assert torch.allclose(both, (there + back) / 2, atol=1e-5) and not torch.allclose(there, back, atol=1e-4)


def test_the_weights_are_weights(tiny: CLIP, batch: dict[str, Any]) -> None:
    plain = gradients(tiny.net, CleanCLIP(), batch)[0]
    weighed = gradients(tiny.net, CleanCLIP(cross=0.5, inmodal=3.0), batch)[0]
    assert torch.allclose(weighed["loss"], 0.5 * plain["cross"] + 3 * plain["inmodal"], atol=1e-5)
    assert torch.allclose(weighed["cross"], plain["cross"], atol=1e-6) and torch.allclose(weighed["inmodal"], plain["inmodal"], atol=1e-6)


def test_all_views_go_through_one_forward(tiny: CLIP, batch: dict[str, Any]) -> None:
    """Two passes, or a pass through one tower alone, is what puts several processes out of step."""
    seen = []

    class Counting(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
            seen.append((len(image), len(text)))
            return tiny.net(image, text)

    CleanCLIP().loss(Counting(), batch)
    assert seen == [(2 * N, 2 * N)]


def test_identical_views_have_the_smallest_in_modality_loss(tiny: CLIP, batch: dict[str, Any]) -> None:
    same = batch | {"image_aug": batch["image"], "text_aug": batch["text"]}
    assert gradients(tiny.net, CleanCLIP(), same)[0]["inmodal"] < gradients(tiny.net, CleanCLIP(), batch)[0]["inmodal"]


# ---- augmented texts

SENTENCES = ["a red star on a grey background", "one two", " ".join(f"word{i}" for i in range(40)), "the the the the", "x y z"]


@pytest.mark.parametrize("text", SENTENCES)
def test_edited_words_come_from_the_text_and_change_little(text: str) -> None:
    words = text.split()
    budget = max(1, round(0.1 * len(words)))
    for i in range(200):
        edited = edit_words(text, keyed.rng(0, str(i))).split()
        assert edited and set(edited) <= set(words)
        assert abs(len(edited) - len(words)) <= budget
        counts = {w: abs(edited.count(w) - words.count(w)) for w in set(words)}
        assert sum(counts.values()) <= budget
        if len(edited) == len(words):
            assert sum(a != b for a, b in zip(edited, words, strict=True)) <= 2 * budget


@pytest.mark.parametrize("text", ["word", "", "  ", " star "])
def test_a_text_of_one_word_survives(text: str) -> None:
    assert all(edit_words(text, keyed.rng(0, str(i))).split() == text.split() for i in range(30))


def test_all_three_edits_occur_about_equally_often() -> None:
    text = " ".join(f"word{i}" for i in range(12))
    lengths = [len(edit_words(text, keyed.rng(0, str(i))).split()) for i in range(900)]
    assert all(230 < lengths.count(n) < 370 for n in (11, 12, 13))


def test_editing_words_is_a_function_of_its_rng() -> None:
    text = SENTENCES[2]
    assert edit_words(text, keyed.rng(5)) == edit_words(text, keyed.rng(5))
    assert len({edit_words(text, keyed.rng(i)) for i in range(20)}) > 10


def test_a_larger_share_edits_more() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    dropped = {share: max(100 - len(edit_words(text, keyed.rng(i), share).split()) for i in range(30)) for share in (0.1, 0.3)}
    assert dropped == {0.1: 10, 0.3: 30}


# ---- augmented images


def picture(size: tuple[int, int] = (60, 44)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_auto_augment_is_a_function_of_its_rng_and_disturbs_no_other() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    outs = [auto_augment(picture(), keyed.rng(i)) for i in (0, 0, 1, 2, 3)]
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert outs[0].tobytes() == outs[1].tobytes()
    assert len({o.tobytes() for o in outs}) >= 3
    torch.manual_seed(2)  # and does not depend on the global generator
    assert auto_augment(picture(), keyed.rng(0)).tobytes() == outs[0].tobytes()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 64), (300, 200)])
def test_auto_augment_keeps_size_and_mode_and_leaves_the_original(size: tuple[int, int]) -> None:
    image = picture(size)
    before = image.tobytes()
    for i in range(40):
        out = auto_augment(image, keyed.rng(i))
        assert out.size == size and out.mode == "RGB"
    assert image.tobytes() == before


def test_the_views_are_what_they_are_named(tiny: CLIP) -> None:
    full = CLIP(tiny.net, tiny.tokenizer, tiny.card, Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    s = {"__key__": "k", "image": picture((32, 32)), "text": "a red star on a grey background"}
    views = CleanCLIP().views
    assert torch.equal(views["image"](full, s, keyed.rng(0)), full.preprocess(s["image"]))
    assert torch.equal(views["text"](full, s, keyed.rng(0)), full.tokenize(s["text"]))
    augmented = views["image_aug"](full, s, keyed.rng(3))
    assert augmented.shape == (3, 32, 32)
    assert torch.equal(augmented, full.preprocess(auto_augment(s["image"], keyed.rng(3))))
    assert torch.equal(views["text_aug"](full, s, keyed.rng(3)), full.tokenize(edit_words(s["text"], keyed.rng(3))))


def test_each_epoch_sees_another_augmentation_and_a_rerun_the_same(tiny: CLIP) -> None:
    samples = [{"__key__": f"{i}", "image": picture(), "text": SENTENCES[0]} for i in range(8)]
    first, again, later = (collate(tiny, CleanCLIP().views, samples, 0, epoch) for epoch in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in ("image_aug", "text_aug"))
    assert all(not torch.equal(first[k], later[k]) for k in ("image_aug", "text_aug"))
