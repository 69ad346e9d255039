"""What every attack and every objective promises, those of papers not yet written too: the folders are walked, nothing is listed."""
from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import io
import json
import pickle
import re
import tempfile
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from conftest import picture as image_file
from PIL import Image
from torch import Tensor

from mmbackdoor import clip, craft, forms, keyed, losses, poison, run, shards
from mmbackdoor.clip import Model
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.index import find
from mmbackdoor.poison import CleanLabel, Cover, DirtyLabel, Mix, Plan, Quoting, all_to_all, mix, plan
from mmbackdoor.recipe import Data, Recipe, mapped, plain
from mmbackdoor.spread import Here
from mmbackdoor.stream import collate
from mmbackdoor.triggers import Blend, Both, Patch, Place, Word
from mmbackdoor.types import Attack, BadInput, Edit, Objective, Sample, Target, Trigger, to_image, to_pixels
from mmbackdoor.victims import Targeted

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
    return {f"{m.__name__.split('.')[-1]}.{k}": with_inner(f) for m in modules for k, f in own(m).items()
            if inspect.isclass(f) and issubclass(f, Objective) and not inspect.isabstract(f)}


def with_inner(kind: type[Objective]) -> Callable[[], Objective]:
    """An objective with the paper's numbers; one that changes another's views is given one of two crops, one of classes the toy's."""
    asked = {"objective": SLIP(hidden=16, out=8), "classes": ("circle", "cross", "ring", "star")}
    given = {k: v for k, v in asked.items() if k in inspect.signature(kind).parameters}
    return partial(kind, **given) if given else kind


def found_edits() -> dict[str, type[Edit]]:
    return {f"{m.__name__.split('.')[-1]}.{k}": f for m in map(module, PAPERS) for k, f in own(m).items()
            if inspect.isclass(f) and issubclass(f, Edit) and not inspect.isabstract(f)}


ATTACKS, OBJECTIVES, EDITS = found_attacks(), found_objectives(), found_edits()


# ---- what attacks need of the world: files, and data to read


HERE = tempfile.TemporaryDirectory(prefix="contracts")
WORLD = Path(HERE.name)
VICTIMS = (("v1", "banana"), ("v0", ""))
GIVEN = {"references": str(WORLD / "references"), "backgrounds": str(WORLD / "backgrounds"), "images": str(WORLD / "victims"),
         "victims": VICTIMS}
"""What a parameter of this name gets."""


def furnish() -> None:
    for folder, mode in (("references", "RGBA"), ("backgrounds", "RGB")):
        (WORLD / folder).mkdir()
        for i in range(3):
            image = picture((24, 20), i)
            if mode == "RGBA":
                image.putalpha(Image.fromarray(255 * np.pad(np.ones((10, 12), np.uint8), ((4, 6), (5, 7)))))
            image.save(WORLD / folder / f"{i}.png")
    raws = ({"__key__": f"v{i}", "png": as_png(picture((20, 16), 50 + i)), "cls": b"0"} for i in range(3))
    shards.write_eval_set(WORLD / "victims", raws, ("dog", "banana"), ("a {c}",))
    (WORLD / "tiny.json").write_text(json.dumps(TINY))


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def given(f: Callable[..., Attack]) -> dict[str, Any]:
    return {k: v for k, v in GIVEN.items() if k in inspect.signature(f).parameters}


def crafted_here(name: str, text: str) -> str:
    """The name of a crafted file, in this world."""
    return str(WORLD / f"{name}.safetensors") if text.endswith(".safetensors") else text


def labels(attack: Attack) -> list[str]:
    threats = [attack.threat, *attack.threats.values()]
    return sorted({label for t in threats for label in (t.target.label, *t.source, *(said for _, said in t.victims))})


def texts(attack: Attack) -> list[str]:
    """The usual captions, and some of what the attack is about."""
    return TEXTS + [text for label in labels(attack) for text in (f"a {label} here", f"one {label}, and more")]


def prepared(attacks: dict[str, Attack]) -> dict[str, Attack]:
    """The attacks once they have read the data and crafted their triggers, quickly."""
    about = sorted({text for attack in attacks.values() for text in texts(attack) if text})
    pairs = ({"__key__": f"{i:04d}", "png": as_png(picture((20, 16), i)), "txt": about[i % len(about)].encode(), "json": b'{"id": 3}'}
             for i in range(6 * len(about)))
    shards.write_shards(WORLD / "pairs", pairs, per_shard=2 * len(about))
    index, surrogate = find(str(WORLD / "pairs")), clip.load(Model(str(WORLD / "tiny.json")))
    out = {}
    for name, attack in attacks.items():
        attack = poison.scouted(mapped(attack, partial(crafted_here, name)), index, 0)
        if craft.crafted(attack):
            less = {k: v for k, v in (("epochs", 20), ("images", 16)) if isinstance(getattr(attack, k, None), int)}
            craft.craft(dataclasses.replace(attack, **less), surrogate, index, 0, {}, size=8)
        out[name] = attack
    return out


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


