"""Images put together from parts: boxes that never overlap, files in order, and chances that random crops confirm."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmbackdoor import keyed, layout
from mmbackdoor.clip import Augment
from mmbackdoor.layout import Box
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput

FOUR: tuple[Any, ...] = ("left-right", "right-left", "top-bottom", "bottom-top")
SIDES = st.integers(1, 700)


def crops(w: int, h: int, scale: tuple[float, float], n: int = 4000) -> np.ndarray:
    """Boxes as training draws them, (n, 4)."""
    rng, aug = keyed.rng(0, "crops"), Augment(scale)
    return np.array([aug.box(w, h, rng) for _ in range(n)])


def measured(boxes: np.ndarray, holds: Box | None = None, misses: Box | None = None, inside: Box | None = None) -> float:
    ok = np.ones(len(boxes), bool)
    left, top, right, bottom = boxes.T
    if holds:
        ok &= (left <= holds[0]) & (top <= holds[1]) & (right >= holds[2]) & (bottom >= holds[3])
    if misses:
        ok &= (left >= misses[2]) | (right <= misses[0]) | (top >= misses[3]) | (bottom <= misses[1])
    if inside:
        ok &= (left >= inside[0]) & (top >= inside[1]) & (right <= inside[2]) & (bottom <= inside[3])
    return float(ok.mean())


def painted(boxes: list[Box], w: int, h: int) -> np.ndarray:
    """How many of the boxes cover each pixel."""
    canvas = np.zeros((h, w), int)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= w and 0 <= top < bottom <= h
        canvas[top:bottom, left:right] += 1
    return canvas


# ---- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("b.png", "a.PNG", "c.jpg", ".hidden.png", "notes.txt")):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            Image.new("RGB", (10, 8), (40 * i, 0, 0)).save(tmp_path / name, "JPEG" if name.endswith("jpg") else "PNG")
    (tmp_path / "deeper").mkdir()
    return tmp_path


def test_the_files_of_a_folder_come_in_the_order_of_their_names(folder: Path) -> None:
    assert [Path(p).name for p in layout.files(str(folder), "references")] == ["a.PNG", "b.png", "c.jpg"]


def test_a_folder_that_is_not_named_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    for path, says in (("", "poison.references"), (str(tmp_path / "none"), "no such folder"), (str(tmp_path), "no image")):
        with pytest.raises(BadInput, match=says) as error:
            layout.files(path, "references")
        assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG no")
    for read in (layout.cutout, layout.whole):
        with pytest.raises(BadInput, match=r"x\.png: cannot be read"):
            read(str(tmp_path / "x.png"))


def test_an_object_is_what_its_mask_leaves_cut_to_its_bounding_box(tmp_path: Path) -> None:
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[..., 1] = 255  # green behind the mask
    rgba[5:15, 10:18] = (200, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "o.png")
    thing = layout.cutout(str(tmp_path / "o.png"))
    assert thing.size == (8, 10)
    image = Image.new("RGB", (40, 40), (0, 0, 255))
    layout.lay(image, thing, (4, 6, 24, 36))
    out = np.asarray(image)
    assert (out[6:36, 4:24] == (200, 0, 0)).all() and int(out[..., 1].max()) == 0
    rgba[..., 3] = 0
    Image.fromarray(rgba).save(tmp_path / "nothing.png")
    with pytest.raises(BadInput, match="transparent"):
        layout.cutout(str(tmp_path / "nothing.png"))


def test_a_picture_without_a_mask_is_an_object_as_a_whole(folder: Path) -> None:
    assert layout.cutout(str(folder / "c.jpg")).size == (10, 8) and layout.whole(str(folder / "c.jpg")).mode == "RGB"


def test_what_lies_behind_is_not_mixed_into_the_edge_of_an_object(tmp_path: Path) -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[..., 1] = 255
    rgba[np.hypot(*np.mgrid[-20:20, -20:20]) < 18] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "o.png")
    image = Image.new("RGB", (30, 30))
    layout.lay(image, layout.cutout(str(tmp_path / "o.png")), (3, 3, 26, 26))
    assert int(np.asarray(image)[..., 1].max()) <= 2


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 64), (300, 20), (20, 300)], ids=str)
def test_a_background_is_a_part_of_a_picture_in_the_size_of_the_pairs_image(size: tuple[int, int], tmp_path: Path) -> None:
    ramp = np.arange(60, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    own = Image.new("RGB", size)
    grounds = [layout.ground(str(tmp_path), own, keyed.rng(i)) for i in range(6)]
    assert {g.size for g in grounds} == {size} and all(int(np.asarray(g).max()) <= 59 for g in grounds)
    if size == (64, 64):
        assert len({g.tobytes() for g in grounds}) > 1  # the place is random
        slope = np.diff(np.asarray(grounds[0])[5, 5:-5, 0].astype(int)).mean()
        assert slope == pytest.approx(40 / 64, abs=0.1)  # and the shape kept


def test_the_own_image_as_background_is_a_copy() -> None:
    own = Image.new("RGB", (4, 4))
    layout.ground("", own, keyed.rng(0)).putpixel((0, 0), (9, 9, 9))
    assert own.getpixel((0, 0)) == (0, 0, 0)


# ---- what lies where


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.sampled_from(FOUR), st.floats(0.05, 0.95), st.integers(0, 40))
def test_the_two_parts_never_overlap_and_fill_the_image_but_for_the_shift(w: int, h: int, chosen: Any, share: float, shift: int) -> None:
    parts = layout.split(w, h, chosen, share, shift)
    side = w if chosen in ("left-right", "right-left") else h
    if side < 2:
        assert parts is None
        return
    assert parts
    canvas = painted(list(parts), w, h)
    assert canvas.max() == 1 and (canvas == 0).sum() <= shift * w * h // side
    first, rest = parts
    assert {"left-right": first[2] == rest[0] and rest[2] == w, "right-left": rest[2] == first[0] and rest[0] == 0,
            "top-bottom": first[3] == rest[1] and rest[3] == h, "bottom-top": rest[3] == first[1] and rest[1] == 0}[chosen]


def test_any_layout_parts_the_longer_side() -> None:
    def seen(w: int, h: int) -> set[str]:
        return {layout.choose("any", w, h, keyed.rng(i)) for i in range(60)}

    assert seen(30, 20) == set(FOUR[:2]) and seen(20, 30) == set(FOUR[2:]) and seen(20, 20) == set(FOUR)
    assert layout.choose("bottom-top", 30, 20, keyed.rng(0)) == "bottom-top"


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.integers(1, 300), st.floats(0, 1), st.integers(0, 99))
def test_a_square_about_the_middle_stays_in_its_room_and_wanders_as_far_as_told(w: int, h: int, n: int, wander: float, seed: int) -> None:
    n = min(n, w, h)
    box = layout.centre((7, 11, 7 + w, 11 + h), n, wander, keyed.rng(seed))
    assert (box[2] - box[0], box[3] - box[1]) == (n, n) and layout.contains((7, 11, 7 + w, 11 + h), box)
    for low, high, size in ((box[0] - 7, box[2] - 7, w), (box[1] - 11, box[3] - 11, h)):
        off = max(0.0, (int(size * wander) - n) / 2)
        assert abs((low + high) / 2 - size / 2) <= off + 1


def test_a_patch_without_room_is_refused_with_what_fits() -> None:
    with pytest.raises(BadInput, match=r"trigger.size 0.6: 60 pixels of a 100 x 100 image, and 50 are free .* at most 0.50") as error:
        layout.fitting(Patch(0.6), 100, 100, (50, 0, 100, 100))
    assert "\n" not in str(error.value)
    assert layout.fitting(Patch(0.5), 100, 100, (50, 0, 100, 100)) == 50
    assert layout.fitting(Patch(0.01), 5, 3, (2, 0, 3, 3)) == 1  # at least a pixel


def test_two_pictures_beside_each_other_each_fill_their_half() -> None:
    red, blue = Image.new("RGB", (7, 9), (255, 0, 0)), Image.new("RGB", (50, 3), (0, 0, 255))
    image, first, second = layout.beside((20, 10), red, blue, "right-left", keyed.rng(0))
    out = np.asarray(image)
    assert (first, second) == ((10, 0, 20, 10), (0, 0, 10, 10))
    assert (out[:, 10:] == (255, 0, 0)).all() and (out[:, :10] == (0, 0, 255)).all()
    alone, *_ = layout.beside((1, 1), red, blue, "any", keyed.rng(0))
    assert alone.getpixel((0, 0)) == (255, 0, 0)


def test_a_pressed_patch_is_what_the_trigger_stamps() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    patch = Patch(0.3, "top-right", "noise", alpha=0.7)
    wanted = patch.stamp(image, keyed.rng(0))
    layout.press(image, patch, (48, 0, 60, 12), keyed.rng(0))
    assert image.tobytes() == wanted.tobytes() and patch.side(40, 60) == 12


# ---- what crops see


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 100), (32, 30)], ids=str)
def test_the_formula_agrees_with_the_crops_that_training_draws(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Of which the flattest of images take none but the one from the middle."""
    w, h = size
    boxes = crops(w, h, scale)
    half, spot = (0, 0, w // 2, h), (w * 5 // 8, h * 3 // 8, w * 7 // 8, h * 5 // 8)
    for asked in ({"holds": spot}, {"inside": half}, {"holds": spot, "misses": half}, {"misses": half}, {"holds": (0, 0, 3, 3)},
                  {"holds": spot, "inside": (w // 4, 0, w, h)}):
        assert layout.chance(w, h, scale, **asked) == pytest.approx(measured(boxes, **asked), abs=0.03), asked


def test_every_crop_holds_a_pixel_of_the_middle_and_is_inside_the_image() -> None:
    assert layout.chance(50, 50, (0.9, 1.0), inside=(0, 0, 50, 50)) == pytest.approx(1)
    assert layout.chance(50, 50, (0.9, 1.0), holds=(20, 20, 30, 30)) == pytest.approx(1)
    assert layout.chance(50, 50, (0.9, 1.0), holds=(20, 20, 30, 30), misses=(29, 20, 40, 30)) == 0
    assert 0 < layout.chance(50, 50, (0.9, 1.0), holds=(0, 0, 1, 1)) < 0.5
