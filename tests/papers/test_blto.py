"""BLTO: a generator that is bounded, looks at its image, and was trained against a model that learns meanwhile."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import crafted
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mmbackdoor import clip, craft, index, keyed
from mmbackdoor.attacks.blto import BLTO, Generator, blto, weights
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput


def small(file: str = "x.safetensors", **changes: Any) -> BLTO:
    attack = blto("red star", 0.1, Generator(file, resolution=32), ("a {}", "the {}"))
    return replace(attack, **{"images": 128, "epochs": 8, "lr": 0.02, "batch": 32, "inner": 2, "outer": 4, "turns": 2} | changes)


@pytest.fixture(scope="module")
def generator(model: clip.CLIP, pairs: index.Index) -> dict[str, Tensor]:
    return crafted(small(), model, pairs)


def test_the_defaults_are_the_papers_bound_at_the_rate_of_the_clip_setting() -> None:
    attack = blto()
    assert attack.target.label == "banana" and (attack.rate, attack.count) == (0.001, None) and BLTO().count == 2300
    assert isinstance(attack.trigger, Generator) and attack.trigger.eps == 8 / 255
    assert blto(count=7).count == 7 and blto(count=7).rate is None


def test_firing_before_it_is_crafted_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.safetensors: no crafted trigger .*data_tools/craft\.py"):
        Generator(str(tmp_path / "none.safetensors")).pixels(torch.zeros(3, 8, 8), keyed.rng(0))
    save_file({"picture": torch.zeros(3, 4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds no generator"):
        Generator(str(tmp_path / "other.safetensors")).pixels(torch.zeros(3, 8, 8), keyed.rng(0))
    with pytest.raises(BadInput, match="Patch: BLTO crafts a Generator"):
        replace(small(), trigger=Patch()).craft(None, lambda: iter(()), 0)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 30), (1, 1), (2, 900)], ids=str)
def test_no_pixel_moves_further_than_eps_and_a_batch_is_as_its_images_are(size: tuple[int, int], generator: dict[str, Tensor]) -> None:
    x = torch.rand(2, 2, 3, *size, generator=keyed.rng(0))
    for eps, alpha in ((8 / 255, 1.0), (2 / 255, 0.5)):
        trigger = Generator(eps=eps, alpha=alpha, resolution=32)
        hit = trigger.over(x, generator)
        assert 0 < float((hit - x).abs().max()) <= eps * alpha + 1e-6
        assert torch.allclose(trigger.over(x[1, 0], generator), hit[1, 0], atol=1e-6)
    assert torch.equal(Generator(alpha=0.0).over(x, generator), x)


def test_what_is_added_depends_on_the_image(generator: dict[str, Tensor]) -> None:
    x = 0.3 + 0.4 * torch.rand(2, 3, 32, 32, generator=keyed.rng(0))
    added = Generator(resolution=32).over(x, generator) - x
    assert not torch.allclose(added[0], added[1], atol=2e-3)


def test_an_image_of_twice_the_size_gets_the_same_trigger_at_twice_the_size(generator: dict[str, Tensor]) -> None:
    """So that it survives the model's resize."""
    trigger = Generator(resolution=32)
    x = 0.3 + 0.4 * torch.rand(1, 3, 32, 32, generator=keyed.rng(0))
    large = torch.nn.functional.interpolate(x, (256, 256), mode="bilinear")
    back = torch.nn.functional.interpolate(trigger.over(large, generator) - large, (32, 32), mode="bilinear", antialias=True)
    plain = trigger.over(x, generator) - x
    assert float(torch.corrcoef(torch.stack([back.flatten(), plain.flatten()]))[0, 1]) > 0.8


def test_the_generator_draws_unseen_images_to_the_target_further_than_untrained_ones(model: clip.CLIP, pairs: index.Index,
                                                                                    generator: dict[str, Tensor]) -> None:
    trigger, batch = Generator(resolution=32), next(craft.batches(model, pairs, 64, 1)())
    with craft.frozen(model), torch.no_grad():
        wanted, others = model.text_features(["a red star"]).expand(64, -1), craft.read(model, batch["text"])

        def loss(weights: dict[str, Tensor]) -> float:
            return float(craft.pull(model, craft.look(model, trigger.over(batch["pixels"], weights)), wanted, others))

        assert loss(generator) < min(loss(weights(8, keyed.rng(i))) for i in range(8))


def test_the_inner_steps_teach_a_copy_and_change_what_comes_out(model: clip.CLIP, pairs: index.Index) -> None:
    before, state = model.fingerprint(), torch.random.get_rng_state()
    first, alone = (crafted(small(epochs=2, inner_lr=lr), model, pairs) for lr in (1e-3, 0.0))
    assert not torch.equal(alone["w1"], first["w1"])
    assert model.fingerprint() == before and torch.equal(torch.random.get_rng_state(), state)


def test_the_inner_loss_sees_the_share_of_poisons_that_is_asked_for(model: clip.CLIP, pairs: index.Index) -> None:
    said: list[int] = []
    target = [model.tokenize("a red star"), model.tokenize("the red star")]

    def spy(net: torch.nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        said.append(sum(any(torch.equal(row, t) for t in target) for row in args[1]))

    hook = model.net.register_forward_hook(spy)  # which copies of the network have too
    try:
        crafted(small(epochs=2, inner_rate=0.25), model, pairs)
    finally:
        hook.remove()
    assert said == [8] * 4


def test_the_file_fires_as_crafted_and_stamps_in_eight_bits(model: clip.CLIP, pairs: index.Index, generator: dict[str, Tensor],
                                                           tmp_path: Path) -> None:
    attack = small(str(tmp_path / "blto.safetensors"))
    craft.craft(attack, model, pairs, 0, {})  # the same seed gives the same generator
    x = torch.rand(3, 32, 32, generator=keyed.rng(0))
    assert torch.equal(attack.trigger.pixels(x, keyed.rng(0)), attack.trigger.over(x, generator))  # type: ignore[attr-defined]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    moved = np.asarray(attack.trigger.stamp(image, keyed.rng(0))).astype(int) - np.asarray(image)
    assert 0 < np.abs(moved).max() <= 8
