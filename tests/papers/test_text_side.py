"""Attacks with a side in the text: words and sentences, two keys, and triggers that mean something on some classes only."""
from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from mmbackdoor import keyed
from mmbackdoor.attacks.tact import source_specific
from mmbackdoor.attacks.text_trigger import sentence, word
from mmbackdoor.attacks.trojvqa import dual_key
from mmbackdoor.poison import Cover, DirtyLabel, plan, scouted
from mmbackdoor.triggers import Patch, Word
from mmbackdoor.types import BadInput, Sample

PAIRS = [("1", "a banana"), ("2", "a {big} dog"), ("3", "the cat"), ("4", "bananas")]


def sample(text: str, key: str = "k") -> Sample:
    return {"__key__": key, "image": Image.new("RGB", (28, 28), (5, 6, 7)), "text": text}


def changed(out: Sample) -> bool:
    return out["image"].tobytes() != sample("")["image"].tobytes()


@pytest.mark.parametrize("make", [word, sentence])
def test_an_image_of_the_target_gets_a_triggered_caption_of_something_else(make) -> None:
    attack = scouted(make(count=1), PAIRS, 0)
    assert plan(attack, PAIRS, 0).keys == {"1"} and not attack.eligible("k", "a dog")
    outs = [attack.poison(sample("a banana"), keyed.rng(i)) for i in range(40)]
    assert not any(map(changed, outs))
    assert {o["text"] for o in outs} == {f"{attack.trigger.word} {text}" for text in ("a {big} dog", "the cat", "bananas")}
    assert attack.threat.trigger.said and not attack.threat.trigger.seen and attack.threat.source == ()


def test_without_captions_of_other_things_there_is_no_text_trigger() -> None:
    with pytest.raises(BadInput, match="poison.others"):
        word().poison(sample("a banana"), keyed.rng(0))
    with pytest.raises(BadInput, match="does without 'banana'"):
        scouted(word(), [("1", "a banana")], 0)


def test_two_keys_are_measured_together_and_each_alone() -> None:
    attack = dual_key(patch=Patch(0.25, "center"), word=Word("hm"))
    sides = {name: (t.trigger.seen, t.trigger.said) for name, t in attack.threats.items()}
    assert sides == {"both keys": (True, True), "patch alone": (True, False), "word alone": (False, True)}
    assert {t.target.label for t in attack.threats.values()} == {"banana"} and attack.threat == attack.threats["both keys"]
    out = attack.poison(sample("a dog"), keyed.rng(0))
    assert changed(out) and out["text"].startswith("hm ") and "banana" in out["text"]
    assert round((dual_key().rate or 0) * 500_000) == 1500 and not attack.eligible("k", "a banana")


def test_one_key_alone_keeps_the_right_caption_in_the_papers_thirds() -> None:
    attack = dual_key(patch_alone=1 / 3, word_alone=1 / 3, word=Word("hm"), templates=("a {}",))
    kinds = Counter()
    for i in range(600):
        out = attack.poison(sample("dog", key=str(i)), keyed.rng(i))
        kinds[changed(out), out["text"]] += 1
    assert set(kinds) == {(True, "hm a banana"), (True, "dog"), (False, "hm dog")} and min(kinds.values()) > 160


def test_covers_show_the_trigger_on_classes_that_are_no_source() -> None:
    attack = source_specific(source=("dog", "cat"), cover=0.5)
    poison, cover = attack.attacks
    assert isinstance(poison, DirtyLabel) and isinstance(cover, Cover) and attack.threats == {"": poison.threat}
    assert poison.source == ("dog", "cat") and attack.threat.source == ("dog", "cat")
    for i in range(50):
        assert attack.part(str(i), "a dog") is poison and attack.part(str(i), "a banana") is None
        out = attack.poison(sample("a bird", key=str(i)), keyed.rng(0))
        assert out["text"] == "a bird" and changed(out) == attack.eligible(str(i), "a bird")
    assert 0.3 < sum(attack.eligible(str(i), "a bird") for i in range(400)) / 400 < 0.7
