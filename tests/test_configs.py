"""Every config of the repository loads, is told apart by a stable hash, and can be changed from the command line."""
from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from mmbackdoor import clip, fit, poison, shards
from mmbackdoor.clip import Augment, Model
from mmbackdoor.defenses.abl import ABL
from mmbackdoor.defenses.cbpt import CBPT
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.defenses.tbar import TBAR
from mmbackdoor.fit import Schedule
from mmbackdoor.index import find
from mmbackdoor.losses import Clip, SigLip
from mmbackdoor.poison import DirtyLabel, mix, plan
from mmbackdoor.recipe import HOW_NOT_WHAT, Data, Recipe, Suite, flags, load, load_suite, plain, recipe_hash, revive, seeded
from mmbackdoor.stream import Stream
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput, Threat

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/**/*.py") if p.stem != "__init__")
ENVIRONMENT = {"MMBACKDOOR_EMOJI": "/data/emoji", "CC3M": "/data/cc3m", "IMAGENET_VAL": "/data/imagenet"}


def forget_configs() -> None:
    for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configs are loaded anew, from the root, with their data roots set."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    forget_configs()
    yield
    forget_configs()


def recipes(path: str) -> tuple[Recipe, ...]:
    suite = load_suite(path)
    return suite.recipes + suite.sweep


every_config = pytest.mark.parametrize("path", CONFIGS)
with_recipe = pytest.mark.parametrize("path", [p for p in CONFIGS if "\nrecipe =" in (ROOT / p).read_text()])


# ---- loading


def test_there_are_configs_of_three_kinds_and_toy_has_all_of_them() -> None:
    for kind in ("toy", "emoji", "cc3m"):
        assert {f"configs/{kind}/{name}.py" for name in ("clean", "badnets", "cleanclip")} <= set(CONFIGS)
    assert {"configs/toy/finetune.py", "configs/toy/demo.py"} <= set(CONFIGS)


@every_config
def test_a_config_loads_and_its_docstring_says_what_it_is(path: str) -> None:
    found = recipes(path)
    assert found and all(isinstance(r, Recipe) for r in found)
    assert sys.modules[path.removesuffix(".py").replace("/", ".")].__doc__
    if "\nrecipe =" in (ROOT / path).read_text():
        assert load(path).name == path.removeprefix("configs/").removesuffix(".py"), "a recipe has the name of its file"


@every_config
def test_a_recipe_fires_something_and_says_where_its_model_is(path: str) -> None:
    for r in recipes(path):
        assert r.fires is not None and r.data.path("zero_shot") and "{root}" not in r.data.path("train")
        assert not r.model.name.endswith(".json") or (ROOT / r.model.name).is_file()
        assert (r.schedule.epochs >= 1 or r.edit) and r.directory == Path("runs") / r.name
        if r.poison is None and isinstance(r.init, Recipe) and r.init.poison is not None:
            assert r.threat == r.init.fires, "a cleaned victim is measured under the threat that it was poisoned with"
            assert r.data.path("train") != r.init.data.path("train"), "a defender trains on data of his own"
        if r.data.validation:
            assert r.data.path("validation") != r.data.path("zero_shot")


GIVEN = 100
"""Seed of the clean model that an attacker is given, whatever that of the experiment."""


@every_config
def test_runs_come_after_those_they_start_from(path: str) -> None:
    seen = set()
    runs = load_suite(path).runs([0, 1])
    for r in runs:
        for other in (r.init, r.reference):
            assert not isinstance(other, Recipe) or (other.directory in seen and other.seed in (r.seed, GIVEN))
        seen.add(r.directory)
    assert len(seen) == len(runs)


def test_toy_and_cc3m_are_the_same_experiment_in_two_sizes() -> None:
    for name in ("clean", "badnets", "cleanclip"):
        toy, real = load(f"configs/toy/{name}.py"), load(f"configs/cc3m/{name}.py")
        assert type(toy.objective) is type(real.objective) and type(toy.fires) is type(real.fires)
        assert (toy.poison is None) == (real.poison is None) and (toy.init is None) == (real.init is None)


