"""A run's directory: begun without overwriting another, measured, and closed with results.json."""
from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from . import craft as crafting
from . import evaluate, keyed, probe, stealth, stores
from .clip import CLIP, load_run, weights_in
from .evaluate import Aim, Threats, by_name
from .features import Features, How, features
from .forms import lay_over, with_published
from .index import Index, find, whole
from .poison import Plan, plan, poison, publish, scouted
from .recipe import MIXED, Data, Recipe, environment, files, identity, load, plain, recipe_hash, revive, text
from .retrieval import retrieval
from .sets import EvalSet, PairSet, open_pairs, open_set
from .shards import Raw, Stage, decode, write_shard
from .stores import replacing, write_json
from .stream import Stream
from .types import BadInput, Threat

PATIENCE = timedelta(hours=6)
"""How long processes wait for one that crafts a trigger, say; a process that ended is noticed by the launcher at once."""


def processes() -> PartialState:
    """The launcher's processes. Without a GPU accelerate must be told so, or each process believes it is alone."""
    meant, found = os.environ.get("WORLD_SIZE", "1"), "none"
    with suppress(ValueError):  # accelerate's, when the variables of a launcher are incomplete
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
        if meant == (found := str(state.num_processes)):
            return state
    raise BadInput(f"WORLD_SIZE is {meant}, but the processes that found each other are {found}; start them with accelerate launch or "
                   "torchrun, or unset WORLD_SIZE")


def trained(folder: Path) -> bool:
    """Whether training has begun there; a run that was refused before leaves nothing worth keeping."""
    log = folder / "log.jsonl"
    return log.is_file() and log.stat().st_size > 0


def begun(r: Recipe) -> bool:
    """Whether the run's directory was made by just this recipe."""
    card = r.directory / "recipe.json"
    return card.is_file() and json.loads(card.read_text())["hash"] == recipe_hash(r)


def craft(r: Recipe) -> str:
    """The file of the attack's crafted trigger, made on the surrogate if it is not there; "" for an attack that needs none."""
    if r.poison is None or not (file := crafting.crafted(r.poison)):
        return ""
    if r.surrogate is None:
        if not os.path.exists(file):
            raise BadInput(f"{file}: no crafted trigger is there, and no model to craft it on; name one with --surrogate RUN")
        return file
    attack = plain(replace(r.poison, rate=None, count=None))  # one trigger serves all rates
    on = f"{r.surrogate.directory} {recipe_hash(r.surrogate)}" if isinstance(r.surrogate, Recipe) else str(r.surrogate)
    made = {"attack": json.dumps(attack, sort_keys=True), "surrogate": on, "data": r.data.path("train")}
    state = processes()
    if os.path.exists(file):
        crafting.check(file, made)
    elif state.is_main_process:
        index = find(r.data.path("train"), r.data.incomplete, r.data.path("index"))
        model = load_run(str(weights(r.surrogate, "--surrogate")), usual=r.model)
        if isinstance(r.surrogate, Recipe):
            model = replace(model, aug=r.surrogate.aug)
        model.net.to(state.device)
        crafting.craft(scouted(r.poison, index, 0), model, index, 0, made)
    state.wait_for_everyone()
    return file


def begin(r: Recipe) -> Accelerator:
    """The launcher's processes, and a directory with the recipe in it. Refuses to overwrite a run or to mix two."""
    if MIXED[r.precision] == "fp16" and not torch.cuda.is_available():
        raise BadInput(f"--precision {r.precision}: float16 needs a GPU; use amp_bf16 or fp32 here")
    processes()
    AcceleratorState._reset_state()  # a suite's recipes may differ in precision
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=MIXED[r.precision],
                              log_with=list(r.report_to) or None,
                              project_config=ProjectConfiguration(logging_dir=str(r.directory)))
    if r.expect_world_size and r.expect_world_size != accelerator.num_processes:
        raise BadInput(f"--expect-world-size {r.expect_world_size}: {accelerator.num_processes} processes are running; on a CPU "
                       "start them with torchrun --nproc_per_node N")
    folder, card = r.directory, r.directory / "recipe.json"
    if trained(folder) and r.resume != "latest":
        raise BadInput(f"{folder}: holds a run already; continue it with --resume latest, remove it, or choose another --name")
    if trained(folder) and not begun(r):
        raise BadInput(f"{folder}: was begun with another recipe (see recipe.py.txt there); remove it or choose another --name")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with replacing(folder / "recipe.py.txt") as temporary:
            temporary.write_text(text(r))
        write_json(card, {"hash": recipe_hash(r)} | plain(r))
        print(f"{r.name} (seed {r.seed}) on {accelerator.num_processes} x {accelerator.device.type}, global batch "
              f"{r.batch_size * accelerator.num_processes * r.schedule.accum_freq}, in {folder}", flush=True)
    if r.report_to:
        accelerator.init_trackers("mmbackdoor", {"name": r.name, "hash": recipe_hash(r)})
    return accelerator


