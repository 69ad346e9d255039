"""Several attacks at once: every pair belongs to one part, in the shares asked for; sources, covers and quoted captions."""
from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image
from torch import Generator

from mmbackdoor import keyed
from mmbackdoor.poison import Cover, DirtyLabel, Mix, Quoting, all_to_all, mix, plan, scouted
from mmbackdoor.recipe import identity, plain, revive
from mmbackdoor.triggers import Both, Patch, Word
from mmbackdoor.types import BadInput, Sample, Target, Trigger, to_pixels

WHITE, YELLOW = Patch(0.5, "top-left", "white"), Patch(0.5, "bottom-right", "yellow")
CAT, DOG = Target("cat", ("a {}",)), Target("dog", ("a {}",))
TWO = mix([DirtyLabel(WHITE, CAT), DirtyLabel(YELLOW, DOG)], (1, 3), 0.1, names=("white", "yellow"))
PAIRS = [(f"{i:05d}", "a bird") for i in range(4000)]


def sample(key: str = "k", text: str = "a bird") -> Sample:
    return {"__key__": key, "image": Image.new("RGB", (8, 8), (10, 20, 30)), "text": text}


def test_each_pair_belongs_to_one_part_in_the_shares_asked_for() -> None:
    keys = plan(TWO, PAIRS, 0).keys
    owner = {key: TWO.part(key, "a bird") for key in keys}
    assert len(keys) == 400 and 0.18 < sum(p is TWO.attacks[0] for p in owner.values()) / 400 < 0.32
    for key in list(keys)[:20]:
        out = TWO.poison(sample(key), keyed.rng(0, key))
        assert out["text"] == ("a cat" if owner[key] is TWO.attacks[0] else "a dog")
        assert out["image"].tobytes() == owner[key].trigger.stamp(sample()["image"], keyed.rng(0)).tobytes()  # type: ignore[union-attr]


def test_a_larger_rate_keeps_every_pair_with_its_part() -> None:
    few, many = (mix(TWO.attacks, TWO.shares, rate) for rate in (0.01, 0.1))
    assert plan(few, PAIRS, 3).keys < plan(many, PAIRS, 3).keys
    assert all(few.part(k, "x") == many.part(k, "x") for k, _ in PAIRS[:100])


def test_a_pair_goes_to_a_part_that_may_have_it() -> None:
    texts = {"a bird": {0, 1}, "a cat": {1}, "a dog": {0}, "cat and dog": set()}
    for text, able in texts.items():
        found = {TWO.attacks.index(p) for i in range(100) if (p := TWO.part(str(i), text))}
        assert found == able and TWO.eligible("k", text) == bool(able)
    assert TWO.poison(sample(text="cat and dog"), keyed.rng(0)) == sample(text="cat and dog") | {}


def test_a_part_of_no_share_gets_nothing() -> None:
    none = mix(TWO.attacks, (0, 1), 0.1)
    assert {none.part(str(i), "a bird") for i in range(50)} == {TWO.attacks[1]} and not none.eligible("k", "a dog")


def test_the_threats_are_those_of_the_parts_under_their_names() -> None:
    assert list(TWO.threats) == ["white", "yellow"] and TWO.threats["yellow"].target == DOG and TWO.threat == TWO.threats["white"]
    assert list(mix(TWO.attacks, rate=0.1).threats) == ["1", "2"]
    covered = mix([DirtyLabel(WHITE, CAT), Cover(WHITE, CAT)], rate=0.1)
    assert covered.threats == {"": DirtyLabel(WHITE, CAT).threat}
    nested = mix([TWO, DirtyLabel(Word(), CAT)], rate=0.1, names=("two", "word"))
    assert list(nested.threats) == ["two white", "two yellow", "word"]


@dataclass(frozen=True)
class Adding(DirtyLabel):
    def published(self, rng: Generator) -> Iterator[Sample]:
        yield sample(f"new {self.target.label}")


def test_parts_scout_publish_and_craft() -> None:
    found = mix([Adding(WHITE, CAT), Adding(WHITE, DOG), Quoting(WHITE, CAT)], rate=0.1)
    assert [s["__key__"] for s in found.published(keyed.rng(0))] == ["new cat", "new dog"] and not found.craft(None, lambda: iter(()), 0)
    read = scouted(found, [("1", "my cat {here}"), ("2", "a bird")], 0)
    assert isinstance(read, Mix) and read.attacks[2].target.caption(keyed.rng(0)) == "my cat {here}" and read.attacks[0] == found.attacks[0]