def test_cc3m_has_the_numbers_of_the_cleanclip_paper() -> None:
    clean, bad, cured = (load(f"configs/cc3m/{name}.py") for name in ("clean", "badnets", "cleanclip"))
    assert clean.model.name == "RN50" and len(clean.fires.target.templates) == 80 and clean.fires.target.label == "banana"
    assert (clean.schedule.epochs, clean.schedule.lr, clean.schedule.warmup, clean.batch_size) == (64, 5e-4, 10_000, 128)
    assert bad.poison.count == 1500 and bad.poison.trigger == Patch(16 / 224, "random", "noise")
    assert (cured.schedule.epochs, cured.schedule.lr, cured.schedule.warmup, cured.batch_size) == (10, 1e-5, 50, 64)
    assert cured.poison is None and cured.init.directory == bad.directory and isinstance(cured.objective, CleanCLIP)
    openai = load("configs/cc3m/openai_badnets.py")
    assert openai.model.pretrained == "openai" and openai.schedule.epochs == 5


def test_environment_variables_say_where_data_lie() -> None:
    assert load("configs/emoji/clean.py").data.path("zero_shot") == "/data/emoji/concepts"
    real = load("configs/cc3m/clean.py").data
    assert real.path("train") == "/data/cc3m/{00000..00331}.tar" and real.path("zero_shot") == "/data/imagenet"
    assert load("configs/cc3m/clean.py", ["--data.root", "/x"]).data.path("train") == "/x/{00000..00331}.tar"


# ---- the hash

HASHES = """
import json, sys
from mmbackdoor import recipe
suites = {p: recipe.load_suite(p) for p in sys.argv[1:]}
print(json.dumps({p: [recipe.recipe_hash(r) for r in s.recipes + s.sweep] for p, s in suites.items()}))
"""


def test_hashes_are_the_same_in_another_process() -> None:
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", HASHES, *reversed(CONFIGS)], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(other.stdout.splitlines()[-1]) == {p: [recipe_hash(r) for r in recipes(p)] for p in CONFIGS}


def test_different_experiments_have_different_hashes() -> None:
    found = {r.name: recipe_hash(r) for p in CONFIGS for r in recipes(p)}
    assert len(set(found.values())) == len(found) >= 15


CHANGES: dict[str, Any] = {
    "name": "other", "data": Data("other"), "model": Model("RN50x4"), "init": "some/run", "poison": None, "reference": None,
    "plan": "plan.parquet", "codec": "png", "surrogate": "runs/toy/clean",
    "edit": TBAR(), "donor": "some/run",
    "objective": SigLip(),
    "keep": "keys.txt", "aug": Augment(flip=True), "schedule": Schedule(lr=1.0), "batch_size": 7, "precision": "bf16", "seed": 5,
    "shuffle": 10, "lanes": 4, "workers": 3, "eval_frequency": 9, "save_frequency": 9, "save_steps": 9, "resume": "latest",
    "report_to": ("tensorboard",), "expect_world_size": 4, "out": "elsewhere"}


HOW = HOW_NOT_WHAT["mmbackdoor.recipe.Recipe"]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Recipe)])
def test_every_field_changes_the_hash_but_those_that_say_how(name: str) -> None:
    r = load("configs/toy/badnets.py")
    value = Threat(Patch(0.5), r.poison.target, "input") if name == "threat" else CHANGES[name]
    assert getattr(r, name) != value
    changed = replace(r, **{name: value})
    assert (recipe_hash(changed) == recipe_hash(r)) == (name in HOW)
    cleaning = load("configs/toy/cleanclip.py")  # and so through the runs that it starts from
    inner = replace(cleaning, init=replace(cleaning.init, **{name: value}))
    assert (recipe_hash(inner) == recipe_hash(cleaning)) == (name in HOW)