@dataclass(frozen=True)
class Sets:
    """What a run or a checkpoint is measured on, opened; None where there is no such set."""

    validation: EvalSet | None = None
    zero_shot: EvalSet | None = None
    retrieval: PairSet | None = None
    train: EvalSet | None = None
    """What probes are trained on; they are measured on `zero_shot`."""


def open_sets(data: Data, threats: Threats, train_set: str = "") -> Sets:
    """A wrong evaluation set, class or victim is told now, not after training or after another set was measured."""
    validation, zero_shot = (open_set(path) if (path := data.path(name)) else None for name in ("validation", "zero_shot"))
    for labelled in filter(None, (validation, zero_shot)):
        for threat in by_name(threats).values():
            evaluate.seek(labelled, evaluate.aim(labelled, threat))
    train = open_set(train_set, "train") if train_set else None
    if train and zero_shot and train.classnames != zero_shot.classnames:
        raise BadInput(f"{train.name}: its classes are not those of {zero_shot.name}, so what is trained on the one says nothing "
                       "of the other; give --probe a set with the same classnames in the same order")
    return Sets(validation, zero_shot, open_pairs(path) if (path := data.path("retrieval")) else None, train)


def data(r: Recipe, accelerator: Accelerator) -> tuple[Index, list[Stage], Plan]:
    """The pairs of the run, what is done to them on the way, and which of them are poisoned. Pairs that the attacker adds
    become a shard of the run's."""
    train, patch = r.data.path("train"), r.data.path("patch")
    index = shared(find(train, r.data.incomplete, r.data.path("index")), r.data.share)
    if patch:
        if r.data.share < 1:
            raise BadInput(f"--data.share {r.data.share}: a patch set lies over all of the shards that it was made from; use 1")
        if r.poison:
            raise BadInput(f"--data.patch {patch}: holds poisons already, and the recipe would poison again; use a recipe with poison=None")
        return lay_over(index, patch, r.data.incomplete)
    if r.attack is None:
        return index, [], Plan()
    if r.plan:
        given = Plan.load(r.plan)
        truth = given & index.keys()
        if (lost := len(given.keys) - len(truth.keys)) and accelerator.is_main_process:
            print(f"{lost} of {len(given.keys)} keys of {r.plan} are not in the data", flush=True)
    else:
        truth = plan(r.attack, index, r.seed)
    attack = scouted(r.attack, index, truth.seed)
    added, published = list(publish(attack, truth)), r.directory / "published"
    truth = with_published(truth, added, index)
    if added and accelerator.is_main_process:
        write_shard(published / "00000.tar", added)
    accelerator.wait_for_everyone()
    if added:
        index = whole(Index(index.parts + find(str(published)).parts), r.data.incomplete)
    return index, [partial(poison, attack=attack, plan=truth, codec=r.codec)], truth


def shared(index: Index, share: float) -> Index:
    """The part of the pairs that is used."""
    if share == 1:
        return index
    n = round(share * len(index)) if 0 < share <= 1 else 0
    if not n:
        raise BadInput(f"--data.share {share}: is no part of {len(index)} pairs, or less than one; give a number above 0, of at most 1")
    return index.only(frozenset(sorted(index.keys(), key=partial(keyed.integer, 0, "share"))[:n]))


