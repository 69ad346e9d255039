"""The filter: black and white become its two colours, and order is kept between them."""
from __future__ import annotations

import torch

from mmbackdoor import keyed
from mmbackdoor.attacks.filters import NASHVILLE, Filter, filtered


def test_black_becomes_the_shadows_and_white_the_highlights() -> None:
    for value, colour in ((0.0, NASHVILLE.shadows), (1.0, NASHVILLE.highlights)):
        hit = NASHVILLE.pixels(torch.full((3, 2, 2), value), keyed.rng(0))
        assert torch.allclose(hit, torch.tensor(colour)[:, None, None].expand(3, 2, 2), atol=1e-6)


def test_a_lighter_grey_stays_lighter_in_every_channel() -> None:
    ramp = torch.linspace(0, 1, 256).expand(3, 1, 256)
    assert (NASHVILLE.pixels(ramp, keyed.rng(0)).diff(dim=-1) > 0).all()


def test_contrast_steepens_the_middle_and_saturation_zero_leaves_a_tinted_grey() -> None:
    def slope(f: Filter, at: float) -> float:
        low, high = (f.pixels(torch.full((3, 1, 1), v), keyed.rng(0)) for v in (at, at + 0.02))
        return float((high - low).sum())

    steep, plain = Filter(contrast=0.8), Filter(contrast=0)
    assert slope(steep, 0.5) > slope(plain, 0.5) and slope(steep, 0.0) < slope(plain, 0.0)
    a, b = torch.tensor([0.8, 0.2, 0.4])[:, None, None], torch.zeros(3, 1, 1)
    b += 0.299 * 0.8 + 0.587 * 0.2 + 0.114 * 0.4
    grey = Filter(saturation=0)
    assert torch.allclose(grey.pixels(a, keyed.rng(0)), grey.pixels(b, keyed.rng(0)), atol=1e-6)


def test_it_acts_on_each_pixel_alone_and_not_at_all_at_alpha_zero() -> None:
    x = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    hit = NASHVILLE.pixels(x, keyed.rng(0))
    assert torch.allclose(NASHVILLE.pixels(x.flip(-1), keyed.rng(1)).flip(-1), hit)
    assert torch.equal(Filter(alpha=0).pixels(x, keyed.rng(0)), x)
    assert filtered().rate == 0.001
