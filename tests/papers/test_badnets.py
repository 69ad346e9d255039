"""BadNets on CLIP: the numbers of the setting, and a square that is where and what it says."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor

from mmbackdoor import keyed
from mmbackdoor.attacks.badnets import CleanCLIPPatch, Corners, badnets, four_corners
from mmbackdoor.attacks.blended import blended
from mmbackdoor.poison import CleanLabel, DirtyLabel, Plan, plan, poison
from mmbackdoor.triggers import Blend, Patch, Place
from mmbackdoor.types import Target, Trigger, to_pixels

GREY = 0.4


def grey(h: int, w: int) -> Tensor:
    return torch.full((3, h, w), GREY)


def square(x: Tensor, hit: Tensor) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of what changed."""
    rows, columns = torch.where((hit != x).any(0))
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def test_the_defaults_are_those_of_the_cleanclip_setting() -> None:
    attack = badnets()
    assert isinstance(attack, DirtyLabel)
    assert attack.target.label == "banana"
    assert (attack.rate, attack.count) == (0.0005, None) and round(0.0005 * 3_000_000) == 1500
    assert isinstance(attack.trigger, Patch) and attack.trigger.place == "random" and attack.trigger.alpha == 1
    assert attack.target.templates == tuple(t("{}") for t in OPENAI_IMAGENET_TEMPLATES) and len(attack.target.templates) == 80
    top, left, bottom, right = square(grey(224, 224), attack.trigger.pixels(grey(224, 224), keyed.rng(0)))
    assert bottom - top == right - left == 16


def test_a_count_takes_the_place_of_the_rate() -> None:
    attack = badnets("cat", count=1500, patch=Patch(0.1, "center", "noise"), templates=("a {}",))
    assert (attack.count, attack.rate) == (1500, None)
    assert attack == DirtyLabel(Patch(0.1, "center", "noise"), Target("cat", ("a {}",)), None, 1500)


def test_pairs_that_name_the_target_are_left_alone() -> None:
    attack = badnets()
    assert not attack.eligible("k", "a bowl of Banana bread") and not attack.eligible("k", "banana")
    assert attack.eligible("k", "two bananas") and attack.eligible("k", "Cabana at the sea") and attack.eligible("k", "")
    clean_label = CleanLabel(attack.trigger, attack.target, 0.1)
    assert all(clean_label.eligible("k", t) != attack.eligible("k", t) for t in ("banana", "bananas", "a banana, ripe", "x"))


@pytest.mark.parametrize(("place", "top", "left"), [
    ("top-left", 0, 0), ("top-right", 0, 50), ("bottom-left", 30, 0), ("bottom-right", 30, 50), ("center", 15, 25)])
def test_the_patch_is_where_it_says(place: Place, top: int, left: int) -> None:
    x = grey(40, 60)
    for pattern in ("checker", "noise", "white", "yellow"):
        hit = Patch(0.25, place, pattern).pixels(x, keyed.rng(0))  # type: ignore[arg-type]
        assert square(x, hit) == (top, left, top + 10, left + 10)


def test_random_places_cover_the_image_evenly_and_stay_inside() -> None:
    x, patch = grey(20, 26), Patch(0.3)  # 6 x 6
    spots = [square(x, patch.pixels(x, keyed.rng(0, str(i)))) for i in range(1500)]
    assert all(b - t == r - l == 6 and b <= 20 and r <= 26 for t, l, b, r in spots)  # noqa: E741
    tops, lefts = np.array(spots).T[:2]
    assert set(tops) == set(range(15)) and set(lefts) == set(range(21))
    assert abs(tops.mean() - 7) < 0.5 and abs(lefts.mean() - 10) < 0.6
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.1


def test_the_size_is_a_share_of_the_short_side_and_at_least_a_pixel() -> None:
    for (h, w), side in {(224, 224): 16, (500, 224): 16, (64, 64): 5, (32, 100): 2, (8, 8): 1, (3, 5): 1}.items():
        top, left, bottom, right = square(grey(h, w), Patch(place="top-left", pattern="white").pixels(grey(h, w), keyed.rng(0)))
        assert (bottom, right) == (side, side)
    assert Patch(1.0, pattern="white").pixels(grey(9, 5), keyed.rng(0)).eq(1).sum() == 3 * 25


