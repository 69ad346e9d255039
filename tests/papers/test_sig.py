"""SIG: the wave is the one of the formula, in the paper's form and in that of CleanCLIP."""
from __future__ import annotations

import math

import pytest
import torch

from mmbackdoor import keyed
from mmbackdoor.attacks.sig import ADDED, CLEANCLIP, Sinusoid, sig
from mmbackdoor.poison import DirtyLabel


def test_the_default_is_cleanclips_wave_in_dirty_label() -> None:
    attack = sig()
    assert isinstance(attack, DirtyLabel) and (attack.target.label, attack.rate) == ("banana", 0.0005)
    hit = CLEANCLIP.pixels(torch.full((3, 4, 224), 0.5), keyed.rng(0))
    wanted = torch.tensor([0.8 * 0.5 + 0.2 * 60 / 255 * math.sin(2 * math.pi * 6 * j / 224) for j in range(224)])
    assert torch.allclose(hit, wanted.expand(3, 4, 224), atol=1e-6)


def test_the_papers_wave_is_added_and_takes_nothing_away() -> None:
    x = torch.full((3, 2, 240), 0.5)
    wave = (ADDED.pixels(x, keyed.rng(0)) - x)[0, 0]
    assert float(wave.max()) == pytest.approx(20 / 255, rel=0.02) and abs(float(wave.mean())) < 1e-6
    spectrum = torch.fft.rfft(wave).abs()
    assert int(spectrum.argmax()) == 6 and float(spectrum[6] / spectrum.sum()) > 0.999


@pytest.mark.parametrize("blend", [True, False])
def test_without_alpha_nothing_changes(blend: bool) -> None:
    x = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sinusoid(alpha=0, blend=blend).pixels(x, keyed.rng(0)), x)