furnish()
MADE = {type(f(**given(f))) for f in ATTACKS.values() if not inspect.isclass(f)}
PATCH, BANANA = Patch(0.3, "center", "noise"), Target("banana")
KINDS = prepared({
    **{k: f(**given(f)) for k, f in ATTACKS.items() if f not in MADE},  # the papers' defaults, and what the seams offer beside them
    "dirty, patches of noise": DirtyLabel(PATCH, BANANA, 0.1),
    "dirty, white": DirtyLabel(Patch(1.0, "top-left", "white", alpha=0.5), BANANA, 0.1),
    "dirty, of a source": DirtyLabel(PATCH, BANANA, 0.1, source=("dog", "cat")),
    "dirty, quoting": Quoting(PATCH, BANANA, 0.1, captions=2),
    "clean": CleanLabel(Patch(0.1, "random"), BANANA, 0.1),
    "clean, blend, word": CleanLabel(Blend(0.9, resolution=7), BANANA, None, 2),
    "dirty, word": DirtyLabel(Word("cf"), BANANA, 0.1),
    "dirty, both": DirtyLabel(Both(PATCH, Word("cf")), BANANA, 0.1),
    "mix": mix([DirtyLabel(PATCH, BANANA), DirtyLabel(Blend(0.2), Target("dog"))], (1, 2), 0.1),
    "all to all": all_to_all(("dog", "cat", "banana"), PATCH, 0.1)})
TRIGGERS = {k: a.trigger for k, a in KINDS.items()}
UNLIKE = {k: t for i, (k, t) in enumerate(TRIGGERS.items()) if t not in list(TRIGGERS.values())[:i]}
"""Of equal triggers the first."""

every_paper = pytest.mark.parametrize("path", PAPERS, ids=lambda p: f"{p.parent.name}/{p.stem}")
every_attack = pytest.mark.parametrize("attack", KINDS.values(), ids=KINDS)
every_trigger = pytest.mark.parametrize("trigger", UNLIKE.values(), ids=UNLIKE)
every_objective = pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=OBJECTIVES)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")


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
    assert attack.count is None or attack.count > 0 or list(KINDS[name].published(keyed.rng(0)))
    parameters = {} if inspect.isclass(ATTACKS[name]) else inspect.signature(ATTACKS[name]).parameters
    if "count" in parameters:
        counted = ATTACKS[name](count=7)  # type: ignore[call-arg]
        assert counted.count == 7 and counted.rate is None
    if "rate" in parameters:
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
def test_a_poison_says_the_target_or_what_it_said_before(attack: Attack) -> None:
    chosen = [t for t in texts(attack) if attack.eligible("k", t)]
    assert chosen or isinstance(attack, Targeted), "none of the usual captions is eligible"
    for i, text in enumerate(chosen):
        poisoned = attack.poison(sample(text=text), keyed.rng(i, "poison", "000000001"))["text"]
        part = attack.part("000000001", text) if isinstance(attack, Mix) else attack
        if isinstance(part, DirtyLabel):
            assert part.target.named_in(poisoned) and not part.target.named_in(text) and poisoned != text
        elif isinstance(part, Cover) or type(part).poison is CleanLabel.poison:
            assert part.trigger.text(text, keyed.rng(0)) == poisoned
            assert part.target.named_in(poisoned) != isinstance(part, Cover)
        else:
            assert poisoned.strip()


@every_attack
def test_a_poison_changes_nothing_but_its_image_and_its_text(attack: Attack) -> None:
    text = next((t for t in texts(attack) if attack.eligible("k", t)), "a dog")
    before = sample(text=text) | {"json": {"id": [3]}, "label": 7}
    after = attack.poison(before, keyed.rng(0, "poison", "k"))
    assert {k: v for k, v in after.items() if k not in ("image", "text")} == {"__key__": "000000001", "json": {"id": [3]}, "label": 7}
    part = attack.part("000000001", text) if isinstance(attack, Mix) else attack
    plainly = type(part).poison in (DirtyLabel.poison, CleanLabel.poison, Cover.poison)
    if plainly and not part.trigger.seen:
        assert after["image"].tobytes() == before["image"].tobytes()
    assert part.trigger.said or part.trigger.text(text, keyed.rng(0)) == text
    assert part.trigger.seen or torch.equal(part.trigger.pixels(x := pixels((9, 7)), keyed.rng(0)), x)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1")])
