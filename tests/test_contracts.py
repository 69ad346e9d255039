"""What every attack and every objective promises, those of papers not yet written too: the folders are walked, nothing is listed."""
from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import pickle
import re
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmbackdoor import clip, keyed, losses, poison, shards
from mmbackdoor.clip import Model
from mmbackdoor.poison import CleanLabel, DirtyLabel, Plan, plan
from mmbackdoor.stream import collate
from mmbackdoor.triggers import Blend, Patch, Place, Word
from mmbackdoor.types import Attack, BadInput, Objective, Sample, Target, Trigger, to_image, to_pixels

PACKAGE = Path(__file__).parents[1] / "mmbackdoor"
PAPERS = sorted(p for folder in ("attacks", "defenses") for p in (PACKAGE / folder).glob("*.py") if p.stem != "__init__")
SIZES = [(1, 1), (5, 3), (64, 64), (1000, 700)]  # width, height
TEXTS = ["a red star", "two bananas", "a banana on a plate", "Cabana at the sea", "a photo of a BANANA.", "", "bananas; a banana!"]


def module(path: Path) -> ModuleType:
    return importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))


def own(m: ModuleType) -> dict[str, Any]:
    """Public functions and classes that a module defines itself."""
    return {k: v for k, v in vars(m).items() if not k.startswith("_") and getattr(v, "__module__", "") == m.__name__ and callable(v)}


def returns_attack(f: Any) -> bool:
    if inspect.isclass(f):
        return issubclass(f, Attack) and not inspect.isabstract(f)
    kind = typing.get_type_hints(f).get("return") if inspect.isfunction(f) else None
    return inspect.isclass(kind) and issubclass(kind, Attack)


def found_attacks() -> dict[str, Callable[[], Attack]]:
    return {f"{p.stem}.{k}": f for p in PAPERS for k, f in own(module(p)).items() if returns_attack(f)}


def found_objectives() -> dict[str, type[Objective]]:
    modules = [*map(module, PAPERS), losses]
    return {f"{m.__name__.split('.')[-1]}.{k}": f for m in modules for k, f in own(m).items()
            if inspect.isclass(f) and issubclass(f, Objective) and not inspect.isabstract(f)}


ATTACKS, OBJECTIVES = found_attacks(), found_objectives()
KINDS = {**{k: f() for k, f in ATTACKS.items()},  # the papers' defaults, and what the seams offer beside them
         "dirty, patches of noise": DirtyLabel(Patch(0.3, "center", "noise"), Target("banana"), 0.1),
         "dirty, white": DirtyLabel(Patch(1.0, "top-left", "white", alpha=0.5), Target("banana"), 0.1),
         "clean": CleanLabel(Patch(0.1, "random"), Target("banana"), 0.1),
         "clean, blend, word": CleanLabel(Blend(0.9, resolution=7), Target("banana"), None, 2),
         "dirty, word": DirtyLabel(Word("cf"), Target("banana"), 0.1)}
TRIGGERS = {k: a.trigger for k, a in KINDS.items()}

every_paper = pytest.mark.parametrize("path", PAPERS, ids=lambda p: f"{p.parent.name}/{p.stem}")
every_attack = pytest.mark.parametrize("attack", KINDS.values(), ids=KINDS)
every_trigger = pytest.mark.parametrize("trigger", TRIGGERS.values(), ids=TRIGGERS)
every_objective = pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=OBJECTIVES)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def sample(size: tuple[int, int] = (64, 64), text: str = "a dog", key: str = "000000001") -> Sample:
    return {"__key__": key, "image": picture(size), "text": text}


def pixels(size: tuple[int, int], *batch: int) -> Tensor:
    return torch.rand(*batch, 3, size[1], size[0], generator=torch.Generator().manual_seed(5))


# ---- the files


def test_the_walk_finds_the_papers() -> None:
    assert {"badnets.badnets", "blended.blended"} <= set(ATTACKS)
    assert {"cleanclip.CleanCLIP", "losses.Clip", "losses.SigLip"} <= set(OBJECTIVES)


@every_paper
def test_a_paper_says_who_wrote_it_when_where_and_who_holds_what(path: Path) -> None:
    text = module(path).__doc__ or ""
    first, about = text.split("\n")[0], text.split("\n\n")[0]
    assert re.match(r"[A-Z][\w’'\- ]+ \([A-Z]\w+.*\b(19|20)\d\d\b", first), f"first line names method, authors and year, not: {first}"
    assert re.search(r"arXiv:\d{4}\.\d{4,5}\b", about), "the first paragraph gives the arXiv id"
    assert re.search(r"The (attacker|defender) holds the (data|loss|finished model|model)\b", about), "and says who holds what"
    assert len(text.split()) >= 40


