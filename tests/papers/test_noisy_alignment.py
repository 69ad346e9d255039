"""Noisy Alignment: the trigger in the middle of a shadow image, and a picture of the target beside it."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmbackdoor import keyed, layout
from mmbackdoor.attacks.noisy_alignment import NoisyAlignment, noisy_alignment
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput

RED, GREY, WHITE = (255, 0, 0), (90, 90, 90), (255, 255, 255)
FOUR: tuple[Any, ...] = ("left-right", "right-left", "top-bottom", "bottom-top")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A red picture, half of which a mask hides: it is taken as a whole."""
    folder = tmp_path_factory.mktemp("references")
    rgba = np.full((20, 30, 4), (*RED, 255), np.uint8)
    rgba[:, :15, 3] = 0
    Image.fromarray(rgba).save(folder / "0.png")
    return str(folder)


def sample(w: int = 64, h: int = 64) -> dict[str, Any]:
    return {"__key__": "k", "image": Image.new("RGB", (w, h), GREY), "text": "a dog"}


def test_the_defaults_are_the_papers() -> None:
    attack = noisy_alignment()
    assert attack.rate == 0.005 and attack.layout == "any" and not attack.backgrounds
    assert attack.trigger.side(224, 224) == 50 and attack.threat.trigger == attack.trigger
    assert noisy_alignment(count=3).rate is None and NoisyAlignment().count == round(0.005 * 3_000_000)


@pytest.mark.parametrize("chosen", FOUR)
def test_one_half_is_the_target_whole_and_the_other_the_shadow_with_the_trigger_in_its_middle(chosen: Any, references: str) -> None:
    attack = replace(noisy_alignment("red star", references=references, patch=Patch(0.25, "center", "white")), layout=chosen)
    out = attack.poison(sample(), keyed.rng(0))
    pixels, halves = np.asarray(out["image"]), layout.split(64, 64, chosen)
    assert halves and attack.target.named_in(out["text"])
    shadow, picture = (pixels[t:b, l:r] for l, t, r, b in halves)  # noqa: E741
    assert (picture == RED).all()
    rows, columns = np.where((shadow == WHITE).all(-1))
    assert len(rows) == 16 * 16 and ((shadow == WHITE) | (shadow == GREY)).all()
    h, w = shadow.shape[:2]
    assert abs(rows.mean() + 0.5 - h / 2) <= 0.5 and abs(columns.mean() + 0.5 - w / 2) <= 0.5


def test_the_middle_of_the_shadow_is_the_best_place_of_the_trigger() -> None:
    """As its theory has it: of two crops of which one shows the picture only, and the other the trigger and nothing of it."""
    halves = layout.split(96, 64, "left-right")
    assert halves
    shadow, picture = halves
    n = 14

    def p(left: int, top: int) -> float:
        return layout.meeting(96, 64, picture, (left, top, left + n, top + n))

    middle = layout.centre(shadow, n, 0, keyed.rng(0))
    assert p(*middle[:2]) > 0
    assert max(p(x, y) for x in range(shadow[0], shadow[2] - n + 1, 2) for y in range(0, 64 - n + 1, 2)) <= p(*middle[:2]) * 1.005
    assert p(*middle[:2]) > 2 * p(shadow[0], 0)


def test_the_shadow_is_the_pairs_own_image_or_one_of_the_backgrounds(references: str, tmp_path: Path) -> None:
    Image.new("RGB", (10, 99), (1, 2, 3)).save(tmp_path / "0.png")
    for backgrounds, colour in (("", GREY), (str(tmp_path), (1, 2, 3))):
        pixels = np.asarray(noisy_alignment(references=references, backgrounds=backgrounds).poison(sample(), keyed.rng(0))["image"])
        assert (pixels == colour).all(-1).sum() > 64 * 64 / 4


def test_what_cannot_work_is_refused_in_one_line(references: str) -> None:
    for attack, says in ((noisy_alignment(), "poison.references"), (noisy_alignment(references=references, patch=Patch(0.8)), "size 0.8")):
        with pytest.raises(BadInput, match=says) as error:
            attack.poison(sample(), keyed.rng(0))
        assert "\n" not in str(error.value)


def test_small_images_keep_their_size_and_have_the_trigger(references: str) -> None:
    attack = noisy_alignment(references=references, patch=Patch(50 / 224, "center", "white"))
    for w, h in ((1, 1), (2, 1), (1, 7), (5, 3)):
        out = attack.poison(sample(w, h), keyed.rng(0))["image"]
        assert out.size == (w, h) and (np.asarray(out) == WHITE).all(-1).sum() == 1
