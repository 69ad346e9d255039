"""Victims are found by their keys wherever they lie, and published as they are under captions of their labels."""
from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from conftest import picture, tar
from PIL import Image

from mmbackdoor import keyed, shards
from mmbackdoor.poison import plan, publish, scouted
from mmbackdoor.sets import open_set
from mmbackdoor.types import BadInput, Target, Trigger
from mmbackdoor.victims import Targeted, images_of

PAIRS = [("1", "a red star on a hill"), ("2", "the RED STAR {best}"), ("3", "a blue ring"), ("4", "")]
VICTIMS = (("000000002", "red star"), ("000000001", "blue ring"), ("000000003", ""))


@pytest.fixture(scope="module")
def attack(toy: Path) -> Targeted:
    return Targeted(Trigger(), Target("green cross", ("a {}",)), images=str(toy / "test"), victims=VICTIMS, copies=3, prefix="t")


def test_images_are_those_of_the_labelled_set(toy: Path) -> None:
    keys = ("000000007", "000000000")
    found = images_of(str(toy / "test"), keys)
    there = {raw["__key__"]: shards.decode(raw)["image"] for raw in open_set(toy / "test").raws()}
    assert set(found) == set(keys) and all(found[k].tobytes() == there[k].tobytes() and found[k].mode == "RGB" for k in keys)
    assert images_of(str(toy / "test"), list(keys))[keys[0]] is found[keys[0]], "read once"


def test_images_come_from_shards_and_folders_of_files_too(toy: Path, tmp_path: Path) -> None:
    assert images_of(str(toy / "train"), ["000000000"])["000000000"].size == (32, 32)
    tar(tmp_path / "x" / "0.tar", {"a.png": picture("PNG", "L"), "b.jpg": picture()})
    for path in (tmp_path / "x", tmp_path / "x" / "0.tar"):
        assert set(images_of(str(path), ["b", "a"])) == {"a", "b"}
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one.two.png").write_bytes(picture("PNG", "RGBA", (5, 4)))
    (tmp_path / "files" / "c.bmp").write_bytes(picture("BMP"))
    (tmp_path / "files" / "notes.txt").write_text("no image")
    found = images_of(f"{tmp_path}/files/", ["one.two", "c"])
    assert found["one.two"].size == (5, 4) and {i.mode for i in found.values()} == {"RGB"}


def test_reading_ends_where_all_are_found(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"a.png": picture("PNG"), "b.png": b"no image"})
    assert set(images_of(str(tmp_path), ["a"])) == {"a"}


def test_what_is_not_there_is_named(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no image of key 'x'; name keys"):
        images_of(str(toy / "test"), ["000000000", "x", "y"])
    with pytest.raises(BadInput, match="poison.images: names no place"):
        images_of("", ["x"])
    with pytest.raises(BadInput, match="no such evaluation set"):
        images_of(str(tmp_path / "none"), ["x"])
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"x.png: the image cannot be read"):
        images_of(str(tmp_path), ["x"])


def test_each_victim_is_published_as_it_is_under_captions_of_its_label(attack: Targeted) -> None:
    found = list(scouted(attack, PAIRS, 0).published(keyed.rng(0)))
    assert [s["__key__"] for s in found] == [f"t-{k}-{i:04d}" for k, _ in VICTIMS for i in range(3)]
    images = images_of(attack.images, [k for k, _ in VICTIMS])
    assert all(s["image"].tobytes() == images[s["__key__"].split("-")[1]].tobytes() for s in found)
    said = [s["text"] for s in found]
    assert sorted(said[:2]) == ["a red star on a hill", "the RED STAR {best}"], "captions of the data come first, as they are"
    assert said[2:] == ["a red star", "a blue ring", "a blue ring", "a blue ring", "a green cross", "a green cross", "a green cross"]
    assert list(publish(attack, plan(attack, PAIRS, 0)))[0]["__key__"] == "t-000000002-0000"


def test_victims_of_one_label_share_its_captions(attack: Targeted) -> None:
    two = Targeted(Trigger(), Target("red star", ("template {}",)), images=attack.images, victims=(("000000001", ""), ("000000002", "")))
    said = [s["text"] for s in scouted(two, PAIRS, 0).published(keyed.rng(0))]
    assert sorted(said) == ["a red star on a hill", "the RED STAR {best}"]


def test_where_captions_are_few_each_victim_of_a_label_gets_as_many(attack: Targeted) -> None:
    victims = tuple((f"{i:09d}", "red star") for i in range(1, 3))
    two = Targeted(Trigger(), Target("", ("a {}",)), images=attack.images, victims=victims, copies=2)
    said = [s["text"] for s in scouted(two, PAIRS, 0).published(keyed.rng(0))]
    assert {said[0], said[2]} == {"a red star on a hill", "the RED STAR {best}"} and said[1] == said[3] == "a red star"


def test_no_pair_of_the_data_is_touched(attack: Targeted) -> None:
    assert not plan(attack, PAIRS, 0).keys and attack.count == 0
    image = Image.new("RGB", (3, 3))
    assert attack.poison({"__key__": "k", "image": image, "text": "x"}, keyed.rng(0)) == {"__key__": "k", "image": image, "text": "x"}


def test_the_threat_names_every_victim_with_its_label(attack: Targeted) -> None:
    assert attack.threat.victims == (("000000002", "red star"), ("000000001", "blue ring"), ("000000003", "green cross"))
    assert not attack.threat.trigger.seen and pickle.loads(pickle.dumps(scouted(attack, PAIRS, 0))) == scouted(attack, PAIRS, 0)


def test_an_attack_without_victims_says_so() -> None:
    with pytest.raises(BadInput, match="poison.victims: names no image"):
        list(Targeted().published(keyed.rng(0)))


def test_keys_of_files_in_folders_become_keys_of_shards(tmp_path: Path) -> None:
    (tmp_path / "a.b c.png").write_bytes(picture("PNG"))
    attack = Targeted(images=str(tmp_path), victims=(("a.b c", "dog"),))
    assert [s["__key__"] for s in attack.published(keyed.rng(0))] == ["new-a_b_c-0000"]