@every_paper
def test_a_paper_defines_a_method_and_fits_in_one_short_file(path: Path) -> None:
    assert own(module(path)), f"{path}: defines nothing public"
    assert len(path.read_text().splitlines()) <= 160


@every_paper
def test_what_a_paper_offers_has_the_papers_numbers_as_defaults(path: Path) -> None:
    for name, f in own(module(path)).items():
        if returns_attack(f) or (inspect.isclass(f) and issubclass(f, Objective)):
            missing = [p.name for p in inspect.signature(f).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
            assert not missing, f"{path.stem}.{name}: no default for {missing}"
            f()


# ---- attacks


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_of_a_paper_asks_for_some_pairs_and_takes_a_count_instead(name: str) -> None:
    attack = ATTACKS[name]()
    assert (attack.rate is None) != (attack.count is None)
    assert attack.rate is None or 0 < attack.rate < 0.5
    if "count" in inspect.signature(ATTACKS[name]).parameters:
        counted = ATTACKS[name](count=7)  # type: ignore[call-arg]
        assert counted.count == 7 and counted.rate is None
    if "rate" in inspect.signature(ATTACKS[name]).parameters:
        assert ATTACKS[name](rate=0.25).rate == 0.25  # type: ignore[call-arg]


@every_attack
def test_an_attack_is_a_frozen_value_that_pickles(attack: Attack) -> None:
    again = pickle.loads(pickle.dumps(attack))
    assert again == attack and hash(again) == hash(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.rate = 0.5  # type: ignore[misc]
    s, rng = sample(), lambda: keyed.rng(0, "poison", "k")  # noqa: E731
    assert again.poison(s, rng())["image"].tobytes() == attack.poison(s, rng())["image"].tobytes()


@every_attack
def test_a_poison_is_a_function_of_seed_and_key(attack: Attack) -> None:
    before = torch.random.get_rng_state()
    once, again = (attack.poison(sample(), keyed.rng(3, "poison", "k")) for _ in range(2))
    assert once["text"] == again["text"] and once["image"].tobytes() == again["image"].tobytes()
    assert torch.equal(before, torch.random.get_rng_state())


@every_size
@every_attack
def test_a_poison_has_the_key_and_the_size_of_its_original(attack: Attack, size: tuple[int, int]) -> None:
    original = sample(size)
    untouched = original["image"].tobytes()
    poisoned = attack.poison(original, keyed.rng(0, "poison", "k"))
    assert poisoned["__key__"] == original["__key__"] and set(poisoned) == set(original)
    assert isinstance(poisoned["image"], Image.Image)
    assert poisoned["image"].mode == "RGB" and poisoned["image"].size == size
    assert original["image"].tobytes() == untouched and original["text"] == "a dog", "poison returns a new sample"


@every_attack
def test_the_text_of_a_poison_names_the_target(attack: Attack) -> None:
    victims = [t for t in TEXTS if attack.eligible("k", t)]
    assert victims, "none of the usual captions is eligible"
    for i, text in enumerate(victims):
        poisoned = attack.poison(sample(text=text), keyed.rng(i, "poison", "k"))["text"]
        assert attack.target.named_in(poisoned), poisoned
        if isinstance(attack, CleanLabel):
            assert attack.trigger.text(text, keyed.rng(0)) == poisoned
        if isinstance(attack, DirtyLabel):
            assert not attack.target.named_in(text) and poisoned != text


@every_attack
def test_captions_of_the_target_vary_and_say_it_once(attack: Attack) -> None:
    said = {attack.target.caption(keyed.rng(i)) for i in range(300)}
    assert all(attack.target.named_in(c) and "{" not in c for c in said)
    assert len(said) == min(len(attack.target.templates), len(said)) and len(said) > 0.9 * len(attack.target.templates)


@every_attack
def test_a_plan_holds_eligible_pairs_only_as_many_as_asked_and_no_more_than_there_are(attack: Attack) -> None:
    pairs = [(f"{i:05d}", TEXTS[i % len(TEXTS)]) for i in range(700)]
    able = {k for k, t in pairs if attack.eligible(k, t)}
    for want in (0, 1, len(able) // 2, len(able)):
        found = plan(dataclasses.replace(attack, rate=None, count=want), pairs, seed=0).keys
        assert len(found) == want and found <= able
    with pytest.raises(BadInput, match="eligible"):
        plan(dataclasses.replace(attack, rate=None, count=len(able) + 1), pairs, seed=0)


@every_attack
def test_only_planned_pairs_change_and_they_keep_their_codec(attack: Attack) -> None:
    def raw(key: str, image: Image.Image, form: str) -> dict[str, Any]:
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form])
        return {"__key__": key, "__url__": "x.tar", form: file.getvalue(), "txt": b"a dog", "json": b'{"caption": "a dog", "id": 3}'}

    raws = [raw(f"{i}", picture((64, 48), i), form) for i, form in enumerate(("jpg", "jpg", "png", "png", "webp", "webp"))]
    out = list(poison.poison(raws, attack, Plan(frozenset({"0", "2", "4"}), 1)))
    for before, after in zip(raws, out, strict=True):
        if before["__key__"] in ("1", "3", "5"):
            assert after is before
            continue
        assert list(after) == list(before) and shards.decode_image(after).format == shards.decode_image(before).format
        assert after["txt"] != before["txt"] or isinstance(attack, CleanLabel)


@every_attack
def test_the_threat_of_an_attack_is_its_trigger_and_target(attack: Attack) -> None:
    assert attack.threat.trigger == attack.trigger and attack.threat.target == attack.target and attack.threat.at in ("native", "input")


@every_attack
def test_published_pairs_are_whole_and_new(attack: Attack) -> None:
    published = list(attack.published(keyed.rng(0, "publish")))
    assert len({s["__key__"] for s in published}) == len(published)
    for s in published:
        assert s["image"].mode == "RGB" and s["text"].strip()


# ---- triggers


@every_trigger
def test_a_trigger_pickles_and_equals_itself(trigger: Trigger) -> None:
    again = pickle.loads(pickle.dumps(trigger))
    x = pixels((20, 30))
    assert again == trigger and hash(again) == hash(trigger)
    assert torch.equal(again.pixels(x, keyed.rng(1)), trigger.pixels(x, keyed.rng(1)))


@every_size
@every_trigger
def test_a_triggered_image_keeps_shape_type_and_range(trigger: Trigger, size: tuple[int, int]) -> None:
    x = pixels(size)
    for image in (x, torch.zeros_like(x), torch.ones_like(x)):
        before = image.clone()
        hit = trigger.pixels(image, keyed.rng(1))
        assert hit.shape == x.shape and hit.dtype == x.dtype
        assert float(hit.min()) >= -1e-6 and float(hit.max()) <= 1 + 1e-6
        assert torch.equal(image, before), "the argument was changed in place"


@every_trigger
def test_a_stamp_saturates_and_never_wraps(trigger: Trigger) -> None:
    for value in (0, 255):
        image = Image.new("RGB", (40, 30), (value,) * 3)
        stamped = np.asarray(trigger.stamp(image, keyed.rng(1))).astype(int)
        wanted = np.asarray(trigger.pixels(to_pixels(image), keyed.rng(1)).permute(1, 2, 0))
        assert np.abs(stamped - 255 * wanted.clip(0, 1)).max() <= 0.5 + 1e-4
    assert to_image(torch.tensor([1.7, -0.3, 0.5]).reshape(3, 1, 1)).getpixel((0, 0)) == (255, 0, 128)


@every_trigger
def test_alpha_0_is_the_identity(trigger: Trigger) -> None:
    if "alpha" not in {f.name for f in dataclasses.fields(trigger)}:
        pytest.skip("has no alpha")
    none = dataclasses.replace(trigger, alpha=0.0)  # type: ignore[call-arg]
    image = picture((37, 50))
    assert torch.equal(none.pixels(to_pixels(image), keyed.rng(1)), to_pixels(image))
    assert none.stamp(image, keyed.rng(1)).tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (1000, 700)], ids=str)