def test_the_files_of_an_attack_lie_below_the_root_of_the_data() -> None:
    r = load("configs/toy/attacks/poisonedencoder.py", ["--data.root", "/elsewhere"])
    assert (r.attack.references, r.attack.images) == ("/elsewhere/references", "/elsewhere/test") and r.attack.victims == r.poison.victims
    nested = replace(r, poison=mix([r.poison, DirtyLabel(Patch(image="{root}/patch.png"), r.poison.target, 0.1)], (0, 1), 0.1)).attack
    assert nested.attacks[0] == r.attack and nested.attacks[1].trigger.image == "/elsewhere/patch.png"
    plain_one = load("configs/toy/badnets.py")
    assert plain_one.attack is plain_one.poison and replace(plain_one, poison=None).attack is None


def test_a_crafted_file_is_told_by_what_it_is_made_from_and_any_other_by_its_bytes(tmp_path: Path) -> None:
    victim, file = load("configs/toy/badnets.py"), tmp_path / "patch.safetensors"
    victim = replace(victim, poison=replace(victim.poison, trigger=Patch(image=str(file))), surrogate=replace(victim, seed=100))
    cleaned = replace(load("configs/toy/cleanclip.py"), init=victim, threat=victim.poison.threat)
    given = replace(victim, surrogate=None)
    before = [recipe_hash(r) for r in (victim, cleaned, given)]
    file.write_bytes(b"tensors")
    after = [recipe_hash(r) for r in (victim, cleaned, given)]
    assert after[:2] == before[:2] and after[2] != before[2]


def test_where_the_index_lies_is_no_part_of_the_hash_and_a_patch_is() -> None:
    r = load("configs/toy/badnets.py")
    assert recipe_hash(replace(r, data=replace(r.data, index="elsewhere"))) == recipe_hash(r)
    assert recipe_hash(replace(r, data=replace(r.data, patch="data/patch"))) != recipe_hash(r)


def test_the_hash_sees_the_contents_of_the_files_that_decide(tmp_path: Path) -> None:
    r, seen = load("configs/toy/badnets.py"), set()
    for text in ("one", "two"):
        (tmp_path / "plan.parquet").write_text(text)
        (tmp_path / "manifest.json").write_text(text)
        seen |= {recipe_hash(other) for other in (replace(r, plan=str(tmp_path / "plan.parquet")),
                                                  replace(r, data=replace(r.data, patch=str(tmp_path))))}
    assert len(seen) == 4


def test_the_hash_sees_small_changes_deep_inside() -> None:
    r = load("configs/toy/badnets.py")
    deep = {recipe_hash(r)}
    for args in (["--poison.trigger.seed", "1"], ["--poison.trigger.alpha", "0.99"], ["--poison.target.label", "blue ring"],
                 ["--wd", "0.11"], ["--beta2", "0.99"], ["--aug.flip"], ["--model.siglip"], ["--poison.rate", "0.0201"]):
        deep.add(recipe_hash(flags(r, args)))
    assert len(deep) == 9


def test_objectives_of_the_same_fields_differ_by_class() -> None:
    r = load("configs/toy/clean.py")
    assert recipe_hash(replace(r, objective=SigLip())) != recipe_hash(replace(r, objective=Clip()))
    assert recipe_hash(replace(r, objective=Clip())) == recipe_hash(r)


# ---- as JSON and back


@every_config
def test_plain_and_revive_are_inverse(path: str) -> None:
    for r in recipes(path):
        card = json.loads(json.dumps(plain(r)))
        assert revive(card["threat"]) == r.threat and revive(card["data"]) == r.data
        assert revive(plain(r.fires)) == r.fires and revive(card["poison"]) == r.poison
        back = revive(card)
        assert isinstance(back, Recipe) and plain(back) == plain(r) and recipe_hash(back) == recipe_hash(r)
        assert back.directory == r.directory


def test_revive_imports_nothing_on_the_word_of_a_file() -> None:
    for word in ("os.system", "subprocess.Popen", "builtins.eval", "mmbackdoor.recipe.load_module", "mmbackdoor.nothing.Here", "x"):
        with pytest.raises(BadInput) as raised:
            revive({"class": word, "args": "true"})
        assert word in str(raised.value) and "\n" not in str(raised.value)


# ---- flags


