"""CTRL: two frequencies of the colours, and nothing else."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn
from torch import Tensor

from mmbackdoor import keyed
from mmbackdoor.attacks.ctrl import PAPER, Spectrum, ctrl
from mmbackdoor.poison import CleanLabel


def yuv(x: Tensor) -> np.ndarray:
    """(3, H, W) in 8-bit units."""
    r, g, b = 255 * x.double().numpy()
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.stack((y, 0.492 * (b - y), 0.877 * (r - y)))


def middling(h: int, w: int) -> Tensor:
    return 0.3 + 0.4 * torch.rand(3, h, w, generator=torch.Generator().manual_seed(0))


def test_only_two_coefficients_of_the_colours_change_in_every_block() -> None:
    x = middling(64, 96)
    change = yuv(PAPER.pixels(x, keyed.rng(0))) - yuv(x)
    wanted = np.zeros((32, 32))
    wanted[15, 15] = wanted[31, 31] = 100
    for top in (0, 32):
        for left in (0, 32, 64):
            y, u, v = (dctn(c, norm="ortho") for c in change[:, top:top + 32, left:left + 32])
            assert np.abs(y).max() < 1e-3 and np.abs(u - wanted).max() < 1e-3 and np.abs(v - wanted).max() < 1e-3


@pytest.mark.parametrize("size", [(7, 5), (40, 50)])
def test_other_sizes_show_their_part_of_the_pattern_from_the_top_left(size: tuple[int, int]) -> None:
    h, w = size
    big, part = torch.full((3, 64, 64), 0.5), torch.full((3, h, w), 0.5)
    assert torch.equal(PAPER.pixels(part, keyed.rng(0)), PAPER.pixels(big, keyed.rng(0))[:, :h, :w])


def test_it_saturates_and_under_compat_wraps() -> None:
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    plain, wrapped = (np.asarray(t.stamp(white, keyed.rng(0))).astype(int) for t in (PAPER, Spectrum(compat="wrap")))
    assert plain.min() > 200 and plain.max() == 255
    assert wrapped.min() < 30, "what exceeds 255 comes out black"
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    plain, wrapped = (np.asarray(t.stamp(grey, keyed.rng(0))).astype(int) for t in (PAPER, Spectrum(compat="wrap")))
    assert np.abs(plain - wrapped).max() <= 1, "inside the range they differ by rounding alone"


def test_it_is_a_clean_label_attack_on_one_per_cent() -> None:
    attack = ctrl()
    assert isinstance(attack, CleanLabel) and attack.rate == 0.01
    assert attack.eligible("k", "a ripe banana") and not attack.eligible("k", "a dog")
    x = middling(8, 8)
    assert torch.equal(Spectrum(magnitude=0).pixels(x, keyed.rng(0)), x)
