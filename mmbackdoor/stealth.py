"""How much of a poison can be seen: PSNR, SSIM and the largest difference between images before and after.

Images are PIL, or arrays (H, W, 3) of RGB in [0, 255]. All functions raise BadInput when two images differ in size.
"""
from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .types import BadInput

Picture = Image.Image | np.ndarray
RADIUS, SIGMA, LEAST = 5, 1.5, 7
"""Of Wang et al.'s window, 11 pixels wide, in pixels; and the short side below which an image has no SSIM here."""


def pixels(before: Picture, after: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 (H, W, 3)."""
    a, b = (np.asarray(x.convert("RGB") if isinstance(x, Image.Image) else x, np.float64) for x in (before, after))
    if a.shape != b.shape or a.ndim != 3 or a.shape[-1] != 3:
        raise BadInput(f"images of shapes {a.shape} and {b.shape} cannot be compared; give two of one size, (H, W, 3)")
    return a, b


def psnr(before: Picture, after: Picture) -> float:
    """Peak signal-to-noise ratio in dB, of all three channels together and the peak 255; infinite for equal images."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(*pixels(before, after), data_range=255))


def ssim(before: Picture, after: Picture) -> float | None:
    """Structural similarity, 1 for equal images: the mean over the three channels of that of Wang, Bovik, Sheikh and Simoncelli,
    "Image quality assessment: from error visibility to structural similarity", IEEE Transactions on Image Processing, 2004.

    Their Gaussian window is 11 pixels wide. An image with a short side of 7 to 10 gets the widest odd window that fits, its
    sigma in proportion; a smaller image None.
    """
    a, b = pixels(before, after)
    short = min(a.shape[:2])
    if short < LEAST:
        return None
    sigma = SIGMA * min(RADIUS, (short - 1) // 2) / RADIUS  # from which scikit-image takes the width
    return float(structural_similarity(a, b, gaussian_weights=True, sigma=sigma, use_sample_covariance=False, data_range=255,
                                       channel_axis=2))


def linf(before: Picture, after: Picture) -> float:
    """The largest difference of any pixel in any channel, of 255."""
    a, b = pixels(before, after)
    return float(np.abs(a - b).max())


def summarise(pairs: Iterable[tuple[Picture, Picture]]) -> dict[str, float | None]:
    """Means and least values over n images before and after; None where no image has one.

    Equal images have an infinite PSNR and are left out of its mean, which would say nothing else; it is infinite if all are.
    """
    rows = [(psnr(a, b), ssim(a, b), linf(a, b)) for a, b in pairs]
    ratios, similar = [row[0] for row in rows], [row[1] for row in rows if row[1] is not None]
    return {"psnr_mean": mean([r for r in ratios if math.isfinite(r)] or ratios), "psnr_min": min(ratios, default=None),
            "ssim_mean": mean(similar), "ssim_min": min(similar, default=None), "linf_mean": mean([row[2] for row in rows]), "n": len(rows)}


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def in_table(value: float | None, digits: int = 2) -> str:
    """A number for a table: ∞ for an infinite one, – for None."""
    return "–" if value is None else "∞" if math.isinf(value) else f"{value:.{digits}f}"


def in_json(value: float | None) -> float | None:
    """A number for JSON, which has no infinity: null instead."""
    return None if value is None or math.isinf(value) else value
