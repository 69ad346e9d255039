"""Evaluate a run or any checkpoint: zero-shot accuracy, attack success, retrieval, probes.

    accelerate launch eval.py runs/toy/badnets
    accelerate launch eval.py runs/toy/badnets --dataset data/toy/test --threat configs/toy/badnets.py --cache features
    accelerate launch eval.py somebody/elses/epoch_32.pt --model RN50 --dataset imagenet/val --threat configs/cc3m/badnets.py
    accelerate launch eval.py hf-hub:org/name --dataset 'hf:uoft-cs/cifar10?split=test' --retrieval coco --table results.csv

1 find the checkpoint, and the recipe when it is a run of ours   2 load the model, examine it   3 measure   4 write results.json
"""
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro

from mmbackdoor import clip, doctor, recipe, report, run, stores
from mmbackdoor.features import How
from mmbackdoor.types import BadInput


def beside(checkpoint: str) -> Path:
    """Where the numbers of a checkpoint go that has no results of its own; of each its own place."""
    path = Path(checkpoint.removeprefix("local-dir:"))
    if path.is_dir():
        return path / "evaluation.json"
    name = re.sub(r"[^\w.]+", "-", checkpoint).strip("-")
    return path.with_name(f"{path.stem}.evaluation.json") if path.is_file() else Path(f"{name}.evaluation.json")


def main(checkpoint: tyro.conf.Positional[str], dataset: str = "", retrieval: str = "", probe: str = "", threat: tuple[str, ...] = (),
         attack: bool = True, at: Literal["native", "input"] | None = None, reference: str = "", model: str = "",
         force_quick_gelu: bool = False, mean: tuple[float, float, float] | None = None, std: tuple[float, float, float] | None = None,
         index: Literal["exact", "ivf", "hnsw"] = "exact", cache: str = "", examine: bool = True, workers: int = 0,
         batch_size: int = 128, table: str = "", out: str = "") -> None:
    """Measures a checkpoint.

    Args:
        checkpoint: A run's directory, a checkpoint file, `hf:…` or `hf-hub:…`.
        dataset: Labelled set: CLIP_benchmark directory or URL, class folders, `hf:…` or data saved to disk, each with
            `?split=…&image=…&label=…&classnames=…&templates=…` where needed; default: those of the run's recipe, where no
            --retrieval is given either.
        retrieval: Images with captions: CLIP_benchmark retrieval directory or URL, shards of pairs, Hugging Face data;
            default: those of the run's recipe, where no --dataset is given either.
        probe: Labelled set to train a linear probe, k-NN and few-shot classifiers on; they are measured on --dataset.
        threat: Configs whose recipes name what to fire at the model, one or several; default: the recipe of the run.
        attack: Fire the threats; without, only clean numbers are measured.
        at: Stage at which the trigger meets the image, instead of the threat's own.
        reference: Run of a clean model, measured already, for `asr_reference` and `lift`.
        model: open_clip name of the network, for a checkpoint that comes without its config.
        force_quick_gelu: The checkpoint was trained with QuickGELU, as OpenAI's were.
        mean: Of the normalisation, red, green, blue, instead of the checkpoint's.
        std: Of the normalisation, instead of the checkpoint's.
        index: How retrieval searches; what an approximate index loses is printed.
        cache: Folder of features; those that are there for this model, set and threat are not computed again.
        examine: Try on some images whether the model is loaded as it was trained and whether the trigger arrives.
        workers: Loader processes.
        batch_size: Images that a process encodes at once.
        table: File to write the numbers to as well, one row a threat: .csv, .tex or .md.
        out: File to write; default: results.json of a run evaluated on its own sets, else evaluation.json in its directory; of a
            checkpoint file NAME.evaluation.json beside it, of a model of a hub the same here.
    """
    state = run.processes()  # 1
    how = How(state.process_index, state.num_processes, workers, batch_size, cache)
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    known = run.read_results(folder) if (folder / "results.json").is_file() else None
    threats = (run.threats_of(threat) or run.recorded_threats(known)) if attack else {}
    if not threat and known and threats and known.get("files", now := recipe.files(run.shown(threats))) != now:
        raise BadInput(f"{checkpoint}: its trigger's file is not the one that it was measured with; bring that back, or name a --threat")
    threats = {name: replace(t, at=at or t.at) for name, t in threats.items()}
    if not (clip.is_hf(checkpoint) or checkpoint.startswith("hf-hub:")):
        clip.find(checkpoint)
    if reference:
        run.read_results(reference)
    data = run.recorded_data(known, dataset, retrieval)
    if not (data.zero_shot or data.validation or data.retrieval):
        raise BadInput(f"{checkpoint}: no evaluation set is known for it; name one with --dataset or --retrieval")
    if probe and not data.zero_shot:
        raise BadInput("--probe: says what to train classifiers on; name the set to measure them on with --dataset")
    if table:
        report.writer(table)
    told = (dataset, retrieval, probe, threat, at, model, mean, std, force_quick_gelu, not attack, index != "exact")
    same = known is not None and not any(told)
    target = Path(out) if out else folder / "results.json" if same else beside(checkpoint)
    if not os.access(next(p for p in target.absolute().parents if p.exists()), os.W_OK):
        raise BadInput(f"{target}: cannot be written there; name another file with --out")
    sets = run.open_sets(data, threats, probe)

    changes = {"mean": mean, "std": std, "force_quick_gelu": force_quick_gelu}  # 2
    net = clip.load_run(checkpoint, clip.Model(model) if model else None, **changes)
    net.net.to(state.device)
    labelled = sets.zero_shot or sets.validation
    findings = doctor.examine(net, labelled, threats) if examine and labelled and state.is_main_process else []
    for finding in findings:
        print(f"warning: {finding.says}", file=sys.stderr)

    metrics = run.measure(net, sets, threats, how, target.parent / target.stem, index)  # 3
    metrics = run.compare(metrics, reference or run.recorded_reference(known), threats, sets, how)

    card = {"schema": 1, "name": str(checkpoint), "recipe": known and known["recipe"], "seed": known["seed"] if known else 0}  # 4
    measured = {**run.shown(threats), "metrics": metrics, "doctor": [finding.fault for finding in findings],
                "evaluated_by": recipe.environment(state.num_processes, state.device.type)}
    found = (known if known and same else card) | measured
    if state.is_main_process:
        stores.write_json(target, found)
        if table:
            report.write(table, report.each_threat(found))
        for name, kept in metrics.get("retrieval", {}).items():
            if name.endswith("_index_recall"):
                print(f"{name} {kept:.3f}: the share of exact neighbours that index {index} finds")
        print(f"{run.line(found)}, in {target}")


if __name__ == "__main__":
    recipe.command(main)