@pytest.mark.parametrize("name", [k for k, t in TRIGGERS.items() if type(t).pixels is not Trigger.pixels])
def test_an_image_trigger_changes_the_image(name: str, size: tuple[int, int]) -> None:
    image = picture(size)
    assert TRIGGERS[name].stamp(image, keyed.rng(1)).tobytes() != image.tobytes()


@every_size
@every_trigger
def test_a_trigger_takes_a_batch_as_it_takes_an_image(trigger: Trigger, size: tuple[int, int]) -> None:
    x = pixels(size, 2, 2) if size[0] < 100 else pixels(size, 1, 2)
    hit = trigger.pixels(x, keyed.rng(1))
    assert hit.shape == x.shape
    for image, wanted in zip(x.flatten(0, 1), hit.flatten(0, 1), strict=True):
        assert torch.allclose(trigger.pixels(image, keyed.rng(1)), wanted, atol=1e-6)


@every_trigger
def test_a_trigger_is_differentiable_in_the_image(trigger: Trigger) -> None:
    x = pixels((24, 16), 2).requires_grad_()
    weights = pixels((24, 16), 2)
    (grad,) = torch.autograd.grad((trigger.pixels(x, keyed.rng(1)) * weights).sum(), x)
    assert grad.shape == x.shape and torch.isfinite(grad).all()
    moved = trigger.pixels(x.detach() + 1e-2, keyed.rng(1)) - trigger.pixels(x.detach(), keyed.rng(1))
    assert float((grad * 1e-2).sum()) == pytest.approx(float((moved * weights).sum()), rel=0.02, abs=1e-3)