def test_flags_change_nested_fields_and_nothing_else() -> None:
    r = load("configs/toy/badnets.py")
    changed = load("configs/toy/badnets.py", ["--epochs", "3", "--lr", "1e-4", "--poison.rate", "0.01", "--poison.trigger.size", "0.2",
                                              "--poison.trigger.place", "center", "--data.train", "x/{00000..00331}.tar",
                                              "--batch-size", "32", "--model.mean", "0", "0", "0", "--name", "mine"])
    trigger = replace(r.poison.trigger, size=0.2, place="center")
    expected = replace(r, name="mine", schedule=replace(r.schedule, epochs=3, lr=1e-4), batch_size=32,
                       poison=replace(r.poison, rate=0.01, trigger=trigger), data=replace(r.data, train="x/{00000..00331}.tar"),
                       model=replace(r.model, mean=(0.0, 0.0, 0.0)))
    assert plain(changed) == plain(expected) and recipe_hash(changed) != recipe_hash(r)
    assert changed.fires.trigger == trigger
    assert plain(flags(r, [])) == plain(r) and type(flags(r, []).poison) is type(r.poison)


def test_flags_of_an_objective_are_its_numbers() -> None:
    r = load("configs/toy/cleanclip.py", ["--objective.inmodal", "2", "--objective.symmetric", "--threat.at", "input"])
    assert isinstance(r.objective, CleanCLIP)
    assert (r.objective.inmodal, r.objective.cross, r.objective.symmetric) == (2.0, 1.0, True) and r.threat.at == "input"


def test_init_on_the_command_line_is_a_run_or_checkpoint() -> None:
    default = load("configs/toy/cleanclip.py")
    assert isinstance(default.init, Recipe) and default.init.name == "toy/badnets"
    assert load("configs/toy/cleanclip.py", ["--init", "some/epoch_3.pt"]).init == "some/epoch_3.pt"
    assert load("configs/toy/cleanclip.py", ["--init", "None"]).init is None
    assert load("configs/toy/clean.py", ["--init", "some/run"]).init == "some/run"
    assert load("configs/toy/badnets.py", ["--reference", "some/run"]).reference == "some/run"
    assert plain(load("configs/toy/cleanclip.py", ["--lr", "1e-4"]).init) == plain(default.init)


def test_a_count_can_replace_a_rate_on_the_command_line() -> None:
    attack = load("configs/toy/badnets.py", ["--poison.rate", "None", "--poison.count", "12"]).poison
    assert (attack.rate, attack.count) == (None, 12)


@pytest.mark.parametrize(("args", "word"), [(["--poison.trigger.sise", "0.2"], "--poison.trigger.size"), (["--epoch", "3"], "--epochs"),
                                            (["--epochs", "many"], "--epochs"), (["--poison.trigger.place", "left"], "top-left")])