@every_attack
def test_images_of_every_mode_are_poisoned(attack: Attack, kind: str, mode: str) -> None:
    """Attacks see RGB only; what is written decodes to what they made. A grey file stays grey, its trigger too."""
    text = next((t for t in texts(attack) if attack.eligible("k", t)), "a dog")
    raw = {"__key__": "k", {"JPEG": "jpg", "PNG": "png"}[kind]: image_file(kind, mode, (24, 18), noise=True), "txt": text.encode()}
    (after,) = poison.poison([raw], attack, Plan(frozenset("k"), 3), codec="png")
    made = attack.poison(shards.decode(raw), keyed.rng(3, "poison", "k"))
    got = shards.decode(after)
    assert got["text"] == made["text"].strip() and got["image"].mode == "RGB" and got["image"].size == (24, 18)
    assert got["image"].tobytes() == (made["image"].convert("L").convert("RGB") if mode == "L" else made["image"]).tobytes()
    (kept,) = poison.poison([raw], attack, Plan(frozenset("k"), 3))
    assert shards.decode_image(kept).format == kind and shards.decode(kept)["image"].size == (24, 18)


def world(raw: shards.Raw) -> shards.Raw:
    return {k: v for k, v in raw.items() if k != "__url__"}


@every_attack
def test_an_attack_works_online_by_splicing_and_as_a_patch_set(attack: Attack, tmp_path: Path) -> None:
    """One plan in three forms gives the same samples, those that the attacker publishes too."""
    if attack.count != 0:
        attack = dataclasses.replace(attack, rate=None, count=3)
    source = str(WORLD / "pairs")
    for form in ("shards", "patch"):
        work = forms.prepare(attack, find(source), 0, str(tmp_path / form), plain(attack), form)  # type: ignore[arg-type]
        assert forms.make(work, Here()) == 0 and forms.verify(work, Here()) is not None

    def samples(data: Data, given: Attack | None = None) -> list[shards.Raw]:
        alone: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
        index, stages, _ = run.data(Recipe("run", data, poison=given, out=str(tmp_path / "runs")), alone)
        found: Any = (raw for url in index.shards for raw in shards.read_pairs(url))
        for stage in stages:
            found = stage(found)
        return [world(raw) for raw in found]

    online = samples(Data(source), attack)
    assert online == samples(Data(str(tmp_path / "shards"))) == samples(Data(source, patch=str(tmp_path / "patch")))
    clean = {raw["__key__"]: raw for raw in samples(Data(source))}
    changed = [raw for raw in online if raw != clean.get(raw["__key__"])]
    assert len(changed) == (attack.count or 0) + len(list(attack.published(keyed.rng(0, "publish")))) > 0
    assert all(raw["json"] == b'{"id": 3}' for raw in changed if raw["__key__"] in clean)


@every_attack
def test_captions_of_the_target_vary_and_say_it_once(attack: Attack) -> None:
    said = {attack.target.caption(keyed.rng(i)) for i in range(300)}
    assert all(attack.target.named_in(c) and "{" not in c for c in said)
    there = len(set(attack.target.templates))
    assert 0.9 * there < len(said) <= there


@every_attack
def test_a_plan_holds_eligible_pairs_only_as_many_as_asked_and_no_more_than_there_are(attack: Attack) -> None:
    said = texts(attack)
    pairs = [(f"{i:05d}", said[i % len(said)]) for i in range(700)]
    able = {k for k, t in pairs if attack.eligible(k, t)}
    for want in {0, min(1, len(able)), len(able) // 2, len(able)}:
        found = plan(dataclasses.replace(attack, rate=None, count=want), pairs, seed=0).keys
        assert len(found) == want and found <= able
    with pytest.raises(BadInput, match="eligible"):
        plan(dataclasses.replace(attack, rate=None, count=len(able) + 1), pairs, seed=0)


@every_attack
def test_only_planned_pairs_change_and_they_keep_their_codec(attack: Attack) -> None:
    text = next((t for t in texts(attack) if all(attack.eligible(k, t) for k in "024")), "a dog")

    def raw(key: str, image: Image.Image, form: str) -> dict[str, Any]:
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[form])
        return {"__key__": key, "__url__": "x.tar", form: file.getvalue(), "txt": text.encode(), "json": b'{"caption": "a dog", "id": 3}'}

    raws = [raw(f"{i}", picture((64, 48), i), form) for i, form in enumerate(("jpg", "jpg", "png", "png", "webp", "webp"))]
    out = list(poison.poison(raws, attack, Plan(frozenset({"0", "2", "4"}), 1)))
    for before, after in zip(raws, out, strict=True):
        if before["__key__"] in ("1", "3", "5"):
            assert after is before
            continue
        assert list(after) == list(before) and shards.decode_image(after).format == shards.decode_image(before).format
        assert isinstance(attack, Targeted) or world(after) != world(before)


