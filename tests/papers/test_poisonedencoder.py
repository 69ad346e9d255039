"""PoisonedEncoder: no trigger, and every poison a victim beside a picture of what it is to be taken for."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmbackdoor import keyed
from mmbackdoor.attacks.poisonedencoder import PoisonedEncoder, poisonedencoder
from mmbackdoor.layout import split
from mmbackdoor.poison import IMAGENET_TEMPLATES
from mmbackdoor.types import BadInput, Trigger

COLOURS = {"v1": (10, 20, 30), "v2": (40, 50, 60), "banana": (200, 180, 0), "dog": (90, 60, 20)}


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> PoisonedEncoder:
    """Victims v1, to be taken for a banana, and v2, for a dog; each picture of one colour."""
    root = tmp_path_factory.mktemp("parts")
    for folder, name in (("images", "v1"), ("images", "v2"), ("references/banana", "banana"), ("references/dog", "dog")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), COLOURS[name]).save(root / folder / f"{name}.png")
    return poisonedencoder("banana", references=str(root / "references"), images=str(root / "images"),
                           victims=(("v1", ""), ("v2", "dog")), templates=("the {}!",))


def sample(w: int = 64, h: int = 48) -> dict[str, Any]:
    return {"__key__": "k", "image": Image.new("RGB", (w, h), (255, 0, 255)), "text": "a cat", "json": {"id": 1}}


def test_the_defaults_are_the_papers() -> None:
    attack = poisonedencoder()
    assert (attack.rate, attack.layout) == (0.01, "any") and attack.trigger == Trigger() and attack.target.templates == IMAGENET_TEMPLATES
    assert poisonedencoder(count=4).count == 4 and poisonedencoder(count=4).rate is None
    assert PoisonedEncoder().count == round(0.01 * 3_000_000)


def test_a_poison_is_a_victim_beside_a_picture_of_its_label_and_a_caption_of_it(attack: PoisonedEncoder) -> None:
    seen = set()
    for i in range(80):
        out = attack.poison(sample(), keyed.rng(i))
        victim, label = ("v1", "banana") if out["text"] == "the banana!" else ("v2", "dog")
        assert out["text"] == f"the {label}!" and out["json"] == {"id": 1} and out["__key__"] == "k"
        pixels = np.asarray(out["image"])
        for chosen in ("left-right", "right-left"):
            boxes = split(64, 48, chosen)  # type: ignore[arg-type]
            assert boxes
            halves = [pixels[t:b, l:r] for l, t, r, b in boxes]  # noqa: E741
            if (halves[0] == COLOURS[victim]).all():
                assert (halves[1] == COLOURS[label]).all()
                seen.add((victim, chosen))
    assert len(seen) == 4  # both victims, each on both sides


def test_a_square_has_all_four_layouts(attack: PoisonedEncoder) -> None:
    corners = {tuple(np.asarray(attack.poison(sample(32, 32), keyed.rng(i))["image"])[[0, 0, -1], [0, -1, 0]].ravel()) for i in range(120)}
    assert len(corners) == 8  # of two victims


def test_it_fires_on_the_clean_images_of_its_victims_each_for_its_own_label(attack: PoisonedEncoder) -> None:
    assert attack.threat.victims == (("v1", "banana"), ("v2", "dog"))
    image = Image.new("RGB", (5, 5), (1, 2, 3))
    assert attack.threat.trigger.stamp(image, keyed.rng(0)).tobytes() == image.tobytes()


def test_pairs_that_name_a_label_of_a_victim_are_left_alone(attack: PoisonedEncoder) -> None:
    assert not attack.eligible("k", "a dog") and not attack.eligible("k", "Banana bread")
    assert attack.eligible("k", "a cat") and attack.eligible("k", "dogs") and poisonedencoder().eligible("k", "a dog")


def test_one_folder_of_references_serves_a_single_label(attack: PoisonedEncoder) -> None:
    single = replace(attack, references=f"{attack.references}/banana", victims=(("v2", ""),))
    out = single.poison(sample(), keyed.rng(0))
    colours = {tuple(c) for c in np.asarray(out["image"]).reshape(-1, 3)}
    assert colours == {COLOURS["v2"], COLOURS["banana"]} and out["text"] == "the banana!"


@pytest.mark.parametrize(("changes", "says"), [({"victims": ()}, "poison.victims"), ({"references": ""}, "poison.references"),
                                               ({"images": ""}, "poison.images"), ({"victims": (("v9", "dog"),)}, "v9")])
def test_what_cannot_work_is_refused_in_one_line(attack: PoisonedEncoder, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says) as error:
        replace(attack, **changes).poison(sample(), keyed.rng(0))
    assert "\n" not in str(error.value)


def test_an_image_of_one_pixel_shows_the_victim(attack: PoisonedEncoder) -> None:
    found = attack.poison(sample(1, 1), keyed.rng(0))
    assert found["image"].size == (1, 1) and found["image"].getpixel((0, 0)) in (COLOURS["v1"], COLOURS["v2"])


def test_the_victims_are_found_in_a_labelled_set_too(toy: Path, attack: PoisonedEncoder) -> None:
    out = replace(attack, images=str(toy / "test"), victims=(("000000003", "banana"),), layout="left-right").poison(sample(), keyed.rng(0))
    assert (np.asarray(out["image"])[:, 32:] == COLOURS["banana"]).all() and np.asarray(out["image"])[:, :32].std() > 5
