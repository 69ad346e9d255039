"""SSL-Backdoor: a square of colours in the middle half of images of the target."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmbackdoor import keyed
from mmbackdoor.attacks.ssl_backdoor import PAPER, ColourPatch, ssl_backdoor
from mmbackdoor.poison import CleanLabel


def test_captions_stay_and_only_pairs_that_name_the_target_are_taken() -> None:
    attack = ssl_backdoor()
    assert isinstance(attack, CleanLabel) and attack.rate == 0.005
    sample = {"__key__": "k", "image": Image.new("RGB", (64, 64)), "text": "my banana"}
    assert attack.eligible("k", "my banana") and not attack.eligible("k", "my dog")
    assert attack.poison(sample, keyed.rng(0))["text"] == "my banana"


@pytest.mark.parametrize("size", [(224, 224), (300, 100), (80, 200)])
def test_the_square_lies_whole_within_the_middle_half(size: tuple[int, int]) -> None:
    h, w = size
    boxes = np.array([PAPER.box(h, w, keyed.rng(i)) for i in range(300)])
    n = round(50 / 224 * min(h, w))
    assert (boxes[:, 2:] - boxes[:, :2] == n).all()
    assert boxes[:, 0].min() == round(w / 4) and boxes[:, 2].max() == round(0.75 * w)
    assert boxes[:, 1].min() == round(h / 4) and boxes[:, 3].max() == round(0.75 * h)


def test_a_square_larger_than_the_middle_half_stays_in_the_image() -> None:
    for n in (1, 2, 3, 9):
        left, top, right, bottom = ColourPatch(0.9).box(n, n, keyed.rng(0))
        assert 0 <= left < right <= n and 0 <= top < bottom <= n


def test_the_colours_are_smooth_coloured_and_of_the_seed() -> None:
    a, b = (ColourPatch(seed=s).square(50, keyed.rng(0)) for s in (0, 1))
    assert torch.equal(a, PAPER.square(50, keyed.rng(5))) and not torch.allclose(a, b)
    assert float(a.diff(dim=-1).abs().max()) < 0.15 and float((a[0] - a[1]).abs().max()) > 0.2


def test_a_picture_may_take_the_colours_place(tmp_path) -> None:
    Image.new("RGB", (80, 80), (255, 0, 0)).save(tmp_path / "10.png")
    hit = ColourPatch(image=str(tmp_path / "10.png")).pixels(torch.zeros(3, 224, 224), keyed.rng(0))
    assert int(hit[0].sum()) == 2500 and float(hit[1:].sum()) == 0
