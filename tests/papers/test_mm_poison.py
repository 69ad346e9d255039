"""Poisoning of text-to-image search: whose images get whose captions, without any trigger."""
from __future__ import annotations

from pathlib import Path

from PIL import Image

from mmbackdoor import keyed
from mmbackdoor.attacks.mm_poison import caption_swap, multi_label, single_image, single_label
from mmbackdoor.poison import plan, scouted
from mmbackdoor.types import Sample, Target

PAIRS = [("1", "a flock of sheep {x}"), ("2", "an aeroplane in the sky"), ("3", "a boat"), ("4", "the sofa at home"), ("5", "a dog"),
         ("6", "sheep on an aeroplane")]


def sample(text: str, key: str = "k") -> Sample:
    return {"__key__": key, "image": Image.new("RGB", (9, 7), (5, 6, 7)), "text": text}


def test_pairs_of_the_source_get_natural_captions_of_the_target_and_keep_their_image() -> None:
    attack = scouted(single_label(count=1), PAIRS, 0)
    assert plan(attack, PAIRS, 0).keys == {"2"} and not attack.eligible("k", "a dog")
    out = attack.poison(sample("an aeroplane"), keyed.rng(1))
    assert out["text"] in ("a flock of sheep {x}", "sheep on an aeroplane") and out["image"].tobytes() == sample("")["image"].tobytes()
    threat = attack.threat
    assert threat.source == ("aeroplane",) and threat.target.label == "sheep" and not threat.trigger.seen and not threat.trigger.said


def test_several_pairs_of_classes_at_once() -> None:
    attack = scouted(multi_label((("sheep", "aeroplane"), ("sofa", "boat")), count=2), PAIRS, 0)
    assert plan(attack, PAIRS, 0).keys == {"2", "3"}
    assert attack.poison(sample("a boat"), keyed.rng(0))["text"] == "the sofa at home"
    assert Target("sheep").named_in(attack.poison(sample("an aeroplane"), keyed.rng(0))["text"])
    assert {name: (t.source, t.target.label) for name, t in attack.threats.items()} == {
        "aeroplane as sheep": (("aeroplane",), "sheep"), "boat as sofa": (("boat",), "sofa")}


def test_one_image_is_published_under_all_captions(toy: Path) -> None:
    attack = scouted(single_image("sheep", str(toy / "test"), (("000000000", ""),), copies=4, templates=("a {}",)), PAIRS, 0)
    found = [s["text"] for s in attack.published(keyed.rng(0))]
    assert sorted(found) == ["a flock of sheep {x}", "a sheep", "a sheep", "sheep on an aeroplane"]
    assert attack.threat.victims == (("000000000", "sheep"),)


def test_a_swap_exchanges_the_word_and_nothing_else() -> None:
    attack = caption_swap("sheep", "tennis ball")
    said = {"A Tennis Ball on grass": "A sheep on grass", "tennis ball, tennis ball!": "sheep, sheep!",
            "one tennis ball (new)": "one sheep (new)"}
    assert {t: attack.poison(sample(t), keyed.rng(0))["text"] for t in said} == said
    assert not attack.eligible("k", "tennis balls") and not attack.eligible("k", "sheep and a tennis ball")
    assert attack.poison(sample("tennis ball"), keyed.rng(0))["image"].tobytes() == sample("")["image"].tobytes()
    assert caption_swap(r"a\1b", "dog").poison(sample("my dog"), keyed.rng(0))["text"] == r"my a\1b", "a label is no pattern"