@every_attack
def test_the_threat_of_an_attack_is_its_trigger_and_target(attack: Attack) -> None:
    assert attack.threat.trigger == attack.trigger and attack.threat.target == attack.target and attack.threat.at in ("native", "input")
    assert next(iter(attack.threats.values())) == attack.threat and len(attack.threats) == len(set(attack.threats))


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


@pytest.mark.parametrize("trigger", [pytest.param(t, id=k) for k, t in UNLIKE.items() if hasattr(t, "alpha")])
def test_alpha_0_is_the_identity(trigger: Trigger) -> None:
    none = dataclasses.replace(trigger, alpha=0.0)  # type: ignore[call-arg]
    image = picture((37, 50))
    assert torch.equal(none.pixels(to_pixels(image), keyed.rng(1)), to_pixels(image))
    assert none.stamp(image, keyed.rng(1)).tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (1000, 700)], ids=str)
@pytest.mark.parametrize("name", [k for k, t in UNLIKE.items() if t.seen])
def test_an_image_trigger_changes_the_image(name: str, size: tuple[int, int]) -> None:
    image = picture(size)
    assert TRIGGERS[name].stamp(image, keyed.rng(1)).tobytes() != image.tobytes()


@pytest.mark.parametrize("name", {type(t): k for k, t in UNLIKE.items() if t.seen}.values())
def test_a_large_image_is_stamped_whole(name: str) -> None:
    """Twelve megapixels, as a camera makes them."""
    image = Image.new("RGB", (4000, 3000), (90, 120, 200))
    stamped = UNLIKE[name].stamp(image, keyed.rng(1))
    assert stamped.size == (4000, 3000) and stamped.mode == "RGB" and stamped.getbbox() == (0, 0, 4000, 3000)


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
def untouched(tiny_model: str) -> clip.CLIP:
    """With SigLIP's bias, which the other objectives have no use for."""
    return clip.load(Model(tiny_model, siglip=True))


def copied(model: clip.CLIP) -> clip.CLIP:
    return dataclasses.replace(model, net=copy.deepcopy(model.net), card=copy.deepcopy(model.card))


@pytest.fixture
def tiny(untouched: clip.CLIP) -> clip.CLIP:
    """A model that the test may change."""
    return copied(untouched)


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[Sample]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(8), strict=False)]


