"""Edits of finished models as runs: what they give, from whom they take it, and that they are runs like any other."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Ended, load_program
from safetensors.torch import load_file
from torch import Tensor

from mmbackdoor import clip, fit, run
from mmbackdoor.clip import Model
from mmbackdoor.defenses.fine_pruning import FinePruning
from mmbackdoor.defenses.tbar import TBAR
from mmbackdoor.fit import Schedule
from mmbackdoor.index import find
from mmbackdoor.poison import DirtyLabel
from mmbackdoor.recipe import Data, Recipe, Suite, plain, recipe_hash, revive, seeded
from mmbackdoor.triggers import Patch
from mmbackdoor.types import Edit, Target

POISON = DirtyLabel(Patch(4 / 32), Target("red star"), rate=0.1)
HIDDEN = "visual.transformer.resblocks.0.mlp"


@pytest.fixture(scope="module")
def runs(toy: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Recipe]:
    """A finished victim, and it again after an epoch on more poisons."""
    victim = Recipe("victim", Data(str(toy / "train"), zero_shot=str(toy / "val")), Model(tiny_model), batch_size=50, workers=0,
                    schedule=Schedule(epochs=1, lr=1e-3, warmup=2), poison=POISON, out=str(tmp_path_factory.mktemp("runs")))
    donor = replace(victim, name="donor", init=victim, poison=replace(POISON, rate=0.5))
    for r in (victim, donor):
        load_program("train").train(r)
    return victim, donor


@pytest.fixture
def arithmetic(runs: tuple[Recipe, Recipe], tmp_path: Path) -> Recipe:
    """Task arithmetic on the victim, in a place of its own."""
    victim, donor = runs
    return replace(victim, name="unlearned", init=victim, donor=donor, edit=TBAR(0.7), poison=None, threat=POISON.threat,
                   schedule=replace(victim.schedule, epochs=0), out=str(tmp_path / "runs"))


@pytest.fixture
def pruning(arithmetic: Recipe) -> Recipe:
    return replace(arithmetic, name="pruned", donor=None, edit=FinePruning(0.5, pairs=100))


def train(r: Recipe) -> dict[str, Any]:
    return load_program("train").train(r)


def weights(r: Recipe) -> dict[str, Tensor]:
    return load_file(r.directory / "open_clip_model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def dead(state: dict[str, Tensor]) -> set[int]:
    """Hidden units that nothing leads to and that lead nowhere."""
    silent = (state[f"{HIDDEN}.c_fc.weight"] == 0).all(1) & (state[f"{HIDDEN}.c_fc.bias"] == 0)
    return set((silent & (state[f"{HIDDEN}.c_proj.weight"] == 0).all(0)).nonzero().flatten().tolist())


# ---- what they give


def test_a_run_of_no_epochs_saves_the_formula_of_two_runs_weights_and_measures_it(runs, arithmetic):
    found = train(arithmetic)
    victim, donor, edited = (weights(r) for r in (*runs, arithmetic))
    assert max(float((victim[k] - donor[k]).abs().max()) for k in victim) > 1e-3
    for name, w in edited.items():
        theory = victim[name] if name == "logit_scale" else victim[name] - 0.7 * (donor[name] - victim[name])
        torch.testing.assert_close(w, theory, rtol=0, atol=1e-6)
    assert json.loads((arithmetic.directory / "results.json").read_text()) == found
    assert {"accuracy", "asr"} <= found["metrics"]["zero_shot"].keys() and found["cost"]["samples_seen"] == 0
    assert [json.loads(line)["epoch"] for line in (arithmetic.directory / "log.jsonl").read_text().splitlines()] == [0]


def test_the_result_holds_the_recipe_with_its_edit_and_its_donor(arithmetic):
    recorded = json.loads(json.dumps(plain(arithmetic)))
    assert recorded["edit"]["scale"] == 0.7 and recorded["donor"]["name"] == "donor"
    assert plain(revive(recorded)) == plain(arithmetic) and recipe_hash(revive(recorded)) == recipe_hash(arithmetic)


def test_what_decides_an_edit_is_in_the_hash(arithmetic, runs):
    others = [replace(arithmetic, edit=TBAR(0.8)), replace(arithmetic, edit=FinePruning()), replace(arithmetic, edit=None),
              replace(arithmetic, donor=replace(runs[1], seed=1)), replace(arithmetic, donor=None)]
    assert len({recipe_hash(r) for r in (arithmetic, *others)}) == 6


def test_training_after_an_edit_starts_from_the_edited_weights(runs, arithmetic):
    """At a rate of next to nothing it ends there too."""
    train(arithmetic)
    still = replace(arithmetic, name="still", schedule=Schedule(epochs=1, lr=1e-12, wd=0.0, warmup=1))
    assert train(still)["cost"]["samples_seen"] == 300
    edited, trained = weights(arithmetic), weights(still)
    assert all(torch.allclose(edited[k], trained[k], rtol=0, atol=1e-6) for k in edited) and not same(trained, weights(runs[0]))


def test_units_that_were_cut_off_stay_dead_in_the_model_that_was_fine_tuned_and_saved(runs, pruning):
    train(pruning)
    r = replace(pruning, name="tuned", schedule=Schedule(epochs=1, lr=1e-2, warmup=1))
    train(r)
    victim, cut, tuned = weights(runs[0]), weights(pruning), weights(r)
    units = len(victim[f"{HIDDEN}.c_fc.bias"])
    assert not dead(victim) and len(dead(cut)) == units // 2 == 64 and dead(tuned) == dead(cut)
    alive = sorted(set(range(units)) - dead(cut))
    assert torch.equal(cut[f"{HIDDEN}.c_fc.weight"][alive], victim[f"{HIDDEN}.c_fc.weight"][alive])
    assert not torch.isclose(cut[f"{HIDDEN}.c_fc.weight"][alive], tuned[f"{HIDDEN}.c_fc.weight"][alive]).all(1).any(), "the others learn"
    assert dead(clip.load_run(r.directory).net.state_dict()) == dead(cut), "as it is loaded again"


def test_without_a_run_to_start_from_the_fresh_model_is_edited(pruning):
    r = replace(pruning, init=None, seed=3)
    train(r)
    fresh, cut = clip.load(r.model, seed=3).net.state_dict(), weights(r)
    assert len(dead(cut)) == 64 and not dead(fresh)
    assert {k for k in cut if not torch.equal(fresh[k], cut[k])} == {f"{HIDDEN}.{k}" for k in ("c_fc.weight", "c_fc.bias", "c_proj.weight")}


# ---- what they see


@dataclass(frozen=True)
class Seeing(Edit):
    """Changes nothing, and keeps what it was given."""

    seen: list[Any] = field(default_factory=list, init=False, repr=False)

    def __call__(self, clip: Any, batches: Callable[[], Any], donor: Any = None) -> Any:
        self.seen.append(([{k: v for k, v in batch.items()} for batch in batches()], clip.net.training, donor))
        return clip


def test_an_edit_sees_the_share_and_the_keep_list_of_the_data_with_its_poisons(pruning, tmp_path):
    edit = Seeing()
    data = replace(pruning.data, share=0.5)
    r = replace(pruning, edit=edit, data=data, poison=replace(POISON, rate=None, count=40), batch_size=20, lanes=4,
                keep=str(tmp_path / "keep.txt"))
    index = run.shared(find(data.train), 0.5)
    kept = sorted(index.keys())[:100]
    (tmp_path / "keep.txt").write_text("\n".join(kept))
    train(r)
    train(replace(r, name="clean", poison=None))
    (poisoned, training, donor), (clean, _, _) = edit.seen
    assert not training and donor is None
    first, second = ({key: (x.numpy().tobytes(), t.numpy().tobytes()) for b in batches
                      for key, x, t in zip(b["key"], b["image"], b["text"], strict=True)} for batches in (poisoned, clean))
    assert sorted(first) == sorted(second) == kept and all(len(b["key"]) == 20 for b in poisoned)
    plan = run.data(r, fit.Accelerator(cpu=True))[2].keys
    assert {key for key in first if first[key] != second[key]} == plan & set(kept) and len(plan & set(kept)) > 10


def test_an_edit_is_given_the_donors_weights_for_evaluation(runs, arithmetic):
    edit = Seeing()
    train(replace(arithmetic, edit=edit))
    ((_, _, donor),) = edit.seen
    assert same(dict(donor.net.state_dict()), weights(runs[1])) and not donor.net.training


# ---- runs like any other


def test_an_edited_run_is_not_overwritten_and_is_resumed_to_the_same_model(arithmetic):
    found, before = train(arithmetic), weights(arithmetic)
    with pytest.raises(run.BadInput, match="holds a run already; continue it with --resume latest"):
        train(arithmetic)
    with pytest.raises(run.BadInput, match="was begun with another recipe"):
        train(replace(arithmetic, edit=TBAR(0.8), resume="latest"))
    again = train(replace(arithmetic, resume="latest"))
    assert same(before, weights(arithmetic)) and again["metrics"] == found["metrics"]


def test_a_run_that_is_killed_after_its_edit_is_resumed_to_the_weights_of_an_unbroken_one(pruning, monkeypatch):
    whole = replace(pruning, name="whole", schedule=Schedule(epochs=2, lr=1e-3, warmup=1), save_steps=2)
    train(whole)
    broken, update, steps = replace(whole, name="broken", resume="latest"), fit.update, iter([None] * 9)

    def killed(*args: Any) -> Any:
        if next(steps, "over"):
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(fit, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    assert not (broken.directory / "results.json").exists()
    state = torch.load(broken.directory / "checkpoints/epoch_latest.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    train(broken)
    assert same(weights(whole), weights(broken)) and len(dead(weights(broken))) == 64


def test_a_suite_runs_the_donor_before_the_edit_and_the_victim_before_the_donor(runs, arithmetic):
    assert [r.name for r in Suite("s", (arithmetic,)).runs([0])] == ["victim", "donor", "unlearned"]
    assert [(r.name, r.seed) for r in Suite("s", (arithmetic,)).runs([0, 2])][3:] == [("victim", 2), ("donor", 2), ("unlearned", 2)]


def test_seeding_reaches_the_donor(arithmetic):
    other = seeded(arithmetic, 3)
    assert (other.seed, other.donor.seed, other.donor.init.seed, other.init.seed) == (3, 3, 3, 3)
    assert other.donor.directory.name == "donor-seed3" and arithmetic.donor.seed == 0
    assert seeded(replace(arithmetic, donor="some/run"), 3).donor == "some/run"


# ---- on the command line


CONFIG = """\
from dataclasses import replace
from mmbackdoor import Data, DirtyLabel, Model, Patch, Recipe, Schedule, Target
from mmbackdoor.defenses.fine_pruning import FinePruning
from mmbackdoor.defenses.tbar import TBAR
recipe = Recipe("edited", Data({train!r}), Model({model!r}), init={victim!r}, edit=TBAR(), batch_size=50, workers=0,
                schedule=Schedule(epochs=0))
