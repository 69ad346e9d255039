"""Augmented views: functions of their rng that leave all other generators alone, images of any size, and WordNet only where asked for."""
from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mmbackdoor import augment, shards
from mmbackdoor.augment import (
    Policy,
    alter,
    augmented_image,
    augmented_text,
    auto_augment,
    check_synonyms,
    cropped_image,
    edit_words,
    synonyms_of,
)
from mmbackdoor.clip import CLIP, Augment
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.keyed import drawing_from, rng
from mmbackdoor.types import BadInput, Sample

POLICIES = get_args(Policy)
every_policy = pytest.mark.parametrize("kind", POLICIES)


def noise(w: int = 60, h: int = 44) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))


def generators() -> list[Any]:
    """The states of all global generators, as plain values."""
    return [torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:]]


@pytest.fixture(scope="module")
def sample(toy: Path) -> Sample:
    return next(iter(shards.read(str(toy / "train"))))


# ---- drawing from a generator


def test_what_is_drawn_from_a_generator_depends_on_it_alone() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with drawing_from(rng(5)):
            found.append((torch.rand(3), torch.nn.Linear(2, 2).weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with drawing_from(rng(6)):
        assert not torch.equal(torch.rand(3), found[0][0])


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_of_the_draws_is_left_after_an_error_either(fails: bool) -> None:
    torch.manual_seed(3)
    before = generators()
    try:
        with drawing_from(rng(0)):
            torch.rand(100)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert generators() == before


def test_a_generator_that_is_drawn_from_goes_on_by_itself() -> None:
    """Twice from the same one gives other draws; how many were drawn within does not matter for what comes after."""
    a, b = rng(0), rng(0)
    with drawing_from(a):
        first = torch.rand(1)
    with drawing_from(b):
        torch.rand(1000)
    assert a.get_state().equal(b.get_state())
    with drawing_from(a):
        assert not torch.equal(torch.rand(1), first)


def test_draws_within_draws_do_not_disturb_them() -> None:
    with drawing_from(rng(0)):
        alone = torch.rand(1), torch.rand(1)
    with drawing_from(rng(0)):
        around = [torch.rand(1)]
        with drawing_from(rng(1)):
            torch.rand(7)
        around.append(torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip(alone, around, strict=True))


# ---- images


@every_policy
def test_a_policy_is_a_function_of_its_rng_and_disturbs_no_other(kind: Policy) -> None:
    image, found = noise(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = generators()
        found.append([alter(kind, image, rng(i)).tobytes() for i in range(12)])
        assert generators() == before
    assert found[0] == found[1]
    assert len(set(found[0])) >= 6 if kind != "none" else set(found[0]) == {image.tobytes()}


@every_policy
@pytest.mark.parametrize("w, h", [(1, 1), (1, 9), (5, 3), (64, 64), (300, 200)])
def test_a_policy_keeps_size_and_mode_and_leaves_the_original(kind: Policy, w: int, h: int) -> None:
    image = noise(w, h)
    before = image.tobytes()
    for i in range(60):
        out = alter(kind, image, rng(i))
        assert out.size == (w, h) and out.mode == "RGB"
    assert image.tobytes() == before


def test_the_policies_are_different_ones() -> None:
    assert len({b"".join(alter(kind, noise(), rng(i)).tobytes() for i in range(5)) for kind in POLICIES}) == len(POLICIES)
    assert auto_augment(noise(), rng(1)).tobytes() == alter("auto", noise(), rng(1)).tobytes()


def test_colours_are_turned_grey_a_fifth_of_the_time_and_mirrored_half_of_it() -> None:
    """On an image that is darker on the left, reddish everywhere."""
    ramp = np.linspace(40, 200, 24)[None, :, None] * np.array([1.0, 0.6, 0.4])
    image = Image.fromarray(ramp.repeat(6, 0).astype(np.uint8))
    outs = np.stack([np.asarray(alter("colour", image, rng(i))).astype(int) for i in range(600)])
    grey = (outs == outs[..., :1]).all((1, 2, 3)).mean()
    mirrored = (outs[:, :, :12].mean((1, 2, 3)) > outs[:, :, 12:].mean((1, 2, 3))).mean()
    assert 0.15 < grey < 0.25 and 0.44 < mirrored < 0.56


def test_colours_change_the_brightness_by_two_fifths_at_most_and_four_times_of_five() -> None:
    """Of one grey, in which contrast, saturation and hue change nothing."""
    outs = np.array([np.asarray(alter("colour", Image.new("RGB", (3, 3), (120,) * 3), rng(i)))[1, 1] for i in range(600)]).astype(int)
    factors = outs[:, 0] / 120
    assert (np.ptp(outs, 1) == 0).all() and 0.59 < factors.min() < 0.65 and 1.35 < factors.max() < 1.41
    assert 0.15 < (factors == 1).mean() < 0.27


def test_tone_leaves_a_colour_its_name() -> None:
    """Its hue, on one that no change of brightness or contrast clips; and it does change the brightness, and mirrors."""
    ramp = np.array([0.8, 0.6, 0.4]) * np.linspace(80, 155, 16)[None, :, None]  # whole numbers
    image = Image.fromarray(ramp.repeat(4, 0).astype(np.uint8))
    outs = np.stack([np.asarray(alter("tone", image, rng(i))).astype(int) for i in range(300)])
    red, green, blue = outs.transpose(3, 0, 1, 2)
    assert np.abs((red - green) - (green - blue)).max() <= 3, "an equal step down from red to green to blue, up to rounding"
    assert (red > green).all() and (green > blue).all()
    luma = np.array([0.299, 0.587, 0.114])  # which contrast keeps the mean of
    levels = (outs @ luma).mean((1, 2)) / (ramp @ luma).mean()
    assert 0.59 < levels.min() < 0.65 and 1.3 < levels.max() < 1.41
    mirrored = (outs[:, :, :8].mean((1, 2, 3)) > outs[:, :, 8:].mean((1, 2, 3))).mean()
    assert 0.42 < mirrored < 0.58


def test_blur_is_a_tenth_to_two_pixels_at_224_and_in_proportion_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda sigma: seen.append(sigma) or real(sigma))
    for kind, width in itertools.product(("colour", "tone"), (224, 448, 32)):
        seen.clear()
        for i in range(400):
            alter(kind, Image.new("RGB", (width, 2)), rng(i))
        inside = np.array(seen) * 224 / width
        assert 150 < len(seen) < 250, "about half are blurred"
        assert 0.1 <= inside.min() < 0.2 and 1.9 < inside.max() <= 2.0


def test_blurring_evens_out() -> None:
    with drawing_from(rng(0)):
        assert np.asarray(augment.blur(noise(224, 40))).std() < np.asarray(noise(224, 40)).std()


def test_an_augmented_image_is_the_policy_and_then_the_training_transform(front: CLIP, sample: Sample) -> None:
    whole = replace(front, aug=Augment((1, 1), (1, 1)))
    for kind in POLICIES:
        assert torch.equal(augmented_image(whole, sample, rng(3), kind), whole.preprocess(alter(kind, sample["image"], rng(3))))
    assert torch.equal(augmented_image(front, sample, rng(3)), augmented_image(front, sample, rng(3), "auto"))


def test_a_cropped_image_is_a_crop_of_the_share_asked_for_in_other_colours(front: CLIP, sample: Sample) -> None:
    for scale in ((0.1, 0.2), (0.5, 0.6)):
        plain = replace(front, aug=replace(front.aug, scale=scale)).augment(sample["image"], rng(3))
        assert torch.equal(cropped_image(front, sample, rng(3), scale, "none"), plain)
    assert torch.equal(cropped_image(front, sample, rng(3), kind="none"), front.augment(sample["image"], rng(3)))
    colours = [cropped_image(front, sample, rng(i)) for i in range(8)]
    assert all(c.shape == (3, 32, 32) for c in colours)
    assert sum(torch.equal(c, front.augment(sample["image"], rng(i))) for i, c in enumerate(colours)) < 4
    assert torch.equal(colours[2], cropped_image(front, sample, rng(2), front.aug.scale, "colour"))


def test_views_leave_all_generators_alone(front: CLIP, sample: Sample) -> None:
    before = generators()
    for view in (augmented_image, cropped_image, augmented_text):
        view(front, sample, rng(1))
    assert generators() == before


# ---- captions

TEXT = "a red star on a grey background"
WORDNET = {"star": [["star", "celestial_body"], ["star", "lead"]], "red": [["red", "crimson"]], "word": [["word"]]}


@pytest.fixture
def forgetful() -> Iterator[None]:
    synonyms_of.cache_clear()
    yield
    synonyms_of.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, synsets: Callable[[str], list[Any]]) -> None:
    """An nltk of nothing but this WordNet."""
    nltk, corpus = ModuleType("nltk"), ModuleType("nltk.corpus")
    corpus.wordnet = SimpleNamespace(synsets=synsets)  # type: ignore[attr-defined]
    nltk.corpus = corpus  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)


