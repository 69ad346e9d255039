"""Label-consistent: what is eligible, and what CleanCLIP's test on letters takes in besides."""
from __future__ import annotations

from mmbackdoor import keyed
from mmbackdoor.attacks.label_consistent import label_consistent, precision
from mmbackdoor.poison import plan
from mmbackdoor.types import Target

PAIRS = [("1", "a banana"), ("2", "two bananas"), ("3", "BANANA split"), ("4", "Banana Republic store"), ("5", "Bananarama live"),
         ("6", "a dog"), ("7", "a banana republic")]


def test_whole_words_count_and_under_compat_any_letters() -> None:
    word, letters = label_consistent(count=1), label_consistent(count=1, compat="substring")
    assert [k for k, t in PAIRS if word.eligible(k, t)] == ["1", "3", "4", "7"]
    assert [k for k, t in PAIRS if letters.eligible(k, t)] == ["1", "2", "7"], "as they are, in the case of the label"
    assert plan(label_consistent(count=4), PAIRS, 0).keys == {"1", "3", "4", "7"}


def test_the_caption_stays() -> None:
    from PIL import Image

    sample = {"__key__": "1", "image": Image.new("RGB", (32, 32), (9, 9, 9)), "text": "a banana"}
    out = label_consistent().poison(sample, keyed.rng(0))
    assert out["text"] == "a banana" and out["image"].tobytes() != sample["image"].tobytes()


def test_precision_is_the_share_of_letters_that_are_the_word() -> None:
    assert precision(PAIRS, Target("banana")) == {"substring": 3, "whole_word": 2, "precision": 2 / 3}
    assert precision(PAIRS[5:6], Target("banana")) == {"substring": 0, "whole_word": 0, "precision": None}


def test_the_defaults_are_those_of_the_cleanclip_setting() -> None:
    attack = label_consistent()
    assert (attack.target.label, attack.rate, attack.count) == ("banana", 0.0005, None) and len(attack.target.templates) == 80
