"""A run's directory: begun without overwriting another, measured, and closed with results.json."""
from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from . import evaluate, shards
from .clip import CARD, CLIP
from .poison import Plan, plan, publish
from .recipe import MIXED, Data, Recipe, environment, plain, recipe_hash, revive, text
from .types import BadInput, Threat


def processes() -> PartialState:
    """The launcher's processes. Without a GPU accelerate must be told so, or each process believes it is alone."""
    meant, found = os.environ.get("WORLD_SIZE", "1"), "none"
    with suppress(ValueError):  # accelerate's, when the variables of a launcher are incomplete
        state = PartialState(cpu=not torch.accelerator.is_available())
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
        with shards.replacing(folder / "recipe.py.txt") as temporary:
            temporary.write_text(text(r))
        shards.write_json(card, {"hash": recipe_hash(r)} | plain(r))
        print(f"{r.name} (seed {r.seed}) on {accelerator.num_processes} x {accelerator.device.type}, global batch "
              f"{r.batch_size * accelerator.num_processes * r.schedule.accum_freq}, in {folder}", flush=True)
    if r.report_to:
        accelerator.init_trackers("mmbackdoor", {"name": r.name, "hash": recipe_hash(r)})
    return accelerator


def check_target(r: Recipe) -> None:
    """A wrong target class or evaluation set is told now, not after training."""
    for path in (r.data.path("validation"), r.data.path("zero_shot")):
        found = evaluate.open_set(path) if path else None
        if found and r.fires:
            found.target(r.fires.target)


def data(r: Recipe, accelerator: Accelerator) -> tuple[shards.Index, Plan]:
    """The pairs of the run, and which of them are poisoned. Pairs that the attacker adds become a shard of the run's."""
    train = r.data.path("train")
    index = shards.index(train, r.data.incomplete)
    if r.poison is None:
        return index, Plan()
    truth = plan(r.poison, index, r.seed)
    added = list(publish(r.poison, truth))
    if not added:
        return index, truth
    if accelerator.is_main_process:
        shards.write_shard(r.directory / "published" / "00000.tar", added)
    accelerator.wait_for_everyone()
    truth = replace(truth, added=frozenset(raw["__key__"] for raw in added))
    return shards.index(f"{train}::{r.directory / 'published'}", r.data.incomplete), truth


def describe(r: Recipe, clip: CLIP, index: shards.Index, truth: Plan, accelerator: Accelerator) -> None:
    """What is left out, the ground truth, and what it takes to load the checkpoints of a run under way."""
    if accelerator.is_main_process:
        if index.incomplete:
            print(f"{index.incomplete} of {index.incomplete + len(index)} samples lack their image or caption and are left out", flush=True)
        truth.save(r.directory / "plan.parquet")
        shards.write_json(r.directory / CARD, clip.card)


def curves(clip: CLIP, r: Recipe, rank: int, world: int, epoch: int) -> dict[str, float]:
    """Accuracy and ASR on the validation set (where there is none, on the test set), for the curves of the report."""
    path = r.data.path("validation") or r.data.path("zero_shot")
    if not path or not r.eval_frequency or epoch % r.eval_frequency:
        return {}
    found = evaluate.zero_shot(clip, evaluate.open_set(path), r.fires, rank, world, r.workers, what="validation")
    return {k: found[k] for k in ("accuracy", "asr") if k in found}


def weights(init: Recipe | str | None) -> str | None:
    """The directory or file of the run that another starts from."""
    path = str(init.directory) if isinstance(init, Recipe) else init
    if isinstance(init, Recipe) and not (init.directory / "results.json").is_file():
        raise BadInput(f"{path}: the run that --init names is not finished; train it first, or name another run or checkpoint")
    return path


def keep_list(path: str | None) -> frozenset[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such keep list; give a text file with one key a line")
    return frozenset(Path(path).read_text().split())


def measure(clip: CLIP, data: Data, threat: Threat | None, rank: int = 0, world: int = 1, workers: int = 0) -> dict[str, Any]:
    """All metrics that the data allow."""
    out: dict[str, Any] = {}
    for name in ("validation", "zero_shot"):
        if path := data.path(name):  # type: ignore[arg-type]
            out[name] = evaluate.zero_shot(clip, evaluate.open_set(path), threat, rank, world, workers, what=name)
    if path := data.path("retrieval"):
        out["retrieval"] = evaluate.retrieval(clip, shards.index(path, "skip"), threat, rank, world, workers)
    return out


def compare(metrics: dict[str, Any], reference: Recipe | str | None, threat: Threat | None) -> dict[str, Any]:
    """Adds the reference's attack success and the lift, if the reference was shown the same threat on the same images."""
    folder = reference.directory if isinstance(reference, Recipe) else Path(reference) if reference else None
    if folder is None or not (folder / "results.json").is_file():
        return metrics
    theirs = read_results(folder)
    if theirs.get("threat") != plain(threat):
        return metrics
    same = {name for name, m in metrics.items() if m.get("dataset") == theirs["metrics"].get(name, {}).get("dataset")}
    return {name: evaluate.against(m, theirs["metrics"][name]) if name in same else m for name, m in metrics.items()}


def finish(r: Recipe, clip: CLIP, accelerator: Accelerator, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Writes the model, examples for the report, and results.json: a record of schema 1."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    found = {"schema": 1, "name": r.name, "recipe": plain(r), "recipe_hash": recipe_hash(r), "seed": r.seed, "threat": plain(r.fires),
             "environment": environment(accelerator.num_processes, device), **more, "metrics": metrics}
    if accelerator.is_main_process:
        clip.save(r.directory)
        shown = r.data.path("zero_shot") or r.data.path("validation")
        shards.write_json(r.directory / "examples.json", evaluate.examples(clip, evaluate.open_set(shown), r.fires) if shown else [])
        shards.write_json(r.directory / "results.json", found)
        print(line(found), flush=True)
    accelerator.end_training()
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


def line(found: dict[str, Any]) -> str:
    """One line for the terminal."""
    m = found["metrics"].get("zero_shot") or found["metrics"].get("validation") or {}
    words = [f"{name} {100 * m[key]:.1f} %" for name, key in (("accuracy", "accuracy"), ("ASR", "asr"), ("reference ASR", "asr_reference"))
             if m.get(key) is not None]
    return f"{found['name']} (seed {found['seed']}): " + (", ".join(words) or "nothing measured: the recipe names no evaluation set")


def recorded_threat(known: dict[str, Any] | None) -> Threat | None:
    """The threat that a result was measured under."""
    return revive(known["threat"]) if known and known.get("threat") else None


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