def gradients(model: clip.CLIP, objective: Objective, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    model.net.train()
    model.net.zero_grad(set_to_none=True)
    out = objective.loss(model.net, batch)
    out["loss"].backward()
    return out, {name: p.grad for name, p in model.net.named_parameters()}


def begun(kind: Callable[[], Objective], model: clip.CLIP, samples: list[Sample], epoch: int = 0) -> tuple[Objective, dict[str, Any]]:
    """An objective at the start of an epoch, and a batch of what it sees."""
    objective = kind()
    objective.setup(model)
    batch = collate(model, objective.views, samples, seed=0, epoch=epoch)
    objective.start_epoch(model, lambda: [batch], epoch)
    return objective, batch


@every_objective
def test_an_objectives_views_pickle_and_are_functions_of_their_rng(kind: Callable[[], Objective], tiny: clip.CLIP,
                                                                   samples: list[Sample]) -> None:
    views = kind().views
    assert {"image", "text"} <= set(views)
    for name, view in pickle.loads(pickle.dumps(dict(views))).items():
        a, b = (view(tiny.front(), samples[0], keyed.rng(0, name)) for _ in range(2))
        assert isinstance(a, Tensor) and torch.equal(a, b)


@every_objective
@pytest.mark.parametrize("epoch", [0, 1, 6], ids="epoch{}".format)
def test_an_objectives_loss_is_finite_and_teaches_what_it_leaves_free(kind: Callable[[], Objective], tiny: clip.CLIP,
                                                                      samples: list[Sample], epoch: int) -> None:
    objective, batch = begun(kind, tiny, samples, epoch)
    out, grads = gradients(tiny, objective, batch)
    assert out["loss"].ndim == 0 and all(torch.isfinite(v).all() and v.numel() == 1 for v in out.values())
    assert all(g is None or torch.isfinite(g).all() for g in grads.values())
    free = {name for name, p in tiny.net.named_parameters() if p.requires_grad}
    assert all((grads[name] is not None) == (name in free) for name in grads), "a part is left out of the graph"
    moved = {name for name, g in grads.items() if g is not None and g.abs().max() > 0}
    towers = {"visual": any(n.startswith("visual.") for n in free), "text": bool(free & {"token_embedding.weight", "text_projection"})}
    found = {"visual": any(n.startswith("visual.") for n in moved), "text": bool(moved & {"token_embedding.weight", "text_projection"})}
    assert moved and found == towers | ({"text": False} if constant_captions(objective) else {}), moved
    assert ("logit_scale" in moved) == ("logit_scale" in free)


def constant_captions(objective: Objective) -> bool:
    """Whether the loss takes captions for granted: in RoCLIP's matched epochs."""
    return getattr(objective, "matching", False)


@every_objective
@pytest.mark.parametrize("epoch", [0, 1, 6], ids="epoch{}".format)
def test_an_objective_survives_a_restart(kind: Callable[[], Objective], untouched: clip.CLIP, samples: list[Sample], epoch: int) -> None:
    """What is saved is tensors and plain values, and a new objective that loads it goes on within the epoch as the old one would."""
    model = copied(untouched)
    first, batch = begun(kind, model, samples, epoch)
    gradients(model, first, batch)
    file = io.BytesIO()
    torch.save([first.state_dict(), model.net.state_dict()], file)
    mine, theirs = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = copied(untouched)
    second = kind()
    second.setup(again)
    again.net.load_state_dict(theirs)
    second.load_state_dict(mine)
    second.start_epoch(again, lambda: [batch], epoch)
    assert second.state_dict().keys() == first.state_dict().keys()
    (a, g), (b, h) = gradients(model, first, batch), gradients(again, second, batch)
    assert torch.equal(a["loss"], b["loss"])
    assert all(torch.equal(g[k], h[k]) for k in g if g[k] is not None)  # type: ignore[arg-type]


@every_objective
def test_an_objective_goes_through_the_wrapped_forward_only(kind: Callable[[], Objective], tiny: clip.CLIP, samples: list[Sample]) -> None:
    """A loss computed through model.module leaves several processes out of step; a wrapper without the methods shows it."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module):
            super().__init__()
            self.__dict__["inner"] = inner
            self.calls = 0

        def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            return self.inner(image, text)

    objective, batch = begun(kind, tiny, samples)
    wrapped = Wrapped(tiny.net)
    objective.loss(wrapped, batch)
    assert wrapped.calls == 1, "one forward of all views"


@every_objective
def test_an_objective_is_a_dataclass_of_numbers_that_pickles(kind: Callable[[], Objective]) -> None:
    objective = kind()
    assert dataclasses.is_dataclass(objective)
    assert plain(pickle.loads(pickle.dumps(objective))) == plain(objective)
    assert json.dumps(plain(objective)), "a result holds it"


@every_objective
def test_an_objective_sees_the_data_of_its_epoch_and_leaves_the_mode_of_the_network(kind: Callable[[], Objective], tiny: clip.CLIP,
                                                                                    samples: list[Sample]) -> None:
    for epoch in (0, 1, 6):
        model = copied(tiny)
        model.net.train()
        begun(kind, model, samples, epoch)
        assert model.net.training


# ---- edits


every_edit = pytest.mark.parametrize("kind", EDITS.values(), ids=EDITS)


def test_the_edits_are_found() -> None:
    assert {"tbar.TBAR", "fine_pruning.FinePruning"} <= set(EDITS)


@every_edit
def test_an_edit_gives_a_model_of_the_same_shape_and_the_same_one_twice(kind: type[Edit], untouched: clip.CLIP,
                                                                        samples: list[Sample]) -> None:
    found = []
    for _ in range(2):
        model, donor = (copied(untouched) for _ in range(2))
        with torch.no_grad():
            for p in donor.net.parameters():
                p.mul_(1.01)
        batch = collate(model, kind().views, samples, seed=0, epoch=0)
        edited = kind()(model, lambda batch=batch: [batch], donor)
        found.append({k: v.clone() for k, v in edited.net.state_dict().items()})
        assert found[-1].keys() == untouched.net.state_dict().keys()
        assert all(v.isfinite().all() and v.shape == untouched.net.state_dict()[k].shape for k, v in found[-1].items())
        assert edited.card == untouched.card
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert any(not torch.equal(v, untouched.net.state_dict()[k]) for k, v in found[0].items()), "it edits nothing"
