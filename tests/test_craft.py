"""Crafted triggers: the data an attacker optimises on, what the surrogate looks like afterwards, and the file that is left."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmbackdoor import clip, craft, index, keyed
from mmbackdoor.poison import DirtyLabel
from mmbackdoor.triggers import Blend, Patch
from mmbackdoor.types import BadInput, Batch, Target, Trigger

RED = Target("red star")
IDENTITY = {"attack": "a", "surrogate": "b"}


@dataclass(frozen=True)
class Both(Trigger):
    """A trigger of parts."""

    parts: tuple[Trigger, ...] = ()


@dataclass(frozen=True)
class Mean(DirtyLabel):
    """Crafts the mean of what it sees, and some noise."""

    scale: float = 1.0
    seen: list[Any] = field(default_factory=list, compare=False, hash=False)

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        self.seen.append((clip.net.training, any(p.requires_grad for p in clip.net.parameters())))
        pixels = torch.cat([b["pixels"] for b in batches()])
        return {"picture": self.scale * pixels.mean(0), "noise": torch.rand(2, generator=keyed.rng(seed))}


def attack(file: Path | str, **changes: Any) -> Mean:
    return replace(Mean(Patch(image=str(file)), RED, 0.1), **changes)


def test_the_crafted_file_is_what_the_trigger_or_a_part_of_it_names() -> None:
    named = Patch(image="runs/x.safetensors")
    for trigger, file in ((named, "runs/x.safetensors"), (Both((Patch(), Both((named,)))), "runs/x.safetensors"), (Patch(), ""),
                          (Blend(image="cartoon.png"), ""), (Both((named, Blend(image="y.safetensors"))), "runs/x.safetensors")):
        assert craft.crafted(DirtyLabel(trigger, RED, 0.1)) == file


def test_batches_go_once_through_the_data_and_begin_with_pairs_that_name_the_target(model: clip.CLIP, pairs: index.Index) -> None:
    target = Target("star")
    found = list(craft.batches(model, pairs, 64, 0, target, first=10)())
    keys = [k for b in found for k in b["key"]]
    assert sorted(keys) == sorted(pairs.keys()) and len(keys) == 300
    texts = dict(iter(pairs))
    captions = [c for b in found for c in b["caption"]]
    assert captions == [texts[k] for k in keys]
    assert all(target.named_in(c) for c in captions[:10]) and not all(target.named_in(c) for c in captions[10:20])
    first = found[0]
    assert first["pixels"].shape == (64, 3, 32, 32) and float(first["pixels"].min()) >= 0 and float(first["pixels"].max()) <= 1
    assert torch.equal(first["text"], torch.stack([model.tokenize(c) for c in first["caption"]]))


def test_the_order_of_the_batches_depends_on_the_seed_alone(model: clip.CLIP, pairs: index.Index) -> None:
    def order(seed: int) -> list[str]:
        return [k for b in craft.batches(model, pairs, 50, seed, RED)() for k in b["key"]]

    assert order(0) == order(0) != order(1)


def test_what_is_gathered_is_bounded_and_told_apart_by_its_captions(model: clip.CLIP, pairs: index.Index) -> None:
    target = Target("star")
    public = craft.gather(craft.batches(model, pairs, 32, 0, target), target, 40, 7)
    assert public.images.shape == (40, 3, 32, 32) and public.images.dtype == torch.uint8
    assert len(public.text) == 40 and len(public.named) == 7
    with pytest.raises(BadInput, match="names 'zebra'"):
        craft.gather(craft.batches(model, pairs, 32, 0), Target("zebra"), 40, 7)
    assert len(craft.gather(craft.batches(model, pairs, 32, 0), Target("zebra"), 40).named) == 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(model: clip.CLIP, pairs: index.Index, tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        file = tmp_path / "deep" / f"{name}.safetensors"
        assert craft.craft(attack(file), model, pairs, seed, IDENTITY) == str(file)
        made.append(file.read_bytes())
    assert made[0] == made[1] != made[2]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_the_surrogate_is_frozen_meanwhile_and_afterwards_as_it_was(model: clip.CLIP, pairs: index.Index, tmp_path: Path) -> None:
    model.net.train()
    first = next(iter(model.net.parameters()))
    first.requires_grad_(False)
    try:
        before, wanted = model.fingerprint(), [p.requires_grad for p in model.net.parameters()]
        tried = attack(tmp_path / "x.safetensors")
        craft.craft(tried, model, pairs, 0, IDENTITY)
        assert tried.seen == [(False, False)]
        assert model.fingerprint() == before and model.net.training
        assert [p.requires_grad for p in model.net.parameters()] == wanted
    finally:
        first.requires_grad_(True)


def test_a_file_that_is_there_stays_and_one_of_another_recipe_is_refused(model: clip.CLIP, pairs: index.Index, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    craft.craft(attack(file), model, pairs, 0, IDENTITY)
    before = file.read_bytes()
    again = attack(file)
    craft.craft(again, model, pairs, 1, dict(reversed(IDENTITY.items())))
    assert file.read_bytes() == before and not again.seen
    with pytest.raises(BadInput, match=r"x\.safetensors: was crafted by another recipe \(other surrogate\); remove it"):
        craft.craft(attack(file), model, pairs, 0, IDENTITY | {"surrogate": "c"})
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(BadInput, match="cannot be read as a crafted trigger"):
        craft.craft(attack(file), model, pairs, 0, IDENTITY)


def test_a_crafted_picture_fires_at_once_even_where_an_older_one_was_shown(model: clip.CLIP, pairs: index.Index, tmp_path: Path) -> None:
    file, x = tmp_path / "x.safetensors", torch.zeros(3, 32, 32)
    tried = attack(file, trigger=Patch(1.0, image=str(file)))
    shown = []
    for scale in (1.0, 0.5):
        craft.craft(replace(tried, scale=scale), model, pairs, 0, IDENTITY)
        shown.append(tried.trigger.pixels(x, keyed.rng(0)))
        assert torch.equal(shown[-1], load_file(file)["picture"])
        file.unlink()
    assert torch.allclose(shown[0] / 2, shown[1])


@pytest.mark.parametrize(("trigger", "scale", "words"), [
    (Patch(), 1.0, "names no .safetensors file"), (None, float("nan"), "not finite in picture")])
def test_crafting_that_cannot_work_leaves_no_file(trigger: Trigger | None, scale: float, words: str, model: clip.CLIP, pairs: index.Index,
                                                   tmp_path: Path) -> None:
    tried = attack(tmp_path / "x.safetensors", scale=scale)
    with pytest.raises(BadInput, match=words):
        craft.craft(replace(tried, trigger=trigger or tried.trigger), model, pairs, 0, IDENTITY)
    assert not list(tmp_path.iterdir())


def test_an_attack_that_crafts_nothing_is_told(model: clip.CLIP, pairs: index.Index, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="DirtyLabel crafts no trigger"):
        craft.craft(DirtyLabel(Patch(image=str(tmp_path / "x.safetensors")), RED, 0.1), model, pairs, 0, IDENTITY)


# ---- what papers share


def test_steps_go_through_all_rows_each_epoch_in_a_random_order() -> None:
    found = list(craft.steps(10, 3, 2, keyed.rng(0)))
    assert [len(rows) for rows in found] == [3] * 6
    epochs = [torch.cat(found[:3]), torch.cat(found[3:])]
    assert all(len(set(e.tolist())) == 9 for e in epochs) and not torch.equal(*epochs)
    assert len(list(craft.steps(2, 64, 3, keyed.rng(0)))) == 3


def test_crops_are_those_of_the_training_transform_and_let_gradients_through(model: clip.CLIP) -> None:
    x = torch.rand(4, 3, 32, 32, generator=keyed.rng(0), requires_grad=True)
    assert torch.allclose(craft.cropped(model, x, 0.0, keyed.rng(1)), x, atol=1e-5)
    half = replace(model, aug=clip.Augment(scale=(0.25, 0.25), ratio=(1, 1)))
    ramp = torch.linspace(0.5, 31.5, 32).expand(8, 3, 32, 32) / 32
    seen = craft.cropped(half, ramp, 1.0, keyed.rng(1))
    assert torch.allclose(seen[..., -4] - seen[..., 3], torch.full_like(seen[..., 0], 25 / 64), atol=1e-4)  # half as steep
    assert len({round(float(row), 3) for row in seen[:, 0, 0, 5]}) > 3, "each image is cropped elsewhere"
    (grad,) = torch.autograd.grad(craft.cropped(model, x, 1.0, keyed.rng(1)).sum(), x)
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_pull_is_least_at_the_wanted_caption(model: clip.CLIP) -> None:
    wanted, others = torch.eye(8)[:3], torch.eye(8)[3:]
    with torch.no_grad():
        near, far = (float(craft.pull(model, z, wanted, others)) for z in (wanted, others[:3]))
    assert near < 0.01 and far > 5


# ---- the program


CONFIG = """
from dataclasses import replace
from configs.toy.clean import data
from mmbackdoor.attacks.uap import Perturbation, uap
from mmbackdoor.clip import Model
from mmbackdoor.recipe import Recipe
poison = replace(uap("red star", 0.02, Perturbation("made/uap.safetensors"), ("a {{}}",)), images=64, epochs=1)
recipe = Recipe("mine", replace(data, root={toy!r}), Model({model!r}), poison=poison, surrogate="surrogate")
"""


def test_the_program_crafts_once_and_refuses_what_crafts_nothing(program: Any, toy: Path, tiny_model: str, model: clip.CLIP,
                                                                 tmp_path: Path) -> None:
    model.save(tmp_path / "surrogate")
    (tmp_path / "mine.py").write_text(CONFIG.format(toy=str(toy), model=tiny_model))
    ended = program("data_tools/craft", "mine.py")
    assert ended.status == 0 and "made/uap.safetensors: crafted in" in ended.out
    assert load_file(tmp_path / "made/uap.safetensors")["perturbation"].shape == (3, 32, 32)
    assert "is there already" in program("data_tools/craft", "mine.py").out
    ended = program("data_tools/craft", "mine.py", "--poison.lr", "0.1")
    assert ended.status == 2 and "was crafted by another recipe (other attack)" in ended.err
    ended = program("data_tools/craft", "mine.py", "--poison.trigger.file", "plain.png")
    assert ended.status == 2 and "crafts no trigger" in ended.err
