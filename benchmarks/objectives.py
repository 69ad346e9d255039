"""What a step of each defense costs, as a multiple of a plain step of CLIP at the same batch.

    python benchmarks/objectives.py [--json] [--record results/objectives.json]
    python benchmarks/objectives.py --model RN50 --batch 16 --only cleanclip roclip par

A step is a loss, its gradient and AdamW on views that are made already. Bank and anchors are full, RoCLIP is in a matched epoch, SafeCLIP
past its warm-up. Objectives take turns; the median of the rounds. Beside them the two ways to look up the
nearest of RoCLIP's 21,845 rows: torch's product and argmax, and FAISS's exact index.
"""
import importlib
import inspect
import io
import json
import pkgutil
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator
from PIL import Image
from timing import medians, photographs

from mmbackdoor import clip, defenses, fit, losses, stores
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.losses import Bank
from mmbackdoor.recipe import command, environment
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput, Batch, Objective

CAPTIONS = "a dog on the beach", "portrait of a woman in a red hat", "a ripe banana on a table", "the skyline of a city at night"


def objectives() -> dict[str, Objective]:
    """Those of the defenses with the papers' numbers, and plain CLIP."""
    modules = [importlib.import_module(f"{defenses.__name__}.{found.name}") for found in pkgutil.iter_modules(defenses.__path__)]
    kinds = [k for m in modules for k in vars(m).values() if inspect.isclass(k) and issubclass(k, Objective) and k.__module__ == m.__name__]
    given: dict[str, dict[str, Any]] = {"LocalizedCropping": {"objective": SLIP()}, "CBPT": {"classes": ("dog", "banana", "city", "woman")}}
    return {"plain": losses.Clip()} | {k.__name__.lower(): k(**given.get(k.__name__, {})) for k in kinds}


def begun(objective: Objective, model: clip.CLIP, batch: Batch) -> None:
    """As it is in the middle of a training."""
    objective.setup(model)
    epoch = 1 if getattr(objective, "every", 0) else 6
    objective.start_epoch(model, lambda: [batch], epoch)
    for bank in (v for value in vars(objective).values() for v in (value.values() if isinstance(value, dict) else [value])):
        if isinstance(bank, Bank):
            bank.push(torch.nn.functional.normalize(torch.randn(bank.size, model.width, device=model.device), dim=1))


def step(name: str, objective: Objective, model: str, batch: int, accelerator: Accelerator) -> Callable[[], None]:
    """One step of an objective, on a model of its own."""
    mine = clip.load(clip.Model(model))
    size = max(mine.size)
    images = [Image.open(io.BytesIO(body)).convert("RGB").resize((size, size)) for body in photographs(16)]
    samples = [{"__key__": str(i), "image": images[i % 16], "text": CAPTIONS[i % 4]} for i in range(batch)]
    mine.net.to(accelerator.device).to(memory_format=torch.channels_last).train()
    views = collate(mine.front(), objective.views, samples, 0, 0)
    try:
        begun(objective, mine, views)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    optimizer = torch.optim.AdamW(fit.all_groups(mine.net, objective, 0.1, accelerator.device), lr=1e-6, fused=True)
    net, optimizer = accelerator.prepare(mine.net, optimizer)

    def run() -> None:
        fit.update(net, objective, views, optimizer, accelerator, fit.Schedule())
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    run()
    return run


def lookups(rows: int = 21_845, width: int = 1024, batch: int = 512) -> dict[str, Callable[[], object]]:
    """The nearest of RoCLIP's rows for a batch, in both ways; without FAISS in one."""
    bank, x = (torch.nn.functional.normalize(torch.randn(n, width), dim=1) for n in (rows, batch))
    found: dict[str, Callable[[], object]] = {"matmul": lambda: (x @ bank.T).argmax(1)}
    try:
        import faiss
    except ImportError:
        return found

    def by_index() -> object:
        index = faiss.IndexFlatIP(width)  # the bank changes with every step, so building belongs to it
        index.add(bank.numpy())
        return index.search(x.numpy(), 1)

    return found | {"faiss": by_index}


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False, model: str = "configs/toy/rn_tiny.json", batch: int = 128,
         only: tuple[str, ...] = (), rounds: int = 7, threads: int = 1, record: str = "") -> None:
    """Measures what defenses cost.

    Args:
        as_json: Print one object instead of lines.
        model: A name of open_clip or a JSON config. RVPT is measured on those with a ViT alone.
        batch: Pairs in a step.
        only: Objectives to measure, all by default; each holds a model, and plain CLIP is always measured.
        rounds: Of which the median is taken.
        threads: Of torch, on a CPU.
        record: File to write the measures and the environment to.
    """
    torch.set_num_threads(threads)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    steps, skipped = {}, {}
    there = objectives()
    if wrong := set(only) - set(there):
        raise BadInput(f"--only {min(wrong)}: no such objective; choose among {', '.join(there)}")
    for name, objective in there.items():
        if only and name not in (*only, "plain"):
            continue
        try:
            steps[name] = step(name, objective, model, batch, accelerator)
        except BadInput as error:
            skipped[name] = str(error)
    seconds = medians(rounds, time.perf_counter, **steps)
    found: dict[str, Any] = {f"{name}_over_plain": round(s / seconds["plain"], 3) for name, s in seconds.items() if name != "plain"}
    found |= {"plain_seconds": round(seconds["plain"], 4), "model": model, "batch": batch, "skipped": skipped}
    way = medians(rounds, time.perf_counter, **lookups())
    if "faiss" in way:
        found["bank_faiss_over_matmul"] = round(way["faiss"] / way["matmul"], 3)
    if record:
        stores.write_json(record, found | {"environment": environment(1, accelerator.device.type)})
    print(json.dumps(found) if as_json else "\n".join(f"{k}  {v}" for k, v in found.items()))


if __name__ == "__main__":
    command(main)
