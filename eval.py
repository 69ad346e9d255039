"""Evaluate a run or any checkpoint: zero-shot accuracy, attack success, retrieval.

    accelerate launch eval.py runs/toy/badnets
    accelerate launch eval.py runs/toy/badnets --dataset data/toy/test --threat configs/toy/badnets.py
    accelerate launch eval.py somebody/elses/epoch_32.pt --model RN50 --dataset imagenet/val --threat configs/cc3m/badnets.py

1 find the checkpoint, and the recipe when it is a run of ours   2 load the model   3 measure   4 write results.json
"""
from pathlib import Path
from typing import Literal

import tyro

from mmbackdoor import clip, recipe, run, shards
from mmbackdoor.types import BadInput


def main(checkpoint: tyro.conf.Positional[str], dataset: str = "", retrieval: str = "", threat: str = "",
         at: Literal["native", "input"] | None = None, reference: str = "", model: str = "", force_quick_gelu: bool = False,
         workers: int = 0, out: str = "") -> None:
    """Measures a checkpoint.

    Args:
        checkpoint: A run's directory, a checkpoint file, `hf:…` or `hf-hub:…`.
        dataset: Labelled set (CLIP_benchmark directory or class folders); default: those of the run's recipe.
        retrieval: Shards of pairs for retrieval; default: those of the run's recipe.
        threat: Config whose recipe names what to fire at the model; default: the recipe of the run.
        at: Stage at which the trigger meets the image, instead of the threat's own.
        reference: Run of a clean model, measured already, for `asr_reference` and `lift`.
        model: open_clip name of the network, for a checkpoint that comes without its config.
        force_quick_gelu: The checkpoint was trained with QuickGELU, as OpenAI's were.
        workers: Loader processes.
        out: File to write; default: results.json of a run evaluated on its own sets, else evaluation.json beside the checkpoint.
    """
    state = run.processes()  # 1
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    known = run.read_results(folder) if (folder / "results.json").is_file() else None
    fired = recipe.load(threat).fires if threat else run.recorded_threat(known)
    if threat and fired is None:
        raise BadInput(f"{threat}: its recipe has neither poison nor threat; name one that does")
    if fired and at:
        fired = recipe.replace(fired, at=at)
    if not (clip.is_hf(checkpoint) or checkpoint.startswith("hf-hub:")):
        clip.find(checkpoint)
    if reference:
        run.read_results(reference)
    data = run.recorded_data(known, dataset, retrieval)
    if not (data.zero_shot or data.validation or data.retrieval):
        raise BadInput(f"{checkpoint}: no evaluation set is known for it; name one with --dataset or --retrieval")

    spec = clip.Model(model, force_quick_gelu=force_quick_gelu) if model else None  # 2
    net = clip.load_run(checkpoint, spec)
    net.net.to(state.device)

    metrics = run.measure(net, data, fired, state.process_index, state.num_processes, workers)  # 3
    metrics = run.compare(metrics, reference or run.recorded_reference(known), fired)

    same = known is not None and not (dataset or retrieval or threat or at or model)  # 4
    card = {"schema": 1, "name": str(checkpoint), "recipe": known and known["recipe"], "seed": known["seed"] if known else 0}
    measured = {"threat": recipe.plain(fired), "metrics": metrics,
                "evaluated_by": recipe.environment(state.num_processes, state.device.type)}
    found = (known if known and same else card) | measured
    target = Path(out) if out else folder / ("results.json" if same else "evaluation.json")
    if state.is_main_process:
        shards.write_json(target, found)
        print(f"{run.line(found)}, in {target}")


if __name__ == "__main__":
    recipe.command(main)