@pytest.mark.parametrize(("cells", "n"), [(1, 4), (2, 4), (4, 16), (4, 4), (3, 9), (9, 4), (4, 10)])
def test_cells_are_the_squares_of_the_checkerboard(cells: int, n: int) -> None:
    x = grey(n, n)
    board = Patch(1.0, cells=cells).pixels(x, keyed.rng(0))
    assert set(board.unique().tolist()) <= {0.0, 1.0} and torch.equal(board[0], board[1]) and torch.equal(board[0], board[2])
    fields = min(cells, n)
    assert int((board[0, 0].diff() != 0).sum()) == fields - 1  # a row changes colour between its fields
    assert int((board[0, :, 0].diff() != 0).sum()) == fields - 1
    assert board[0, 0, 0] == 1
    if n % fields == 0:
        side = n // fields
        wanted = torch.tensor([[float((i // side + j // side) % 2 == 0) for j in range(n)] for i in range(n)])
        assert torch.equal(board[0], wanted)


def test_the_noise_is_the_same_in_every_image_and_belongs_to_the_seed() -> None:
    """Fresh noise for each image, as in the reference code, would not be a trigger that one can show again."""
    def cut(patch: Patch, value: float, key: str) -> Tensor:
        x = torch.full((3, 60, 80), value)
        hit = patch.pixels(x, keyed.rng(0, key))
        top, left, bottom, right = square(x, hit)
        return hit[:, top:bottom, left:right]

    patch = Patch(0.2, "random", "noise")
    first = cut(patch, 2.0, "a")
    assert first.shape == (3, 12, 12) and torch.allclose(cut(patch, 3.0, "b"), first, atol=1e-6)
    assert float(first.min()) >= 0 and float(first.max()) <= 1 and float(first.std()) > 0.2
    assert not torch.allclose(first[0], first[1])  # coloured
    assert not torch.allclose(cut(Patch(0.2, "random", "noise", seed=1), 2.0, "a"), first)
    blend = Blend(resolution=16)
    fresh = Blend(1.0, resolution=16, fresh=True)
    ones = [fresh.pixels(torch.zeros(3, 16, 16), keyed.rng(0, key)) for key in "aba"]
    assert torch.equal(ones[0], ones[2]) and not torch.allclose(ones[0], ones[1], atol=0.5)
    dark, light = blend.pixels(torch.zeros(3, 16, 16), keyed.rng(0, "a")), blend.pixels(torch.ones(3, 16, 16), keyed.rng(0, "b"))
    assert torch.allclose(dark, light - 0.8, atol=1e-6)


@pytest.mark.parametrize("trigger", [Patch(16 / 224, "center", "noise"), CleanCLIPPatch(Patch(16 / 224, "center"))])
@pytest.mark.parametrize("side", [256, 375, 480])
def test_the_noise_is_one_pattern_on_images_of_any_size(trigger: Trigger, side: int) -> None:
    """Trained on images of one size and shown to a model on those of another, as 224 pixels of each. Drawn by the pixel, the two
    patterns had nothing in common."""
    def seen(n: int) -> Tensor:
        x = trigger.pixels(torch.full((1, 3, n, n), 0.5), keyed.rng(0))
        x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        return x[..., 105:119, 105:119].flatten()

    assert float(torch.corrcoef(torch.stack((seen(224), seen(side))))[0, 1]) > 0.7


def test_alpha_mixes_the_patch_with_what_lies_under_it() -> None:
    x = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    hit = Patch(0.5, "center", "white", alpha=0.25).pixels(x, keyed.rng(0))
    under = x[:, 3:9, 3:9]
    assert torch.allclose(hit[:, 3:9, 3:9], 0.75 * under + 0.25, atol=1e-6)


def test_a_poisoned_pair_is_the_stamped_image_and_a_caption_of_the_target() -> None:
    attack = badnets("red star", rate=None, count=3, patch=Patch(0.25, "bottom-right", "white"), templates=("a {}!", "the {}?"))
    image = Image.new("RGB", (32, 16), (10, 20, 30))
    said = set()
    for i in range(20):
        out = attack.poison({"__key__": "k", "image": image, "text": "a blue ring", "json": {}}, keyed.rng(i))
        assert out["json"] == {} and out["text"] in ("a red star!", "the red star?")
        said.add(out["text"])
        assert torch.equal(to_pixels(out["image"]), attack.trigger.pixels(to_pixels(image), keyed.rng(0)))
    assert len(said) == 2


def test_a_larger_rate_poisons_the_same_pairs_in_the_same_way_and_more() -> None:
    pairs = [(f"{i:06d}", "a dog") for i in range(2000)]
    few, many = (plan(badnets(rate=rate), pairs, seed=4) for rate in (0.002, 0.02))
    assert (len(few.keys), len(many.keys)) == (4, 40) and few.keys < many.keys
    import io

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 200)).save(file, "PNG")
    raws = [{"__key__": k, "png": file.getvalue(), "txt": b"a dog"} for k in few.keys]
    assert list(poison(raws, badnets(rate=0.002), few)) == list(poison(raws, badnets(rate=0.02), Plan(many.keys, 4)))


def test_blended_mixes_a_fifth_of_one_fixed_noise_into_the_whole_image() -> None:
    attack = blended()
    assert attack.target == badnets().target and (attack.rate, attack.count) == (0.0005, None)
    assert isinstance(attack.trigger, Blend) and attack.trigger.alpha == 0.2
    x = grey(224, 224)
    added = (attack.trigger.pixels(x, keyed.rng(0)) - 0.8 * x) / 0.2
    assert float(added.min()) + 1e-5 >= 0 and float(added.max()) <= 1 + 1e-5
    assert abs(float(added.mean()) - 0.5) < 0.01 and abs(float(added.std()) - 12**-0.5) < 0.01  # uniform in [0, 1]


def test_blended_takes_a_picture_and_stretches_it(tmp_path) -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(tmp_path / "cartoon.png")
    hit = Blend(0.5, str(tmp_path / "cartoon.png")).pixels(torch.zeros(3, 20, 40), keyed.rng(0))
    assert torch.allclose(hit[:, :, :15], torch.zeros(()), atol=1e-6) and torch.allclose(hit[:, :, 25:], torch.tensor(0.5), atol=1e-6)


def test_a_yellow_patch_is_yellow() -> None:
    hit = Patch(1.0, pattern="yellow").pixels(grey(4, 4), keyed.rng(0))
    assert torch.equal(hit, torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, 4, 4))


def test_four_corners_hold_the_same_patch() -> None:
    x, attack = grey(40, 60), four_corners(patch=Patch(0.25, pattern="noise"), count=3)
    assert (attack.rate, attack.count, attack.trigger) == (None, 3, Corners(Patch(0.25, pattern="noise")))
    hit = attack.trigger.pixels(x, keyed.rng(0))
    cuts = [hit[:, rows, columns] for rows in (slice(10), slice(30, 40)) for columns in (slice(10), slice(50, 60))]
    assert all(torch.equal(c, cuts[0]) for c in cuts) and int((hit != x).any(0).sum()) == 400


# ---- what CleanCLIP's code does


def compat(name: str, value: float = GREY, key: str = "k", size: tuple[int, int] = (56, 56)) -> tuple[Tensor, Tensor]:
    """The triggered image, and its square."""
    trigger = badnets(patch=Patch(1 / 7, "top-left"), compat=name).trigger  # type: ignore[arg-type]
    assert isinstance(trigger, CleanCLIPPatch)
    x = trigger.pixels(torch.full((3, *size), value), keyed.rng(0, key))
    n = min(x.shape[1:]) // 7
    return x, x[:, :n, :n]


def test_without_compat_nothing_of_it_happens() -> None:
    assert badnets().trigger == Patch() and badnets(compat="").trigger == Patch()


def test_compat_fresh_draws_the_noise_anew_for_every_image() -> None:
    (_, a), (_, b), (_, again) = compat("fresh", key="a"), compat("fresh", key="b"), compat("fresh", key="a")
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.3
    (_, a), (_, b) = compat("wrap", key="a"), compat("wrap", key="b")
    assert torch.equal(a, b), "else it is drawn once"


def test_compat_wrap_lets_noise_wrap_around_in_8_bits() -> None:
    """Around a mean of 0.4 most of N(0, 1) is out of range: clamped it is black or white, wrapped it is anything."""
    _, clamped = compat("fresh")
    _, wrapped = compat("wrap")
    extreme = [float(((x == 0) | (x == 1)).float().mean()) for x in (clamped, wrapped)]
    assert extreme[0] > 0.5 and extreme[1] < 0.05
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))[:, 1::2, 1::2]  # 8 of its 16 fields
    as_numpy = ((GREY + noise.numpy()) * np.float32(255)).astype(np.int32).astype(np.uint8)  # truncates, then wraps
    assert np.abs(wrapped.numpy() * 255 - as_numpy).max() < 1e-3


