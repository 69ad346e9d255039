"""Stealth: the numbers against the formulas they are named for, and what has no number."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from mmbackdoor.stealth import in_json, in_table, linf, psnr, ssim, summarise
from mmbackdoor.types import BadInput


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def flat(value: int, size: int = 16) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def changed(image: np.ndarray, by: int) -> np.ndarray:
    """One channel of one pixel is another by so much."""
    out = image.copy()
    out[0, 0, 0] = int(out[0, 0, 0]) + (by if out[0, 0, 0] < 128 else -by)
    return out


def wang(a: np.ndarray, b: np.ndarray, sigma: float = 1.5) -> float:
    """The formula itself, for images as large as the window."""
    r = np.arange(len(a)) - len(a) // 2
    w = np.exp(-(r[:, None] ** 2 + r**2) / (2 * sigma**2))[..., None]
    w, x, y = w / w.sum(), a.astype(float), b.astype(float)
    mx, my = (w * x).sum((0, 1)), (w * y).sum((0, 1))
    vx, vy, vxy = ((w * p * q).sum((0, 1)) - m for p, q, m in ((x, x, mx * mx), (y, y, my * my), (x, y, mx * my)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_psnr_is_the_ratio_of_the_peak_to_the_mean_squared_error():
    image = noise(20, 30)
    assert psnr(image, changed(image, 100)) == pytest.approx(10 * math.log10(255**2 / (100**2 / (20 * 30 * 3))))
    assert psnr(flat(0), flat(255)) == pytest.approx(0)


def test_ssim_is_that_of_wang_et_al():
    a, b = noise(11, 11), noise(11, 11, seed=1)
    assert ssim(a, b) == pytest.approx(wang(a, b)) and abs(wang(a, b)) < 0.2
    assert ssim(a, a // 2) == pytest.approx(wang(a, a // 2)) and wang(a, a // 2) > 0.5


@pytest.mark.parametrize(("size", "window"), [(7, 7), (8, 7), (9, 9), (10, 9)])
def test_the_window_of_ssim_shrinks_with_the_image(size, window):
    a, b = noise(size, size), noise(size, size, seed=1)
    every = [wang(*(x[i : i + window, j : j + window] for x in (a, b)), sigma=1.5 * (window // 2) / 5)
             for i in range(size - window + 1) for j in range(size - window + 1)]
    assert ssim(a, b) == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("size", [(1, 1), (6, 6), (6, 40)])
def test_an_image_smaller_than_seven_pixels_has_no_ssim(size):
    assert ssim(noise(*size), noise(*size)) is None
    assert math.isfinite(psnr(noise(*size), noise(*size, seed=1)))


def test_the_largest_difference_does_not_wrap_around():
    assert linf(flat(10), flat(250)) == linf(flat(250), flat(10)) == 240


def test_pil_images_of_any_mode_and_arrays_say_the_same():
    a, b = noise(16, 16), noise(16, 16, seed=1)
    for measure in (psnr, ssim, linf):
        assert measure(Image.fromarray(a), Image.fromarray(b)) == measure(a, b) == measure(a, Image.fromarray(b).convert("RGBA"))
    assert psnr(Image.new("L", (8, 8), 9), Image.new("RGB", (8, 8), (9, 9, 9))) == math.inf


@pytest.mark.parametrize("other", [noise(16, 8), noise(16, 16)[..., 0], noise(16, 16).transpose(2, 0, 1), Image.new("RGB", (16, 15))])
@pytest.mark.parametrize("measure", [psnr, ssim, linf, lambda a, b: summarise([(a, b)])])
def test_images_of_two_sizes_are_refused(measure, other):
    with pytest.raises(BadInput, match=r"^images of shapes \(16, 16, 3\) and .* cannot be compared; .*\(H, W, 3\)$"):
        measure(noise(16, 16), other)


def test_the_summary_has_means_and_least_values():
    pairs = [(flat(0), flat(10)), (flat(0), flat(20)), (flat(0, 4), flat(60, 4))]
    found = summarise(iter(pairs))
    assert list(found) == ["psnr_mean", "psnr_min", "ssim_mean", "ssim_min", "linf_mean", "n"]
    assert found["psnr_min"] == psnr(*pairs[2]) and found["ssim_min"] == ssim(*pairs[1])
    assert found["psnr_mean"] == pytest.approx(sum(psnr(*p) for p in pairs) / 3)
    assert found["ssim_mean"] == pytest.approx((ssim(*pairs[0]) + ssim(*pairs[1])) / 2)  # the third is too small to have one
    assert (found["linf_mean"], found["n"]) == (30, 3)


def test_equal_images_do_not_make_the_others_look_perfect():
    same, other = (flat(7), flat(7)), (flat(0), flat(10))
    assert psnr(*same) == math.inf and ssim(*same) == 1 and linf(*same) == 0
    assert summarise([same, other])["psnr_mean"] == psnr(*other) and summarise([same, same])["psnr_mean"] == math.inf
    assert summarise([same, other])["ssim_mean"] == pytest.approx((1 + ssim(*other)) / 2)


def test_what_has_no_number_can_be_printed_and_written():
    assert [in_table(v) for v in (math.inf, None, 31.4159)] == ["∞", "–", "31.42"] and in_table(0.98765, 4) == "0.9877"
    assert json.dumps([in_json(v) for v in (math.inf, None, 0.5)]) == "[null, null, 0.5]"
    assert summarise([]) == dict.fromkeys(["psnr_mean", "psnr_min", "ssim_mean", "ssim_min", "linf_mean"]) | {"n": 0}
