"""A universal perturbation: bounded, the same for every image, and closer to the target on images that it was not made from."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import crafted
from safetensors.torch import save_file
from torch import Tensor

from mmbackdoor import clip, craft, index, keyed
from mmbackdoor.attacks.uap import UAP, Perturbation, uap
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput


def small(file: str = "x.safetensors", **changes: Any) -> UAP:
    return replace(uap("red star", 0.1, Perturbation(file), ("a {}", "the {}")), **{"images": 128, "lr": 0.05, "batch": 32} | changes)


made = partial(crafted, part="perturbation")


@pytest.fixture(scope="module")
def pattern(model: clip.CLIP, pairs: index.Index) -> Tensor:
    return made(small(), model, pairs)


def test_the_defaults_are_the_papers_bound_in_the_cleanclip_setting() -> None:
    attack = uap()
    assert attack.target.label == "banana" and (attack.rate, attack.count) == (0.0005, None) and UAP().count == 1500
    assert attack.trigger == Perturbation("uap.safetensors", 10 / 255)
    assert uap(count=7).count == 7 and uap(count=7).rate is None


def test_firing_before_it_is_crafted_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.safetensors: no crafted trigger .*data_tools/craft\.py"):
        Perturbation(str(tmp_path / "none.safetensors")).pixels(torch.zeros(3, 8, 8), keyed.rng(0))
    save_file({"picture": torch.zeros(3, 4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds no perturbation"):
        Perturbation(str(tmp_path / "other.safetensors")).pixels(torch.zeros(3, 8, 8), keyed.rng(0))
    with pytest.raises(BadInput, match="Patch: UAP crafts a Perturbation"):
        replace(small(), trigger=Patch()).craft(None, lambda: iter(()), 0)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (33, 50), (1, 1)], ids=str)
def test_no_pixel_moves_further_than_eps_on_an_image_of_any_size(size: tuple[int, int], pattern: Tensor, tmp_path: Path) -> None:
    save_file({"perturbation": pattern}, file := tmp_path / f"{size[0]}x{size[1]}.safetensors")
    x = torch.rand(2, 3, *size, generator=keyed.rng(0))
    for eps, alpha in ((10 / 255, 1.0), (10 / 255, 0.5), (2 / 255, 1.0)):
        trigger = Perturbation(str(file), eps, alpha)
        moved = trigger.pixels(x, keyed.rng(0)) - x
        assert float(moved.abs().max()) <= eps * alpha + 1e-6
        inside = ((x > eps) & (x < 1 - eps)).all(0)
        assert torch.allclose(moved[0][inside], moved[1][inside], atol=1e-6), "the same for every image that has room for it"
    assert torch.equal(Perturbation(str(file), alpha=0.0).pixels(x, keyed.rng(0)), x)


def test_the_perturbation_draws_unseen_images_to_the_target_beyond_noise(model: clip.CLIP, pairs: index.Index, pattern: Tensor) -> None:
    trigger = Perturbation()
    batch = next(craft.batches(model, pairs, 64, 1)())
    with craft.frozen(model), torch.no_grad():
        wanted, others = model.text_features(["a red star"]).expand(64, -1), craft.read(model, batch["text"])

        def loss(u: Tensor) -> float:
            return float(craft.pull(model, craft.look(model, trigger.over(batch["pixels"], u)), wanted, others))

        signs = [torch.rand(3, 32, 32, generator=keyed.rng(i)).sub(0.5).sign() for i in range(8)]
        assert loss(pattern) < min(loss(torch.zeros(3, 32, 32)), *map(loss, signs))
    assert float(pattern.abs().max()) <= 1


def test_crafting_is_a_function_of_the_seed_and_leaves_the_surrogate_alone(model: clip.CLIP, pairs: index.Index, pattern: Tensor) -> None:
    before, state = model.fingerprint(), torch.random.get_rng_state()
    assert torch.equal(made(small(), model, pairs), pattern) and not torch.equal(made(small(), model, pairs, 1), pattern)
    assert model.fingerprint() == before and torch.equal(torch.random.get_rng_state(), state)


def test_the_file_fires_as_crafted(model: clip.CLIP, pairs: index.Index, pattern: Tensor, tmp_path: Path) -> None:
    attack = small(str(tmp_path / "uap.safetensors"))
    craft.craft(attack, model, pairs, 0, {})
    x = torch.full((3, 32, 32), 0.5)
    assert torch.equal(attack.trigger.pixels(x, keyed.rng(0)), Perturbation().over(x, pattern))