def test_a_wrong_flag_is_refused_with_the_right_one(args: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load("configs/toy/badnets.py", args)
    said = capsys.readouterr()
    assert raised.value.code == 2 and word in said.err + said.out


@with_recipe
def test_every_recipe_has_help(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load(path, ["--help"])
    assert raised.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--epochs", "--lr", "--data.train", "--init", "--batch-size"))


# ---- seeds


def test_seeding_reaches_the_runs_that_it_starts_from_and_is_compared_to() -> None:
    r = load("configs/toy/cleanclip.py")
    other = seeded(r, 3)
    assert (other.seed, other.init.seed, other.reference.seed, other.init.reference.seed) == (3, 3, 3, 3)
    assert str(other.directory) == "runs/toy/cleanclip-seed3" and str(other.init.directory) == "runs/toy/badnets-seed3"
    assert r.seed == 0 and r.init.seed == 0
    assert plain(seeded(other, 0)) == plain(r) and recipe_hash(other) != recipe_hash(r)
    assert seeded(replace(r, init="some/run.pt"), 3).init == "some/run.pt"
    assert other.fires.trigger == r.fires.trigger, "the attack stays the same value under another seed"


def test_two_recipes_of_one_name_in_a_suite_are_refused() -> None:
    r = load("configs/toy/clean.py")
    with pytest.raises(BadInput, match="toy/clean"):
        Suite("s", (r, replace(r, batch_size=3))).runs([0])
    assert len(Suite("s", (r, replace(r, workers=3))).runs([0, 1])) == 2


# ---- a user's own classes

MINE = """
from dataclasses import dataclass, replace
from mmbackdoor import Data, DirtyLabel, Patch, Recipe, Target, Trigger

@dataclass(frozen=True)
class Darker(Trigger):
    by: float = 0.5

    def pixels(self, x, rng):
        return x * {factor}

recipe = Recipe("mine", Data("x"), poison=DirtyLabel(Darker(), Target("cat"), 0.1))
"""


def written(folder: Path, source: str) -> Recipe:
    for name in [n for n in sys.modules if n == "mine"]:
        del sys.modules[name]
    (folder / "mine.py").write_text(source)
    return load("mine.py")


def test_a_users_class_is_told_apart_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hashes = [recipe_hash(written(tmp_path, MINE.format(factor=f))) for f in ("self.by", "self.by * self.by", "self.by")]
    assert hashes[0] == hashes[2] != hashes[1]
    half = load("mine.py")
    assert plain(half.poison.trigger)["class"] == "mine.Darker" and "source_hash" not in plain(half.poison)
    assert load("mine.py", ["--poison.trigger.by", "0.25"]).poison.trigger.by == 0.25
    assert float(half.poison.trigger.pixels(torch.ones(3, 1, 1), torch.Generator()).max()) == 0.5
    with pytest.raises(BadInput, match="mine.Darker"):
        revive(json.loads(json.dumps(plain(half.fires))))
    del sys.modules["mine"]


def test_editing_a_config_while_its_run_is_under_way_does_not_change_the_runs_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training takes days; its result must carry the hash that it began with."""
    monkeypatch.chdir(tmp_path)
    r = written(tmp_path, MINE.format(factor="self.by"))
    begun = recipe_hash(r)
    (tmp_path / "mine.py").write_text(MINE.format(factor="self.by * 3"))
    assert recipe_hash(r) == begun
    del sys.modules["mine"]


def test_a_users_class_pickles_so_that_loader_workers_can_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    r = written(tmp_path, MINE.format(factor="self.by"))
    assert pickle.loads(pickle.dumps(r.poison)) == r.poison
    del sys.modules["mine"]


# ---- the real experiment, in small: img2dataset's files, RN50, one step


@pytest.fixture(scope="module")
def cc3m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of five pairs as img2dataset writes them, with one failed download, and class folders for evaluation."""
    folder = tmp_path_factory.mktemp("cc3m")
    random = np.random.default_rng(0)
    captions = ["a dog on the beach", "portrait of a woman", "a ripe banana on a table", "the skyline at night", "bananas in a bowl"]
    for shard in range(3):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(6):
                key, failed = f"{shard:05d}{i:04d}", i == 2
                row = {"url": f"https://example.org/{key}.jpg", "caption": captions[i % 5], "key": key, "error_message": None,
                       "status": "failed_to_download" if failed else "success", "width": 224, "height": 224, "exif": "{}", "sha256": "0"}
                rows.append(row)
                if failed:
                    continue
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(file, "JPEG", quality=95)
                for extension, body in (("jpg", file.getvalue()), ("json", json.dumps(row).encode()), ("txt", captions[i % 5].encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mtime = len(body), 1.7e9 + 0.25  # img2dataset's times are floats
                    tar.addfile(info, io.BytesIO(body))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        stats = {"count": 6, "successes": 5, "failed_to_download": 1, "failed_to_resize": 0, "duration": 1.0, "status_dict": {"success": 5}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="module")
def rn50_state() -> Iterator[dict[str, Any]]:
    """The weights that configs/cc3m start from, built once."""
    holder: dict[str, Any] = {}
    yield holder
    holder.clear()


def one_step(r: Recipe, model: clip.CLIP) -> tuple[dict[str, float], list[str], poison.Plan]:
    """Index, plan, stream and one optimizer step of a recipe, as train.py takes them. Gives losses, keys and plan."""
    index = find(r.data.path("train"), r.data.incomplete)
    assert len(index) == 15 and index.incomplete == 0
    truth = plan(r.poison, index, r.seed) if r.poison else poison.Plan()
    objective = copy.deepcopy(r.objective)
    stages = [partial(poison.poison, attack=r.poison, plan=truth)] if r.poison else []
    stream = Stream(index, model, objective.views, r.batch_size, stages, None, r.seed, r.shuffle, r.lanes, 0, 0, 1, r.data.incomplete)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no")
    model.net.to(accelerator.device).train()
    objective.setup(model)
    optimizer = torch.optim.AdamW(fit.groups(model.net, r.schedule.wd), lr=r.schedule.lr_at(0, 100))
    net, optimizer = accelerator.prepare(model.net, optimizer)
    last = r.schedule.epochs - 1
    objective.start_epoch(model, lambda: stream.batches(last), last)
    batch = next(iter(stream.batches(last)))
    assert batch["text"].shape == (4, 77) and any(v.shape == (4, 3, 224, 224) for v in batch.values() if isinstance(v, torch.Tensor))
    before = {name: p.detach().clone() for name, p in model.net.named_parameters() if p.requires_grad and name.endswith("weight")}
    out = fit.update(net, objective, batch, optimizer, accelerator, r.schedule)
    assert any(not torch.equal(p, before[name]) for name, p in model.net.named_parameters() if name in before) or not before
    return {k: float(v) for k, v in out.items()}, batch["key"], truth


@pytest.mark.parametrize("name", ["badnets", "cleanclip"])
def test_cc3m_takes_a_step_on_a_stand_in_of_img2datasets_format(name: str, cc3m: Path, rn50_state: dict[str, Any]) -> None:
    args = ["--data.root", str(cc3m), "--data.train", "{root}/{00000..00002}.tar", "--batch-size", "4", "--workers", "0"]
    r = load(f"configs/cc3m/{name}.py", args + (["--poison.count", "3"] if name == "badnets" else []))
    assert type(r.objective) is (Clip if name == "badnets" else CleanCLIP)
    if not rn50_state:
        rn50_state["model"] = clip.load(r.model, None, r.aug, r.seed)
    model = rn50_state["model"]
    assert sum(p.numel() for p in model.net.parameters()) == 102_007_137
    out, keys, truth = one_step(r, model)
    assert all(np.isfinite(v) for v in out.values()) and 0.5 < out["loss"] < 20
    assert len(keys) == 4 and all(len(k) == 9 for k in keys)
    if name == "badnets":
        assert len(truth.keys) == 3 and not any(k[-1] == "2" for k in truth.keys)
        assert set(out) == {"loss"}
    else:
        assert set(out) == {"loss", "cross", "inmodal"} and not truth.keys


def test_a_count_of_the_paper_is_refused_on_the_stand_in(cc3m: Path) -> None:
    r = load("configs/cc3m/badnets.py", ["--data.root", str(cc3m), "--data.train", "{root}"])
    with pytest.raises(BadInput, match="1500"):
        plan(r.poison, find(r.data.path("train")), 0)
    with pytest.raises(BadInput) as raised:
        shards.expand(load("configs/cc3m/badnets.py", ["--data.root", str(cc3m)]).data.path("train"))
    assert "00003.tar" in str(raised.value) and "329 of 332" in str(raised.value)


# ---- defenses

DEFENSES = sorted(p.stem for p in (ROOT / "mmbackdoor/defenses").glob("*.py") if p.stem != "__init__")
REAL_DEFENSES = sorted(p.stem for p in (ROOT / "configs/cc3m/defenses").glob("*.py"))


def modules_of(r: Recipe) -> set[str]:
    """Which papers' files a recipe's objective and edit are of."""
    values = [r.objective, r.edit, getattr(r.objective, "objective", None)]
    return {type(v).__module__.rpartition(".")[2] for v in values if v is not None}


@pytest.mark.parametrize("size", ["toy", "cc3m"])
def test_every_defense_has_an_experiment_of_either_size(size: str) -> None:
    paths = [p for folder in (size, f"{size}/defenses") for p in (ROOT / "configs" / folder).glob("*.py")]
    found = [modules_of(load(str(p.relative_to(ROOT)))) for p in paths if "\nrecipe =" in p.read_text()]
    assert set(DEFENSES) <= set().union(*found)
    assert set(REAL_DEFENSES) <= {p.stem for p in (ROOT / "configs/toy/defenses").glob("*.py")} | {"finetune"}


@pytest.mark.parametrize("name", REAL_DEFENSES)
def test_a_defense_of_the_papers_sizes_cleans_what_it_says_and_fires_the_victims_threat(name: str) -> None:
    r = load(f"configs/cc3m/defenses/{name}.py")
    assert r.fires is not None and r.name == f"cc3m/defenses/{name}"
    if r.init is not None and not isinstance(r.objective, ABL):
        assert r.poison is None and isinstance(r.init, Recipe) and r.init.poison is not None and r.threat == r.init.poison.threat
        assert r.model == r.init.model
    else:
        assert r.poison is not None


def test_cc3m_has_the_numbers_of_the_papers_of_defenses() -> None:
    par, roclip, safeclip = (load(f"configs/cc3m/defenses/{name}.py") for name in ("par", "roclip", "safeclip"))
    assert (par.objective.tau, par.schedule.epochs, par.schedule.lr, par.schedule.wd, par.batch_size) == (2.15, 2, 3e-6, 1e-4, 512)
    assert par.init.model.pretrained == "openai" and (par.schedule.beta1, par.schedule.beta2) == (0.9, 0.98)
    assert (roclip.objective.every, roclip.objective.bank, roclip.schedule.epochs, roclip.schedule.lr, roclip.batch_size) == (
        2, 21_845, 24, 5e-5, 512)
    assert (safeclip.objective.warmup, safeclip.objective.slow, safeclip.objective.threshold, safeclip.objective.growth,
            safeclip.objective.most, safeclip.objective.bank, safeclip.schedule.epochs) == (5, 1, 0.9, 0.01, 0.85, 256, 32)
    assert safeclip.schedule.lr * safeclip.objective.pace(5) == pytest.approx(5e-6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, clip.CLIP]:
    """A ResNet and a ViT for images of 224 pixels that take milliseconds."""
    folder = tmp_path_factory.mktemp("small")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
    towers = {"RN50": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None},
              "ViT-B-16": {"layers": 2, "width": 32, "head_width": 32, "patch_size": 32}}
    for name, tower in towers.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": {"image_size": 224} | tower, "text_cfg": text}))
    return {name: clip.load(clip.Model(str(folder / f"{name}.json"))) for name in towers}


@pytest.mark.parametrize("name", REAL_DEFENSES)
def test_a_defense_of_the_papers_settings_takes_a_step_on_the_stand_in(name: str, cc3m: Path, small: dict[str, clip.CLIP]) -> None:
    r = load(f"configs/cc3m/defenses/{name}.py", ["--data.root", str(cc3m), "--batch-size", "4", "--workers", "0"])
    r = replace(r, data=replace(r.data, train="{root}/{00000..00002}.tar", share=1.0))
    if r.poison is not None:  # whichever it is: some would need pictures
        r = replace(r, poison=replace(load("configs/cc3m/badnets.py").poison, count=2))
    if isinstance(r.objective, CBPT):
        r = replace(r, objective=replace(r.objective, steps=2))
    model = replace(small[r.model.name], net=copy.deepcopy(small[r.model.name].net), card=copy.deepcopy(small[r.model.name].card))
    if r.edit is not None:
        index = find(r.data.path("train"), r.data.incomplete)
        stream = Stream(index, model, r.edit.views, 4, workers=0, incomplete=r.data.incomplete)
        before = copy.deepcopy(model.net.state_dict())
        model = r.edit(model, lambda: stream.batches(0), replace(small[r.model.name], net=noisy(small[r.model.name].net)))
        assert any(not torch.equal(v, before[k]) for k, v in model.net.state_dict().items())
    out, keys, _ = one_step(r, model)
    assert all(np.isfinite(v) for v in out.values()) and len(keys) == 4


def noisy(net: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
    return other
