"""BadCLIP: the numbers of the setting, captions that are quoted, and a patch that lowers the objective it is made for."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import crafted
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmbackdoor import clip, craft, index, keyed
from mmbackdoor.attacks.badclip import BadCLIP, Facts, badclip
from mmbackdoor.poison import scouted
from mmbackdoor.triggers import Blend, Patch
from mmbackdoor.types import BadInput, Target

TEMPLATES = ("a photo of a {}", "a {}")


def small(file: str = "x.safetensors", **changes: Any) -> BadCLIP:
    attack = badclip("red star", 0.1, Patch(0.25, "center", image=file), TEMPLATES)
    return replace(attack, **{"images": 128, "positives": 8, "epochs": 6, "lr": 0.05, "batch": 32} | changes)


@pytest.fixture(scope="module")
def patch(model: clip.CLIP, pairs: index.Index) -> Tensor:
    return made(small(), model, pairs)


made = partial(crafted, part="picture")


def test_the_defaults_are_those_of_the_paper() -> None:
    attack = badclip()
    assert attack.target.label == "banana" and (attack.rate, attack.count) == (0.003, None) and round(attack.rate * 500_000) == 1500
    assert isinstance(attack.trigger, Patch) and attack.trigger.place == "center" and attack.trigger.size == 16 / 224
    assert (attack.captions, attack.images, attack.epochs, attack.lr, attack.batch) == (128, 10_000, 50, 1e-3, 64)
    assert (attack.text, attack.triplet, attack.margin, attack.augment) == (1, 500, 1, 0.5)
    assert badclip(count=7).count == 7 and badclip(count=7).rate is None and BadCLIP().count == 1500


def test_poisons_say_captions_of_the_data_that_name_the_target_whatever_is_in_them() -> None:
    said = ["a red star {on} a wall", "two red star toys", "RED STAR"]

    def captions(target: Target, n: int, naming: bool = True) -> tuple[str, ...]:
        assert n == 128 and naming and target.label == "red star"
        return tuple(said)

    found = small().scout(captions)
    assert {found.target.caption(keyed.rng(i)) for i in range(60)} == set(said)
    assert small(captions=0).scout(captions) == small(captions=0)


def test_the_captions_are_found_in_the_data(pairs: index.Index) -> None:
    attack = scouted(replace(small(), target=Target("star")), pairs, 0)
    texts = {text for _, text in pairs}
    assert 0 < len(attack.target.templates) <= 128
    assert all(t in texts and attack.target.named_in(t) for t in attack.target.templates)


def test_firing_before_it_is_crafted_is_refused_with_the_mend(tmp_path: Path) -> None:
    trigger = small(str(tmp_path / "none.safetensors")).trigger
    with pytest.raises(BadInput, match=r"none\.safetensors: no crafted trigger .*data_tools/craft\.py"):
        trigger.pixels(torch.zeros(3, 32, 32), keyed.rng(0))
    with pytest.raises(BadInput, match="Blend: BadCLIP crafts a Patch"):
        replace(small(), trigger=Blend()).craft(None, lambda: iter(()), 0)


@pytest.mark.parametrize("weights", [{}, {"triplet": 0.0}, {"text": 0.0, "triplet": 0.0, "mse": 1000.0}], ids=["both", "text", "mse"])
def test_the_patch_lowers_its_own_objective_below_that_of_noise(weights: dict[str, float], model: clip.CLIP, pairs: index.Index) -> None:
    attack = small(**weights)
    found = made(attack, model, pairs)
    assert found.shape == (3, 8, 8) and float(found.min()) >= 0 and float(found.max()) <= 1
    with craft.frozen(model), torch.no_grad():
        public = craft.gather(craft.batches(model, pairs, 64, 1, attack.target), attack.target, 64, 8)
        clean, read, named = craft.seen(model, public.images), craft.read(model, public.text), craft.seen(model, public.named)
        facts = Facts(model, public.images, clean, read, named, model.text_features(["a photo of a red star", "a red star"]))

        def loss(patch: Tensor) -> float:
            return float(attack.objective(facts, torch.arange(64), patch, keyed.rng(5)))

        noise = [loss(torch.rand(3, 8, 8, generator=keyed.rng(i))) for i in range(8)]
        assert loss(found) < min(noise) and loss(found) < loss(Patch(1.0).pixels(torch.zeros(3, 8, 8), keyed.rng(0)))


def test_the_objective_judges_the_very_image_that_the_trigger_makes(model: clip.CLIP, pairs: index.Index, patch: Tensor, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    look = craft.look
    monkeypatch.setattr(craft, "look", lambda clip, x: (seen.append(x), look(clip, x))[1])
    for alpha in (1.0, 0.3):
        attack = small(str(tmp_path / "x.safetensors"), augment=0.0)
        attack = replace(attack, trigger=replace(attack.trigger, alpha=alpha))  # type: ignore[type-var]
        public = craft.gather(craft.batches(model, pairs, 64, 0, attack.target), attack.target, 64, 8)
        rows = torch.zeros(64, 32)
        attack.objective(Facts(model, public.images, rows, rows, rows, rows), torch.arange(5), patch, keyed.rng(0))
        save_file({"picture": patch}, tmp_path / "x.safetensors")
        assert torch.allclose(seen[-1], attack.trigger.pixels(public.images[:5] / 255, keyed.rng(0)), atol=1e-4)


def test_crafting_is_a_function_of_the_seed_and_leaves_the_surrogate_alone(model: clip.CLIP, pairs: index.Index, patch: Tensor) -> None:
    before, state = model.fingerprint(), torch.random.get_rng_state()
    assert torch.equal(made(small(), model, pairs), patch)
    assert not torch.equal(made(small(epochs=1), model, pairs, 1), made(small(epochs=1), model, pairs, 0))
    assert model.fingerprint() == before and torch.equal(torch.random.get_rng_state(), state)


def test_the_file_holds_the_patch_and_the_trigger_shows_it(model: clip.CLIP, pairs: index.Index, patch: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "badclip.safetensors"
    attack = small(str(file))
    craft.craft(attack, model, pairs, 0, {})
    assert torch.equal(load_file(file)["picture"], patch)
    hit = attack.trigger.pixels(torch.full((3, 32, 32), 0.5), keyed.rng(0))
    assert torch.allclose(hit[:, 12:20, 12:20], patch, atol=1e-6) and hit[:, :12].eq(0.5).all()


def test_data_without_the_target_are_refused(model: clip.CLIP, pairs: index.Index) -> None:
    attack = replace(small(), target=Target("zebra"))
    with pytest.raises(BadInput, match="names 'zebra'"):
        made(attack, model, pairs)
