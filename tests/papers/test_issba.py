"""ISSBA: a string is hidden in images and can be read back, without showing."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmbackdoor import clip, keyed
from mmbackdoor.attacks.issba import ISSBA, Steganographic, decode, issba, message, untrained
from mmbackdoor.types import BadInput

N = 16


def smooth(count: int, seed: int) -> Tensor:
    """Images with soft shapes, (count, 3, N, N)."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (N, N), mode="bilinear")


def batches() -> Iterator[dict[str, Any]]:
    for x in smooth(320, 0).split(32):
        yield {"pixels": x}


@pytest.fixture(scope="module")
def surrogate(tiny_model: str) -> clip.CLIP:
    """Its crops and its device are what matters."""
    return clip.load(clip.Model(tiny_model))


@pytest.fixture(scope="module")
def crafted(tmp_path_factory: pytest.TempPathFactory, surrogate: clip.CLIP) -> str:
    attack = ISSBA(bits=4, steps=120, lr=5e-3, strength=24 / 255)
    path = str(tmp_path_factory.mktemp("issba") / "issba.safetensors")
    before = torch.random.get_rng_state()
    save_file(attack.craft(surrogate, batches, 0), path)
    assert torch.equal(before, torch.random.get_rng_state())
    return path


def test_the_string_is_read_back_from_images_never_seen(crafted: str) -> None:
    from mmbackdoor.triggers import tensors

    weights = tensors(crafted)
    assert float(weights["bit_accuracy"]) > 0.9
    x = smooth(64, 1)
    for code in range(3):
        hit = Steganographic(crafted, code).pixels(x, keyed.rng(0))
        read = (decode(weights, (hit * 255).round() / 255) > 0) == (message(code, 4) > 0)
        assert float(read.float().mean()) > 0.9


def test_the_change_is_small_differs_between_images_and_strings_and_scales_with_alpha(crafted: str) -> None:
    x = smooth(2, 2)
    change = Steganographic(crafted).pixels(x, keyed.rng(0)) - x
    assert 0 < float(change.abs().max()) <= 24 / 255 + 1e-6
    assert float((change[0] - change[1]).abs().max()) > 1 / 255, "every image has its own"
    codes = {tuple(message(c, 4).tolist()): c for c in range(40)}
    assert len(codes) > 8
    first, second = list(codes.values())[:2]
    assert not torch.allclose(*(Steganographic(crafted, c).pixels(x, keyed.rng(0)) for c in (first, second)), atol=1 / 255)
    assert torch.equal(Steganographic(crafted, alpha=0).pixels(x, keyed.rng(0)), x)


def test_it_fits_images_of_any_size(crafted: str) -> None:
    for size in ((1, 1), (9, 40), (64, 64)):
        x = torch.full((2, 3, *size), 0.5)
        hit = Steganographic(crafted).pixels(x, keyed.rng(0))
        assert hit.shape == x.shape and torch.equal(hit[0], hit[1])


def test_a_trigger_without_a_file_says_how_to_make_one(tmp_path) -> None:
    with pytest.raises(BadInput, match=r"issba.safetensors: no crafted trigger .*data_tools/craft.py"):
        issba().trigger.pixels(torch.rand(3, 8, 8), keyed.rng(0))
    save_file({"picture": torch.zeros(3, 4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds no encoder, but picture"):
        Steganographic(str(tmp_path / "other.safetensors")).pixels(torch.rand(3, 8, 8), keyed.rng(0))


def test_no_images_are_one_clear_line(surrogate: clip.CLIP) -> None:
    with pytest.raises(BadInput, match="no image"):
        ISSBA().craft(surrogate, lambda: iter(()), 0)


def test_craft_is_a_function_of_its_seed(surrogate: clip.CLIP) -> None:
    a, b, c = (ISSBA(bits=4, steps=2).craft(surrogate, batches, s) for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["encoder.0"], c["encoder.0"])
    assert untrained(8, 32).keys() <= {*a, "bit_accuracy"}
