"""CorruptEncoder: its numbers, object and trigger where its theory wants them, and what its image-text design promises."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmbackdoor import keyed, layout
from mmbackdoor.attacks.corruptencoder import CorruptEncoder, corruptencoder, corruptencoder_clip, corruptencoder_plus, steady
from mmbackdoor.clip import Augment
from mmbackdoor.layout import Box
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput, Target

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
MOCO = (0.2, 1.0)


def folder_of(path: Path, colour: tuple[int, int, int], *sizes: tuple[int, int]) -> str:
    """Objects of one colour: an ellipse whose alpha is its mask."""
    path.mkdir()
    for i, (w, h) in enumerate(sizes):
        y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
        rgba = np.zeros((h, w, 4), np.uint8)
        rgba[..., :3], rgba[..., 3] = colour, 255 * (np.hypot(x, y) <= 1)
        Image.fromarray(rgba).save(path / f"{i}.png")
    return str(path)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(tmp_path_factory.mktemp("parts") / "references", RED, (60, 40), (30, 30), (20, 90))


def sample(w: int = 64, h: int = 64, text: str = "a dog") -> dict[str, Any]:
    return {"__key__": "k", "image": Image.new("RGB", (w, h)), "text": text}


def poisons(attack: CorruptEncoder, n: int, w: int = 64, h: int = 64) -> list[np.ndarray]:
    return [np.asarray(attack.poison(sample(w, h), keyed.rng(i, "poison", "k"))["image"]).astype(int) for i in range(n)]


def has(image: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((image == colour).all(-1).any())


def test_the_defaults_are_the_papers() -> None:
    attack = corruptencoder()
    assert attack.rate == 0.005 and attack.area_ratio == 2 and attack.support_ratio == 0 and attack.jitter == 0.05
    assert attack.trigger.side(224, 224) == 40 and not attack.scale
    plus = corruptencoder_plus()
    assert plus.support_ratio == 0.2 and plus.rate == 0.005
    clip = corruptencoder_clip()
    assert clip.scale == Augment().scale and clip.support_ratio == 0.2 and clip.trigger.side(224, 224) == 16 and clip.rate == 0.0005
    assert CorruptEncoder().count == round(0.005 * 3_000_000) and CorruptEncoder().rate is None


def test_pairs_that_name_the_target_are_left_alone_and_the_others_say_it_afterwards(references: str) -> None:
    attack = corruptencoder("red star", references=references, templates=("the {}!",))
    assert not attack.eligible("k", "a Red Star") and attack.eligible("k", "red stars")
    out = attack.poison(sample(), keyed.rng(0))
    assert out["text"] == "the red star!" and out["__key__"] == "k"
    assert attack.threat.trigger == attack.trigger and attack.threat.target == Target("red star", ("the {}!",))


# ---- the theory


@pytest.mark.parametrize(("w", "h"), [(112, 56), (100, 64), (96, 96), (56, 112)])
def test_the_middle_of_what_remains_is_the_best_place_of_the_trigger(w: int, h: int, references: str) -> None:
    """By the formula over a grid of places, and by crops that training draws, within their noise."""
    thing, trigger = arranged(corruptencoder(references=references, patch=Patch(10 / 56)), w, h)
    n = trigger[2] - trigger[0]
    found = layout.meeting(w, h, thing, trigger, MOCO)
    places = [(x, y, x + n, y + n) for x in range(0, w - n + 1, 3) for y in range(0, h - n + 1, 3)]
    places = [p for p in places if not layout.overlap(p, thing)]
    assert len(places) > 50 and found > 0
    assert max(layout.meeting(w, h, thing, p, MOCO) for p in places) <= found * 1.005

    rng = keyed.rng(0, "crops")
    left, top, right, bottom = np.array([Augment(MOCO).box(w, h, rng) for _ in range(6000)]).T
    apart = (left >= thing[2]) | (right <= thing[0]) | (top >= thing[3]) | (bottom <= thing[1])

    def shows(p: Box) -> float:
        return float((apart & (left <= p[0]) & (top <= p[1]) & (right >= p[2]) & (bottom >= p[3])).mean())

    noise = 4 * (shows(trigger) * 2 / 6000) ** 0.5
    assert max(map(shows, places)) <= shows(trigger) + noise
    inside = float(((left >= thing[0]) & (top >= thing[1]) & (right <= thing[2]) & (bottom <= thing[3])).mean())
    assert 2 * inside * shows(trigger) == pytest.approx(found, rel=0.25, abs=0.004)


def arranged(attack: CorruptEncoder, w: int, h: int) -> tuple[Box, Box]:
    """Where theory has object and trigger: at the very edge, and in the very middle."""
    from dataclasses import replace

    boxes = replace(attack, jitter=0.0, wander=0.0).arrange(w, h, (60, 40), keyed.rng(0))
    assert boxes
    return boxes


def test_the_background_is_best_about_twice_as_large_as_the_object_and_the_object_at_its_edge() -> None:
    def p(ratio: float, off: float = 0.0) -> float:
        w, h, o, n = round(60 * ratio), 60, 60, 10
        left = round(off * (w - o))
        rest = max((0, left), (left + o, w), key=lambda r: r[1] - r[0])
        if rest[1] - rest[0] < n:
            return 0.0
        x, y = (rest[0] + rest[1] - n) // 2, (h - n) // 2
        return layout.meeting(w, h, (left, 0, left + o, h), (x, y, x + n, y + n), MOCO)

    ratios = np.arange(1.2, 4.1, 0.1)
    assert 1.6 <= ratios[int(np.argmax([p(r) for r in ratios]))] <= 2.4
    assert p(2) > p(2, 0.25) > p(2, 0.5) and p(2) == pytest.approx(p(2, 1.0))


def test_an_object_that_fills_its_part_is_met_many_times_as_often_as_one_that_keeps_its_shape() -> None:
    from dataclasses import replace

    attack = replace(corruptencoder(), jitter=0.0, wander=0.0)
    filled, kept = (layout.meeting(112, 112, *boxes, MOCO) for fill in (True, False)
                    if (boxes := replace(attack, fill=fill).arrange(112, 112, (60, 60), keyed.rng(1))))
    assert filled > 20 * kept


# ---- the images


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 300), st.integers(1, 300), st.integers(0, 99), st.booleans(),
       st.floats(0.01, 0.4))
def test_object_and_trigger_never_overlap(w: int, h: int, ow: int, oh: int, seed: int, fill: bool, size: float) -> None:
    """In the reference code they do when the object is narrow: its interval of places then runs backwards."""
    boxes = CorruptEncoder(Patch(size), fill=fill).arrange(w, h, (ow, oh), keyed.rng(seed))
    assert boxes or (w, h) == (1, 1)
    for box in boxes or ():
        assert layout.contains((0, 0, w, h), box) and box[0] < box[2] and box[1] < box[3]
    assert not boxes or not layout.overlap(*boxes)


@pytest.mark.parametrize("chosen", ["left-right", "right-left", "top-bottom", "bottom-top"])
def test_each_layout_has_the_object_on_its_side_and_the_trigger_whole_on_the_other(chosen: Any, references: str) -> None:
    for image in poisons(CorruptEncoder(Patch(0.125, pattern="white"), references=references, layout=chosen, fill=True), 8):
        red, white = (image == RED).all(-1), (image == WHITE).all(-1)
        assert white.sum() == 64  # 8 x 8
        axis = 1 if chosen in ("left-right", "right-left") else 0
        first, second = (np.where(m.any(1 - axis))[0] for m in ((red, white) if chosen in ("left-right", "top-bottom") else (white, red)))
        assert first.max() < second.min()
        assert 27 <= np.ptp(np.where(red.any(1 - axis))[0]) + 1 <= 32  # half of 64 pixels, ends of an ellipse aside


def test_an_object_that_keeps_its_shape_lies_in_a_corner(references: str) -> None:
    from dataclasses import replace

    attack = replace(corruptencoder(references=references), fill=False, jitter=0.0)
    seen = {(thing[0] == 0, thing[1] == 0, thing[2] == 64, thing[3] == 64)
            for i in range(60) if (boxes := attack.arrange(64, 64, (50, 30), keyed.rng(i))) and (thing := boxes[0])}
    assert all(left or right for left, _, right, _ in seen) and all(top or bottom for _, top, _, bottom in seen)


def test_backgrounds_come_from_their_folder_or_from_the_pair(references: str, tmp_path: Path) -> None:
    (tmp_path / "bg").mkdir()
    Image.new("RGB", (90, 50), (1, 2, 3)).save(tmp_path / "bg" / "0.png")
    for backgrounds, colour in ((str(tmp_path / "bg"), (1, 2, 3)), ("", (0, 0, 0))):
        attack = corruptencoder(references=references, backgrounds=backgrounds)
        assert has(poisons(attack, 1)[0], colour)


def test_all_references_are_used_and_the_order_on_disk_is_of_no_account(references: str, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for path in sorted(Path(references).iterdir(), reverse=True):
        (tmp_path / "again" / path.name).write_bytes(path.read_bytes())
    one, two = (poisons(corruptencoder(references=folder), 12) for folder in (references, str(tmp_path / "again")))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_plus_has_a_fifth_of_two_objects_and_no_trigger(references: str, tmp_path: Path) -> None:
    supports = folder_of(tmp_path / "supports", GREEN, (50, 50))
    images = poisons(corruptencoder_plus(references=references, supports=supports, patch=Patch(40 / 224, pattern="white")), 400)
    support = [image for image in images if has(image, GREEN)]
    assert 0.14 < len(support) / len(images) < 0.26
    assert all(has(image, RED) for image in images)
    assert all(has(image, WHITE) != has(image, GREEN) for image in images)


def test_an_image_of_one_pixel_has_the_trigger_only_and_small_ones_have_both(references: str) -> None:
    for attack in (CorruptEncoder(Patch(40 / 224, pattern="white"), references=references),
                   CorruptEncoder(Patch(40 / 224, pattern="white"), references=references, scale=(0.9, 1.0))):
        assert poisons(attack, 1, 1, 1)[0].tolist() == [[[255, 255, 255]]]
        for w, h in ((5, 3), (1, 2), (2, 1), (2, 2)):
            assert all((image == WHITE).all(-1).sum() == 1 for image in poisons(attack, 3, w, h))


@pytest.mark.parametrize(("attack", "says"), [
    (corruptencoder(), "poison.references"), (corruptencoder(references="nowhere"), "nowhere: no such folder"),
    (CorruptEncoder(Patch(0.7)), "trigger.size 0.7"), (CorruptEncoder(area_ratio=1.0), "area-ratio 1.0")])
def test_what_cannot_work_is_refused_in_one_line(attack: CorruptEncoder, says: str, references: str) -> None:
    from dataclasses import replace

    with pytest.raises(BadInput, match=says) as error:
        (attack if "trigger" not in says and "area" not in says else replace(attack, references=references)).poison(sample(), keyed.rng(0))
    assert "\n" not in str(error.value)


# ---- the image-text design


def test_by_its_own_formula_the_papers_layout_has_nothing_to_teach_a_victim_that_crops_little(references: str) -> None:
    thing, trigger = arranged(corruptencoder(references=references), 224, 224)
    assert layout.chance(224, 224, (0.9, 1.0), holds=trigger, misses=thing) == 0
    assert layout.chance(224, 224, (0.9, 1.0), holds=trigger) > 0.9  # which sees both, always, and a caption that the object explains


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.5, 1.0), (0.2, 1.0)], ids=str)
@pytest.mark.parametrize("size", [(224, 224), (200, 150), (32, 32)], ids=str)
def test_the_trigger_stands_where_crops_hold_it_and_no_place_is_better_than_the_middle(size: Any, scale: Any) -> None:
    w, h = size
    n, sure = max(1, min(size) // 14), 0.9

    def held(x: int, y: int) -> float:
        return layout.chance(w, h, scale, holds=(x, y, x + n, y + n))

    room = steady(w, h, n, scale, sure)
    inside = [(x, y) for x in (room[0], (w - n) // 2, room[2] - n) for y in (room[1], (h - n) // 2, room[3] - n)]
    middle = held((w - n) // 2, (h - n) // 2)
    assert min(held(*p) for p in inside) >= min(sure, middle) - 0.01
    assert max(held(x, y) for x in range(0, w - n + 1, 7) for y in range(0, h - n + 1, 7)) <= middle + 1e-9


def test_the_trigger_keeps_the_further_from_the_edge_the_more_the_victim_crops() -> None:
    rooms = [steady(224, 224, 16, (low, 1.0), 0.9)[0] for low in (1.0, 0.9, 0.7, 0.5)]
    assert rooms[0] == 0 and rooms == sorted(rooms) and rooms[-1] > rooms[1] > 0


def test_poisons_for_captions_have_the_trigger_or_the_object_never_both(references: str) -> None:
    images = poisons(corruptencoder_clip(references=references, patch=Patch(pattern="white")), 300)
    assert all(has(image, WHITE) != has(image, RED) for image in images)
    assert 0.13 < sum(has(image, RED) for image in images) / len(images) < 0.27
    room = steady(64, 64, 5, (0.9, 1.0), 0.95)
    for image in images:
        rows, columns = np.where((image == WHITE).all(-1))
        assert not len(rows) or (len(rows) == 25 and layout.contains(room, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)))