"""


@pytest.fixture
def home(runs: tuple[Recipe, Recipe], tmp_path: Path) -> Path:
    """The folder with conf.py, task arithmetic on the victim that still wants a donor."""
    victim = runs[0]
    text = CONFIG.format(train=victim.data.train, model=victim.model.name, victim=str(victim.directory))
    (tmp_path / "conf.py").write_text(text)
    (tmp_path / "unfinished.py").write_text(text + "recipe = replace(recipe, donor=replace(recipe, name='first', edit=None))\n")
    (tmp_path / "pruned.py").write_text(text + "recipe = replace(recipe, edit=FinePruning())\n")
    return tmp_path


def test_the_scale_and_the_donor_are_flags(home, runs, program):
    ended = program("train", "conf.py", "--edit.scale", "0.25", "--donor", runs[1].directory)
    assert ended.status == 0, ended
    victim, donor = map(weights, runs)
    edited = load_file(home / "runs/edited/open_clip_model.safetensors")
    name = "visual.conv1.weight"
    torch.testing.assert_close(edited[name], victim[name] - 0.25 * (donor[name] - victim[name]), rtol=0, atol=1e-6)
    assert not torch.allclose(edited[name], victim[name] - (donor[name] - victim[name]), rtol=0, atol=1e-6)
    recorded = json.loads((home / "runs/edited/results.json").read_text())["recipe"]
    assert (recorded["edit"]["scale"], recorded["donor"]) == (0.25, str(runs[1].directory))


def test_a_checkpoint_of_a_run_is_a_donor_too(home, runs, program):
    assert program("train", "conf.py", "--donor", runs[1].directory / "checkpoints/epoch_latest.pt").status == 0
    victim, donor = map(weights, runs)
    edited = load_file(home / "runs/edited/open_clip_model.safetensors")
    torch.testing.assert_close(edited["text_projection"], 2 * victim["text_projection"] - donor["text_projection"], rtol=0, atol=1e-6)


WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no donor": (("conf.py",), ("--edit.scale", "needs a second model", "name its run with --donor")),
    "a donor that is not finished": (("unfinished.py",), ("runs/first: the run that --donor names is not finished", "train it first")),
    "a donor that is not there": (("conf.py", "--donor", "nowhere"), ("nowhere: no such checkpoint", "name a run")),
    "a donor of another architecture": (("conf.py", "--donor", "wide"), ("--donor: a network of another architecture", "fine-tune")),
    "a donor of another architecture, and no victim": (("conf.py", "--donor", "wide", "--init", "None"), ("--donor: a network of",)),
    "a victim that is not there": (("pruned.py", "--init", "nowhere"), ("nowhere: no such checkpoint",)),
    "a share of all units": (("pruned.py", "--edit.share", "1"), ("--edit.share 1.0", "less than 1")),
    "a share below nothing": (("pruned.py", "--edit.share", "-0.1"), ("--edit.share -0.1", "from 0")),
    "less data than a batch": (("pruned.py", "--batch-size", "301"), ("300 pairs do not fill one batch",)),
}


@pytest.mark.parametrize("args, says", WRONG.values(), ids=list(WRONG))
def test_an_edit_with(args: tuple[str, ...], says: tuple[str, ...], home: Path, program: Callable[..., Ended]):
    (home / "wide.json").write_text(json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"width": 64}}))
    clip.load(Model(str(home / "wide.json"))).save(home / "wide")
    ended = program("train", *args)
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert all(word in ended.err for word in says), ended.err
    assert not list(home.rglob("log.jsonl")) and not list(home.rglob("results.json"))


def test_a_refused_edit_does_not_stand_in_the_way_of_the_next(home, runs, program):
    assert program("train", "conf.py").status == 2
    assert program("train", "conf.py", "--donor", runs[1].directory).status == 0
    assert (home / "runs/edited/results.json").is_file()