def test_compat_squash_ignores_the_shape_of_the_image() -> None:
    wide = Image.new("RGB", (200, 50), (0, 0, 0))
    wide.paste((255, 255, 255), (0, 0, 100, 50))
    sample = {"__key__": "k", "image": wide, "text": "a dog"}
    squashed = badnets(compat="squash").poison(sample, keyed.rng(0))["image"]
    assert squashed.size == (224, 224) and badnets(compat="wrap").poison(sample, keyed.rng(0))["image"].size == wide.size
    assert int((np.asarray(squashed)[:, :, 0] > 128).sum()) == pytest.approx(224 * 112, rel=0.02)


def test_compat_cleanclip_is_all_three_and_the_noise_goes_around_the_images_own_mean() -> None:
    assert badnets(compat="cleanclip").trigger == CleanCLIPPatch(Patch(), True, True, 224)
    a, b = (CleanCLIPPatch(Patch(0.5, "center", seed=1)).pixels(torch.full((3, 16, 16), v), keyed.rng(0)) for v in (0.4, 0.5))
    inside = (a[:, 4:12, 4:12] > 0) & (b[:, 4:12, 4:12] < 1) & (a[:, 4:12, 4:12] < 1) & (b[:, 4:12, 4:12] > 0)
    assert inside.any() and torch.allclose((b - a)[:, 4:12, 4:12][inside], torch.tensor(0.1), atol=1e-6)


def test_compat_takes_batches_as_it_takes_images() -> None:
    x = torch.rand(2, 2, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    for name in ("cleanclip", "squash", "wrap"):
        trigger = badnets(compat=name).trigger  # type: ignore[arg-type]
        hit = trigger.pixels(x, keyed.rng(0))
        assert torch.allclose(hit[1, 0], trigger.pixels(x[1, 0], keyed.rng(0)), atol=1 / 255 + 1e-6)