def edited(r: Recipe, clip: CLIP, index: Index, stages: Sequence[Stage]) -> CLIP:
    """The model after the recipe's edit, which goes through the pairs in the order of the first epoch."""
    if r.edit is None:
        if r.donor:
            raise BadInput("--donor: names a second model, and nothing is done with it; add --edit, or leave the donor out")
        return clip
    whole_stream = partial(Stream, index, clip, r.edit.views, r.batch_size, stages, seen(r, index), r.seed, r.shuffle, r.lanes,
                           r.workers, incomplete=r.data.incomplete)
    donor = load_run(str(weights(r.donor, "--donor")), usual=r.model) if r.donor else None
    state = processes()
    for model in filter(None, (clip, donor)):
        model.net.to(state.device).eval()
    return r.edit(clip, lambda: whole_stream().batches(0), donor)


def visible(index: Index, stages: Sequence[Stage], truth: Plan, n: int = 64) -> dict[str, float | None] | None:
    """How much can be seen of the poisoned ones among n planned images, `stealth.summarise`; None where none is changed, or all are
    resized."""
    keys = frozenset(sorted(truth.keys, key=partial(keyed.integer, truth.seed))[:n])
    pairs = []
    for part in index.parts:
        if there := keys.intersection(part.all_keys()):
            before = list(part.raws(there))
            after: Iterable[Raw] = before
            for stage in stages:
                after = stage(after)
            for a, b in zip(before, after, strict=True):
                with suppress(BadInput):  # an image that the stream skips, or has refused already
                    pairs.append((decode(a)["image"], decode(b)["image"]))
    pairs = [(a, b) for a, b in pairs if a.size == b.size and a.tobytes() != b.tobytes()]
    return {k: stealth.in_json(v) for k, v in stealth.summarise(pairs).items()} if pairs else None


def describe(r: Recipe, index: Index, truth: Plan, accelerator: Accelerator) -> None:
    """What is left out, and the ground truth."""
    if accelerator.is_main_process:
        if index.incomplete:
            print(f"{index.incomplete} of {index.incomplete + len(index)} samples lack their image or caption and are left out", flush=True)
        if lost := len((keep_list(r.keep) or frozenset()).difference(index.keys())):
            print(f"{lost} keys of {r.keep} are not in the data", flush=True)
        truth.save(r.directory / "plan.parquet")


def curves(clip: CLIP, r: Recipe, sets: Sets, how: How, epoch: int) -> dict[str, float]:
    """Accuracy and ASR on the validation set (where there is none, on the test set), for the curves of the report."""
    labelled = sets.validation or sets.zero_shot
    if not labelled or not r.eval_frequency or epoch % r.eval_frequency:
        return {}
    found = evaluate.zero_shot(clip, labelled, r.fires, how, what="validation")
    return {k: found[k] for k in ("accuracy", "asr") if k in found}


def weights(init: Recipe | str | None, flag: str = "--init") -> str | None:
    """The directory or file of the run that a flag names. A run of another recipe under that name is told."""
    path = str(init.directory) if isinstance(init, Recipe) else init
    if isinstance(init, Recipe) and not (init.directory / "results.json").is_file():
        raise BadInput(f"{path}: the run that {flag} names is not finished; train it first, or name another run or checkpoint")
    if isinstance(init, Recipe) and not done(init) and processes().is_main_process:
        print(f"warning: {path} is of another recipe than {flag} names (see recipe.py.txt there); the result says so", file=sys.stderr)
    return path


def otherwise(r: Recipe) -> dict[str, str]:
    """Of the runs that a recipe names, those of another recipe than it says, with the hash of theirs."""
    named = {name: o for name in ("init", "donor", "surrogate", "reference") if isinstance(o := getattr(r, name), Recipe)}
    return {name: read_results(o.directory)["recipe_hash"] for name, o in named.items()
            if (o.directory / "results.json").is_file() and not done(o)}


def seen(r: Recipe, index: Index) -> frozenset[str] | None:
    """The keys that may be seen, of the share of the data and of the keep list; None for all."""
    kept, part = keep_list(r.keep), frozenset(index.keys()) if r.data.share < 1 else None
    return part if kept is None else kept if part is None else kept & part


