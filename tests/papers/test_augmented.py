"""Augmented: without a policy and without edits it is CLIP on the very same data; its loss is CLIP's on what the views show."""
from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import gradients

from mmbackdoor import augment, clip, keyed, losses, shards
from mmbackdoor.augment import alter, edit_words
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.augmented import Augmented
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput

N = 6


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[dict[str, Any]]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]


def seen(model: CLIP, objective: losses.Objective, samples: list[dict[str, Any]], epoch: int = 0) -> dict[str, Any]:
    return collate(model, objective.views, samples, seed=0, epoch=epoch)


def test_without_a_policy_and_without_edits_it_is_clip(tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    objective = Augmented(images="none", words=0)
    for epoch in range(2):
        ours, theirs = (seen(tiny, o, samples, epoch) for o in (objective, losses.Clip()))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ("image", "text"))
        (a, g), (b, h) = gradients(tiny.net, objective, ours), gradients(tiny.net, losses.Clip(), theirs)
        assert torch.equal(a["loss"], b["loss"]) and g.keys() == h.keys() and all(torch.equal(g[k], h[k]) for k in g)


def test_what_differs_from_clip_is_what_it_sees_not_what_it_minimises(tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    batch = seen(tiny, Augmented(), samples)
    assert not torch.equal(batch["image"], seen(tiny, losses.Clip(), samples)["image"])
    (a, g), (b, h) = (gradients(tiny.net, o, batch) for o in (Augmented(), losses.Clip()))
    assert torch.equal(a["loss"], b["loss"]) and all(torch.equal(g[k], h[k]) for k in h)


@pytest.mark.parametrize("images", ["rand", "auto", "colour", "tone"])
def test_the_policy_comes_before_the_training_transform(images: Any, tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    view = Augmented(images=images).views["image"]
    altered = 0
    for i, sample in enumerate(samples):
        rng = keyed.rng(i)
        assert torch.equal(view(tiny, sample, keyed.rng(i)), tiny.augment(alter(images, sample["image"], rng), rng))
        altered += alter(images, sample["image"], keyed.rng(i)).tobytes() != sample["image"].tobytes()
    assert altered > N // 2


@pytest.mark.parametrize("words", [0.1, 0.5])
def test_a_share_of_the_words_is_edited(words: float, tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    view = Augmented(words=words).views["text"]
    for i, sample in enumerate(samples):
        assert torch.equal(view(tiny, sample, keyed.rng(i)), tiny.tokenize(edit_words(sample["text"], keyed.rng(i), words)))
    assert any(not torch.equal(view(tiny, s, keyed.rng(i)), tiny.tokenize(s["text"])) for i, s in enumerate(samples))


def test_images_and_captions_are_augmented_apart(tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    plain, both = seen(tiny, losses.Clip(), samples), seen(tiny, Augmented(), samples)
    images, words = seen(tiny, Augmented(words=0), samples), seen(tiny, Augmented(images="none"), samples)
    assert torch.equal(images["text"], plain["text"]) and torch.equal(images["image"], both["image"])
    assert torch.equal(words["image"], plain["image"]) and torch.equal(words["text"], both["text"])
    assert not torch.equal(both["image"], plain["image"]) and not torch.equal(both["text"], plain["text"])


def test_each_epoch_sees_another_augmentation_and_a_rerun_the_same(tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    first, again, later = (seen(tiny, Augmented(), samples, epoch) for epoch in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], later[k]) for k in ("image", "text"))


@pytest.mark.parametrize("images", ["rand", "auto", "colour", "tone", "none"])
def test_its_views_can_be_sent_to_loader_workers(images: Any, tiny: CLIP, samples: list[dict[str, Any]]) -> None:
    views = Augmented(images=images).views
    sent = pickle.loads(pickle.dumps(views))
    ours, theirs = (collate(tiny, v, samples[:2], seed=0, epoch=0) for v in (views, sent))
    assert all(torch.equal(ours[k], theirs[k]) for k in ("image", "text"))


def test_synonyms_without_wordnet_are_one_line_before_training(tiny: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    augment.synonyms_of.cache_clear()
    Augmented().setup(tiny)
    with pytest.raises(BadInput, match="synonyms") as raised:
        Augmented(synonyms=True).setup(tiny)
    assert len(str(raised.value).splitlines()) == 1