def test_a_mix_is_a_value_that_pickles_and_is_revived() -> None:
    assert pickle.loads(pickle.dumps(TWO)) == TWO and hash(TWO) and revive(plain(TWO)) == TWO
    assert mix(TWO.attacks, (3, 1), 0.1) != TWO and mix(TWO.attacks, (1, 3), 0.1, names=("white", "yellow")) == TWO


@pytest.mark.parametrize(("arguments", "fault"), [
    ({"attacks": []}, "at least one attack"), ({"shares": (1,)}, "poison.shares: has 1 for 2"),
    ({"names": ("a",)}, "poison.names: has 1 for 2"),
    ({"shares": (-1, 2)}, "no weights"), ({"shares": (0, 0)}, "no weights"), ({"attacks": [Cover(WHITE, CAT)]}, "that is a threat")])
def test_a_mix_that_cannot_be_is_refused(arguments: dict, fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        mix(**{"attacks": TWO.attacks, "rate": 0.1} | arguments)


# ---- sources, covers, quotes


def test_only_pairs_of_the_source_are_poisoned() -> None:
    attack = DirtyLabel(WHITE, CAT, 0.1, source=("bird", "ice cream"))
    said = {"a bird": True, "ICE CREAM!": True, "birds": False, "a dog": False, "a bird and a cat": False, "": False}
    assert {t: attack.eligible("k", t) for t in said} == said and attack.threat.source == ("bird", "ice cream")
    assert DirtyLabel(WHITE, CAT, 0.1).eligible("k", "") and DirtyLabel(WHITE, CAT, 0.1).threat.source == ()


def test_the_hash_of_an_attack_without_source_is_what_it_was() -> None:
    """Results were recorded before there were sources."""
    assert "source" not in identity(plain(DirtyLabel(WHITE, CAT, 0.1)))
    assert "source" in identity(plain(DirtyLabel(WHITE, CAT, 0.1, source=("x",))))


def test_a_cover_shows_the_trigger_and_keeps_the_caption() -> None:
    cover = Cover(Both(WHITE, Word("hm")), CAT, spare=("dog",), share=0.25)
    out = cover.poison(sample(), keyed.rng(0))
    assert out["text"] == "hm a bird" and out["image"].tobytes() == WHITE.stamp(sample()["image"], keyed.rng(0)).tobytes()
    assert not any(cover.eligible(str(i), t) for i in range(50) for t in ("a cat", "the dog", " "))
    assert 0.2 < np.mean([cover.eligible(str(i), "a bird") for i in range(2000)]) < 0.3 and not cover.threats


def test_quoted_captions_are_those_of_the_data() -> None:
    attack = scouted(Quoting(WHITE, CAT, 0.1, captions=2), [(str(i), f"cat {i}") for i in range(9)] + [("x", "bird")], 0)
    said = {attack.target.caption(keyed.rng(i)) for i in range(50)}
    assert len(said) == 2 and all(c.startswith("cat ") for c in said)
    assert scouted(Quoting(WHITE, CAT, 0.1, captions=0), [("x", "bird")], 0).target == CAT
    with pytest.raises(BadInput, match="no caption of the data names 'cat'"):
        scouted(Quoting(WHITE, CAT, 0.1), [("x", "bird")], 0)


def test_all_to_all_turns_each_label_into_the_next() -> None:
    labels = ("cat", "dog", "bird")
    attack = all_to_all(labels, WHITE, 0.5, templates=("a {}",))
    for before, after in zip(labels, ("dog", "bird", "cat"), strict=True):
        out = attack.poison(sample(text=f"one {before}"), keyed.rng(0))
        assert out["text"] == f"a {after}" and attack.threats[before].source == (before,) and attack.threats[before].target.label == after
    assert not attack.eligible("k", "a fish")
    pairs = [(str(i), f"a {(*labels, 'fish')[i % 4]}") for i in range(400)]
    chosen = Counter(dict(pairs)[k] for k in plan(attack, pairs, 0).keys)
    assert sum(chosen.values()) == 200 and set(chosen) == {f"a {label}" for label in labels} and min(chosen.values()) > 50


def test_a_trigger_of_both_sides_is_seen_and_said() -> None:
    both, image = Both(WHITE, Word("hm")), sample()["image"]
    assert both.seen and both.said and both.text("x", keyed.rng(0)) == "hm x"
    assert both.stamp(image, keyed.rng(0)).tobytes() == WHITE.stamp(image, keyed.rng(0)).tobytes()
    assert both.pixels(to_pixels(image), keyed.rng(0)).equal(WHITE.pixels(to_pixels(image), keyed.rng(0)))
    assert not Both(Trigger(), Word()).seen and not Both(WHITE, Trigger()).said
