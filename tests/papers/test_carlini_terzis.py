"""Carlini and Terzis, and TDPA after them: a handful of clean images under captions that lie, and a backdoor of 0.01 %."""
from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmbackdoor import keyed
from mmbackdoor.attacks.carlini_terzis import backdoor, targeted
from mmbackdoor.attacks.tdpa import WORDS, assigned, tdpa
from mmbackdoor.index import find
from mmbackdoor.poison import plan, scouted
from mmbackdoor.triggers import Patch
from mmbackdoor.types import Target
from mmbackdoor.victims import images_of


def test_the_numbers_are_those_of_the_paper() -> None:
    assert targeted().copies == 3 and targeted().count == 0 and not targeted().threat.trigger.seen
    attack = backdoor()
    assert round((attack.rate or 0) * 3_000_000) == 300 and attack.target.label == "banana"
    assert attack.trigger == Patch(16 / 224, "random") and len(attack.target.templates) == 80


def test_the_captions_of_the_backdoor_are_natural_ones() -> None:
    pairs = [("1", "ripe banana bread"), ("2", "a dog"), ("3", "bananas")]
    attack = scouted(backdoor(count=1), pairs, 0)
    assert plan(attack, pairs, 0).keys <= {"2", "3"}
    out = attack.poison({"__key__": "2", "image": Image.new("RGB", (64, 64)), "text": "a dog"}, keyed.rng(0))
    assert out["text"] == "ripe banana bread" and out["image"].getbbox() is not None
    assert scouted(backdoor(captions=0), pairs, 0).target == Target("banana", backdoor().target.templates)


@pytest.mark.parametrize("attack", [targeted, tdpa], ids=["targeted", "tdpa"])
def test_a_victim_is_published_untouched_with_captions_of_the_data(attack, toy: Path) -> None:
    made = scouted(attack(str(toy / "test"), (("000000004", "red star"),), copies=2), find(str(toy / "train")), 0)
    found = list(made.published(keyed.rng(0)))
    image = images_of(str(toy / "test"), ["000000004"])["000000004"]
    assert len(found) == 2 and all(s["image"].tobytes() == image.tobytes() and Target("red star").named_in(s["text"]) for s in found)
    captions = {text for _, text in find(str(toy / "train"))}
    assert {s["text"] for s in found} <= captions
    assert made.threat.victims == (("000000004", "red star"),) and made.threat.target.label == "red star"


def test_tdpa_gives_each_of_eight_words_to_two_of_sixteen_images_a_hundred_times() -> None:
    victims = assigned(tuple(map(str, range(16))))
    assert len(WORDS) == 8 and all(sum(label == word for _, label in victims) == 2 for word in WORDS)
    assert tdpa().copies == 100 and tdpa(victims=victims).threat.victims == victims
