"""PAR's structured triggers: which are fixed, which are drawn for every image, and what they add."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmbackdoor import keyed
from mmbackdoor.attacks.par import (
    LETTERING,
    STRIPED_PATCH,
    STRIPES,
    TRIANGLES,
    badnet_stripes,
    blended_stripes,
    blended_text,
    blended_triangles,
)
from mmbackdoor.types import Trigger


def grey(n: int = 224) -> Tensor:
    return torch.full((3, n, n), 0.5)


def hit(trigger: Trigger, key: str = "", n: int = 224) -> Tensor:
    return trigger.pixels(grey(n), keyed.rng(0, key))


def test_the_numbers_are_the_papers() -> None:
    assert (STRIPES.alpha, TRIANGLES.alpha, LETTERING.alpha) == (0.03, 0.15, 0.5)
    for attack in (badnet_stripes(), blended_stripes(), blended_triangles(), blended_text()):
        assert attack.rate == 0.0005 and attack.target.label == "banana"


def test_the_striped_patch_is_sixteen_columns_of_0_and_1_and_another_in_every_image() -> None:
    squares = []
    for key in "ab":
        x = hit(STRIPED_PATCH, key)
        rows, columns = torch.where((x != 0.5).any(0))
        assert rows.max() - rows.min() == columns.max() - columns.min() == 15
        square = x[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        assert set(square.unique().tolist()) == {0.0, 1.0} and torch.equal(square, square[:, :1].expand_as(square))
        squares.append(square)
    assert not torch.equal(*squares)


@pytest.mark.parametrize("trigger", [STRIPED_PATCH, STRIPES], ids=["patch", "blend"])
def test_drawn_stripes_are_drawn_from_the_rng_alone(trigger: Trigger) -> None:
    assert torch.equal(hit(trigger, "a"), hit(trigger, "a")) and not torch.equal(hit(trigger, "a"), hit(trigger, "b"))


def test_blended_stripes_lighten_or_darken_whole_columns() -> None:
    x = hit(STRIPES)
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert sorted(x.unique().tolist()) == pytest.approx([0.97 * 0.5 - 0.03, 0.97 * 0.5 + 0.03])
    assert 0.3 < float((x > 0.5).float().mean()) < 0.7


def test_triangles_halve_each_cell_into_two_greys() -> None:
    x = hit(TRIANGLES)
    assert sorted(x.unique().tolist()) == pytest.approx([0.5 - 0.15 * 0.1, 0.5 + 0.15 * 0.3])
    cell = x[0, :14, :14]
    assert torch.equal(x, cell.repeat(3, 16, 16)) and 0.4 < float((cell > 0.5).float().mean()) < 0.6
    assert cell[13, 0] < 0.5 < cell[0, 13]


def test_letters_are_red_and_the_rest_of_the_image_is_untouched() -> None:
    x = hit(LETTERING)
    written = (x != 0.5).any(0)
    assert 0.03 < float(written.float().mean()) < 0.6
    assert (x[0][written] > 0.5).all() and torch.equal(x[1], x[2]) and float(x[1].min()) >= 0.25 - 1e-6
    assert not torch.equal(LETTERING.pixels(grey(), keyed.rng(0)), type(LETTERING)(word="other").pixels(grey(), keyed.rng(0)))
    assert torch.equal(hit(LETTERING, "a"), hit(LETTERING, "b"))