def keep_list(path: str | None) -> frozenset[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such keep list; give a text file with one key a line")
    return frozenset(filter(None, map(str.strip, Path(path).read_text(encoding="utf-8").splitlines())))


def measure(clip: CLIP, sets: Sets, threats: Threats, how: How = How(), tables: Path | None = None,
            index: str = "exact") -> dict[str, Any]:
    """All metrics that the sets allow, and, in the folder `tables`, every set's recall and attack success class by class and
    its confusion."""
    out: dict[str, Any] = {}
    named = by_name(threats)
    for name, labelled in (("validation", sets.validation), ("zero_shot", sets.zero_shot)):
        if labelled:
            found = features(clip, labelled.raws, tuple(named.values()), how, name)
            answers = evaluate.classify(clip, labelled, named, how, found)
            out[name] = {"dataset": labelled.name} | evaluate.summarise(answers)
            if tables and how.rank == 0:
                write_csv(tables / f"{name}.per_class.csv", evaluate.per_class(answers, labelled.classnames))
                write_csv(tables / f"{name}.confusion.csv", evaluate.confusion(answers, labelled.classnames))
            if name == "zero_shot" and sets.train:
                out |= probes(clip, sets.train, labelled, found, named, answers.aims, how)
    if sets.retrieval:
        out["retrieval"] = retrieval(clip, sets.retrieval, named, how, index)
    return out


def probes(clip: CLIP, train: EvalSet, test: EvalSet, found: Features, threats: Mapping[str, Threat], aims: Mapping[str, Aim],
           how: How) -> dict[str, Any]:
    """Linear probe, k-NN and few-shot classifiers of one set's features, on those of another: clean and under each threat to all
    images of other classes, but for those whose trigger is one of text too, which a probe does not read."""
    whole = {name: (aims[name].target, z) for (name, t), z in zip(threats.items(), found.hit, strict=True)
             if not (t.victims or t.source or t.trigger.said)}
    targets, found = {name: target for name, (target, _) in whole.items()}, replace(found, hit=tuple(z for _, z in whole.values()))
    each = probe.probe(features(clip, train.raws, (), how, "probe"), found, len(test.classnames), targets)
    return {kind: {"dataset": test.name, "trained_on": train.name} | m for kind, m in each.items()}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def compare(metrics: dict[str, Any], reference: Recipe | str | None, threats: Threats, sets: Sets | None = None,
            how: How = How()) -> dict[str, Any]:
    """Adds the reference's attack success and the lift, for each threat that it was shown on the same images. With the `sets`, a
    reference whose model is there is shown now what it was not shown before."""
    folder = reference.directory if isinstance(reference, Recipe) else Path(reference) if reference else None
    named = by_name(threats)
    if folder is None or not named or not (folder / "results.json").is_file():
        return metrics
    theirs, fresh = read_results(folder), {}
    shown = {name: identity(value) for name, value in (theirs.get("threats") or {"": theirs.get("threat")}).items()}
    known = {name: next((n for n, value in shown.items() if value == identity(plain(t))), None) for name, t in named.items()}
    unknown = {name: t for name, t in named.items() if known[name] is None}
    if unknown and sets and weights_in(folder):
        model = load_run(folder)
        model.net.to(processes().device)
        fresh = measure(model, replace(sets, train=None), unknown, how)

    def measured(kind: str, name: str) -> dict[str, Any] | None:
        """What the reference did under a threat."""
        m, there = (fresh, name) if known[name] is None else (theirs["metrics"], known[name])
        found = m.get(kind, {})
        return found.get("threats", {}).get(there, found) if found.get("dataset") == metrics[kind].get("dataset") else None

    out = dict(metrics)
    for kind, m in metrics.items():
        out[kind] = evaluate.against(m, measured(kind, next(iter(named))))
        if "threats" in m:
            out[kind]["threats"] = {name: evaluate.against(of, measured(kind, name)) for name, of in m["threats"].items()}
    return out


def finish(r: Recipe, clip: CLIP, sets: Sets, accelerator: Accelerator, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Writes the model, examples for the report, and results.json: a record of schema 1."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    other = {"otherwise": named} if (named := otherwise(r)) else {}
    found = {"schema": 1, "name": r.name, "recipe": plain(r), "recipe_hash": recipe_hash(r), "seed": r.seed, **other, **shown(r.fires),
             "environment": environment(accelerator.num_processes, device), **more, "metrics": metrics}
    if accelerator.is_main_process:
        clip.save(r.directory)
        labelled = sets.zero_shot or sets.validation
        first = next(iter(by_name(r.fires).values()), None)
        write_json(r.directory / "examples.json", evaluate.examples(clip, labelled, first) if labelled else [])
        write_json(r.directory / "results.json", found)
        print(line(found), flush=True)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()  # a run that starts from this one finds it
    return found


def read_results(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "results.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no readable result ({error}); train or evaluate the run first") from error
    if found.get("schema") != 1:
        raise BadInput(f"{path}: schema {found.get('schema')}, this version reads 1; evaluate the run again")
    return found


def done(r: Recipe) -> bool:
    """Whether the run's results exist for just this recipe."""
    return (r.directory / "results.json").is_file() and read_results(r.directory)["recipe_hash"] == recipe_hash(r)


def recorded(path: Path, r: Recipe) -> bool:
    """Whether the file is a result of just this recipe."""
    return path.is_file() and stores.read_json(path).get("recipe_hash") == recipe_hash(r)


def take(path: Path, r: Recipe) -> None:
    """Takes a recorded result for the run's, if it is of just this recipe."""
    if recorded(path, r) and processes().is_main_process:
        write_json(r.directory / "results.json", stores.read_json(path))


def line(found: dict[str, Any]) -> str:
    """One line for the terminal."""
    m = found["metrics"].get("zero_shot") or found["metrics"].get("validation") or {}
    words = [f"{name} {100 * m[key]:.1f} %" for name, key in (("accuracy", "accuracy"), ("ASR", "asr"), ("reference ASR", "asr_reference"))
             if m.get(key) is not None]
    return f"{found['name']} (seed {found['seed']}): " + (", ".join(words) or "nothing measured: the recipe names no evaluation set")


def threats_of(configs: Sequence[str]) -> dict[str, Threat]:
    """What the recipes of configs fire, by the recipes' names."""
    out: dict[str, Threat] = {}
    names: set[str] = set()
    for path in configs:
        r = load(path)
        if r.fires is None:
            raise BadInput(f"{path}: its recipe has neither poison nor threat; name one that does")
        if r.name in names:
            raise BadInput(f"{path}: a recipe named {r.name} is among the threats already; give each its own name")
        names.add(r.name)
        out |= {f"{r.name} {name}".strip(): threat for name, threat in by_name(r.fires).items()}
    return out


def recorded_threats(known: dict[str, Any] | None) -> dict[str, Threat]:
    """The threats that a result was measured under, by name."""
    if not known or not known.get("threat"):
        return {}
    return {name: revive(value) for name, value in (known.get("threats") or {"": known["threat"]}).items()}


def shown(threats: Threats) -> dict[str, Any]:
    """Threats as a result names them: the first, and, when there are several, each under its name; and hashes of their files."""
    values = {name: plain(threat) for name, threat in by_name(threats).items()}
    named = {"files": found} if (found := files(values)) else {}
    return {"threat": next(iter(values.values()), None)} | ({"threats": values} if len(values) > 1 else {}) | named


def recorded_data(known: dict[str, Any] | None, dataset: str, retrieval: str) -> Data:
    """The sets of a result's recipe, or those named in their place."""
    if known and known.get("recipe") and not (dataset or retrieval):
        return revive(known["recipe"]["data"])
    return Data("", zero_shot=dataset, retrieval=retrieval)


def recorded_reference(known: dict[str, Any] | None) -> str | None:
    """The directory of the reference run that a result's recipe names."""
    theirs = known and known.get("recipe") and known["recipe"].get("reference")
    if isinstance(theirs, dict):
        return str(Path(theirs["out"]) / (f"{theirs['name']}-seed{theirs['seed']}" if theirs["seed"] else theirs["name"]))
    return theirs or None