@pytest.fixture
def wordnet(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    stand_in(monkeypatch, lambda word: [SimpleNamespace(lemma_names=lambda names=names: names) for names in WORDNET.get(word.lower(), [])])


@pytest.fixture(params=["no nltk", "no WordNet"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    def missing(word: str) -> list[Any]:
        raise LookupError("\n" + "*" * 70 + "\n  Resource wordnet not found.\n")

    if request.param == "no nltk":
        monkeypatch.setitem(sys.modules, "nltk", None)
        monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    else:
        stand_in(monkeypatch, missing)


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    """An nltk that must not be used."""
    def touched(name: str) -> Any:
        raise AssertionError(f"nltk was asked for {name}")

    for module in ("nltk", "nltk.corpus"):
        fake = ModuleType(module)
        fake.__getattr__ = touched  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, module, fake)


def test_synonyms_without_wordnet_are_refused_before_training_and_while_it_goes_on(without: None, front: CLIP, sample: Sample) -> None:
    for asks in (lambda: check_synonyms(True), lambda: CleanCLIP(synonyms=True).setup(front),
                 lambda: [edit_words(TEXT, rng(i), synonyms=True) for i in range(30)],
                 lambda: [CleanCLIP(synonyms=True).views["text_aug"](front, sample, rng(i)) for i in range(30)]):
        with pytest.raises(BadInput, match=r"^--objective.synonyms: [^\n]*nltk[^\n]*$"):
            asks()


def test_a_wordnet_that_was_installed_since_is_found(without: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput):
        synonyms_of("star")
    stand_in(monkeypatch, lambda word: [SimpleNamespace(lemma_names=lambda: ["sun"])])
    assert synonyms_of("star") == ("sun",)


def test_synonyms_are_the_other_words_of_a_words_meanings(wordnet: None) -> None:
    assert synonyms_of("star") == ("celestial body", "lead") and synonyms_of("red") == ("crimson",)
    assert synonyms_of("Star") == ("celestial body", "lead"), "a word is no synonym of itself in another case"
    assert "lead" in synonyms_of("star,")
    assert synonyms_of("word") == synonyms_of("unheard-of") == ()


def test_synonyms_appear_about_a_quarter_of_the_time_where_words_have_any(wordnet: None) -> None:
    text = "red star red star"
    edited = [edit_words(text, rng(i), synonyms=True) for i in range(800)]
    new = [e for e in edited if set(e.split()) - {"red", "star"}]
    assert 0.2 < len(new) / 800 < 0.3
    one_word = {" ".join(words) for at in range(4) for other in ("crimson", "celestial body", "lead")
                if (other == "crimson") == (at % 2 == 0) for words in [[*text.split()[:at], other, *text.split()[at + 1:]]]}
    assert set(new) == one_word, "one word of four is exchanged for one of its synonyms"


def test_words_without_synonyms_stay(wordnet: None) -> None:
    text = "zyx wvu tsr"
    for i in range(60):
        assert set(edit_words(text, rng(i), synonyms=True).split()) <= set(text.split())


def test_synonyms_are_a_function_of_the_rng(wordnet: None) -> None:
    before = generators()
    first = [edit_words(TEXT, rng(i), 0.5, synonyms=True) for i in range(60)]
    synonyms_of.cache_clear()
    assert [edit_words(TEXT, rng(i), 0.5, synonyms=True) for i in range(60)] == first and generators() == before


def test_the_view_of_a_caption_is_its_edited_words(wordnet: None, front: CLIP) -> None:
    found = {"__key__": "k", "text": TEXT}
    for i in range(12):
        assert torch.equal(augmented_text(front, found, rng(i), 0.3, True), front.tokenize(edit_words(TEXT, rng(i), 0.3, True)))
        theirs = CleanCLIP(synonyms=True).views["text_aug"](front, found, rng(i))
        assert torch.equal(theirs, augmented_text(front, found, rng(i), synonyms=True))


def test_without_synonyms_nltk_is_never_touched(untouchable: None, front: CLIP, sample: Sample) -> None:
    check_synonyms(False)
    CleanCLIP().setup(front)
    for i in range(100):
        edit_words(TEXT, rng(i), 0.5)
        CleanCLIP().views["text_aug"](front, sample, rng(i))
    with pytest.raises(AssertionError):
        check_synonyms(True)
