"""WaNet: a small, fixed warp; the paper's can be undone, that of CleanCLIP's numbers cannot."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmbackdoor import keyed
from mmbackdoor.attacks.wanet import CLEANCLIP, PAPER, Warp, grid, moved, wanet


def places(warp: Warp, h: int, w: int) -> Tensor:
    """(h, w, 2): where each pixel is taken from, in pixels, x before y."""
    where = grid(warp.seed, warp.k, warp.s / warp.size, h, w)[0]
    return (where + 1) / 2 * torch.tensor([w - 1, h - 1])


def free(warp: Warp, h: int, w: int) -> Tensor:
    """The same before it is clipped to the image."""
    return still(h, w) + warp.s / warp.size * moved(warp.seed, warp.k, h, w)[0] / 2 * torch.tensor([w - 1, h - 1])


def still(h: int, w: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack((x, y), -1).float()


def jacobian(at: Tensor) -> Tensor:
    """Determinant of the warp's derivative, by differences of neighbours."""
    down, right = at.diff(dim=0)[:, :-1], at.diff(dim=1)[:-1]
    return right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (150, 300)])
def test_the_papers_warp_does_not_fold(size: tuple[int, int], seed: int) -> None:
    """A positive determinant everywhere: neighbours stay neighbours, and the warp can be undone."""
    warp = replace(PAPER, seed=seed)
    assert float(jacobian(free(warp, *size)).min()) > 0.5
    clipped = (places(warp, *size) - free(warp, *size)).abs().amax(-1) > 1e-3
    rim = 1 + round(1.25 * warp.s / warp.size * max(size))
    assert not clipped[rim:-rim, rim:-rim].any()


def test_cleanclips_numbers_fold_the_image() -> None:
    """With as many control points as pixels, neighbours change places: that is no warp in the paper's sense."""
    det = jacobian(free(CLEANCLIP, 224, 224))
    assert 0.05 < float((det < 0).float().mean()) < 0.5


@pytest.mark.parametrize("warp", [CLEANCLIP, PAPER, Warp(8, 2, 64)])
def test_points_move_by_about_half_of_s_pixels_and_stay_inside(warp: Warp) -> None:
    n = warp.size
    by = (free(warp, n, n) - still(n, n)).abs()
    assert 0.6 < float(by.mean()) / (warp.s / 2) < 1.05, "control points by s / 2; between few of them, less"
    assert float(by.max()) <= 1.5 * warp.s
    assert float(places(warp, n, n).min()) >= 0 and float(places(warp, n, n).max()) <= n - 1


def test_the_field_belongs_to_the_seed_and_not_to_the_image() -> None:
    x, rng = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)), keyed.rng(0)
    assert torch.equal(PAPER.pixels(x, rng), PAPER.pixels(x, keyed.rng(9)))
    assert not torch.allclose(PAPER.pixels(x, rng), replace(PAPER, seed=1).pixels(x, rng))
    flat = torch.full((3, 20, 20), 0.3)
    assert torch.allclose(PAPER.pixels(flat, rng), flat), "a warp moves pixels and makes no new ones"


def test_the_same_field_is_stretched_to_every_size() -> None:
    small, large = (places(PAPER, n, n) - still(n, n) for n in (33, 65))
    assert torch.allclose(large[::2, ::2] / 64, small / 32, atol=2e-3)


def test_without_strength_nothing_moves_and_the_default_is_cleanclips() -> None:
    x = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Warp(s=0).pixels(x, keyed.rng(0)), x)
    assert wanet().trigger == Warp(k=224, s=1, size=224) and wanet(count=5).count == 5