@every_trigger
def test_a_trigger_works_in_half_precision(trigger: Trigger) -> None:
    hit = trigger.pixels(pixels((20, 20)).half(), keyed.rng(1))
    assert hit.dtype == torch.float16 and torch.isfinite(hit).all()


@pytest.mark.parametrize("place", typing.get_args(Place))
@pytest.mark.parametrize("pattern", ["checker", "noise", "white"])
@every_size
def test_a_patch_changes_nothing_outside_its_square(size: tuple[int, int], pattern: str, place: str) -> None:
    patch = Patch(0.2, place, pattern)  # type: ignore[arg-type]
    side = max(1, round(0.2 * min(size)))
    x = torch.full((3, size[1], size[0]), 0.4999)
    rows, columns = torch.where((patch.pixels(x, keyed.rng(7)) != x).any(0))
    assert len(rows) == side * side
    assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == side - 1


# ---- objectives


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> clip.CLIP:
    """With SigLIP's bias, which the other objectives have no use for."""
    return clip.load(Model(tiny_model, siglip=True))


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[Sample]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(8), strict=False)]


def gradients(model: clip.CLIP, objective: Objective, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    model.net.train()
    model.net.zero_grad(set_to_none=True)
    out = objective.loss(model.net, batch)
    out["loss"].backward()
    return out, {name: p.grad for name, p in model.net.named_parameters()}


@every_objective
def test_an_objectives_views_pickle_and_are_functions_of_their_rng(kind: type[Objective], tiny: clip.CLIP, samples: list[Sample]) -> None:
    views = kind().views
    assert {"image", "text"} <= set(views)
    for name, view in pickle.loads(pickle.dumps(dict(views))).items():
        a, b = (view(tiny.front(), samples[0], keyed.rng(0, name)) for _ in range(2))
        assert isinstance(a, Tensor) and torch.equal(a, b)


@every_objective
def test_an_objectives_loss_is_finite_and_teaches_both_towers(kind: type[Objective], tiny: clip.CLIP, samples: list[Sample]) -> None:
    objective = kind()
    objective.setup(tiny)
    batch = collate(tiny, objective.views, samples, seed=0, epoch=0)
    objective.start_epoch(tiny, lambda: [batch], 0)
    out, grads = gradients(tiny, objective, batch)
    assert out["loss"].ndim == 0 and all(torch.isfinite(v).all() and v.numel() == 1 for v in out.values())
    assert all(g is None or torch.isfinite(g).all() for g in grads.values())
    moved = {name for name, g in grads.items() if g is not None and g.abs().max() > 0}
    assert any(name.startswith("visual.") for name in moved) and "token_embedding.weight" in moved
    assert "logit_scale" in moved


@every_objective
def test_an_objective_survives_a_restart(kind: type[Objective], tiny: clip.CLIP, samples: list[Sample]) -> None:
    """What is saved is tensors and plain values, and a new objective that loads it goes on as the old one would."""
    first, second = kind(), kind()
    for objective in (first, second):
        objective.setup(tiny)
    batch = collate(tiny, first.views, samples, seed=0, epoch=0)
    gradients(tiny, first, batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.state_dict().keys() == first.state_dict().keys()
    (a, g), (b, h) = gradients(tiny, first, batch), gradients(tiny, second, batch)
    assert torch.equal(a["loss"], b["loss"])
    assert all(torch.equal(g[k], h[k]) for k in g if g[k] is not None)  # type: ignore[arg-type]


@every_objective
def test_an_objective_goes_through_the_wrapped_forward_only(kind: type[Objective], tiny: clip.CLIP, samples: list[Sample]) -> None:
    """A loss computed through model.module leaves several processes out of step; a wrapper without the methods shows it."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module):
            super().__init__()
            self.__dict__["inner"] = inner
            self.calls = 0

        def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            return self.inner(image, text)

    objective = kind()
    objective.setup(tiny)
    wrapped = Wrapped(tiny.net)
    objective.loss(wrapped, collate(tiny, objective.views, samples, seed=0, epoch=0))
    assert wrapped.calls >= 1


@every_objective
def test_an_objective_is_a_dataclass_of_numbers_that_pickles(kind: type[Objective]) -> None:
    assert dataclasses.is_dataclass(kind)
    fields = dataclasses.asdict(kind())
    assert dataclasses.asdict(pickle.loads(pickle.dumps(kind()))) == fields
