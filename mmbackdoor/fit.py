"""The one training loop: any objective, any number of processes, resumable to the step."""
from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from . import keyed
from .clip import CARD, CLIP
from .losses import from_first, gather_list
from .stores import replacing, write_json
from .stream import Stream
from .types import BadInput, Batch, Objective

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to zero; the defaults are open_clip's."""

    epochs: int = 32
    lr: float = 5e-4
    wd: float = 0.2
    warmup: int = 10_000
    """Steps."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    grad_clip_norm: float | None = None
    accum_freq: int = 1
    """Micro-batches per step. Negatives come from the micro-batch; a larger --batch-size is the better choice."""

    def lr_at(self, step: int, steps: int) -> float:
        """The rate of step 0, 1, … of `steps`: a pure function, so that nothing about it has to be resumed."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, steps - self.warmup)))


@dataclass
class Progress:
    """Where a run stands; saved with its weights."""

    epoch: int = 0
    """Epochs that are complete."""
    step: int = 0
    """Steps done in the epoch under way."""
    global_step: int = 0
    samples_seen: int = 0
    skipped: int = 0
    """Images that could not be decoded and were left out, counted anew every epoch."""
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    """Of what the objective returned in the epoch under way, each the mean over processes."""


def groups(net: nn.Module, wd: float) -> list[dict[str, Any]]:
    """open_clip's two groups: no decay for gains, biases, normalisation and the logit scale."""
    free: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, p in net.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
            (free if plain else decayed).append(p)
    return [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": wd}]


def all_groups(net: nn.Module, objective: Objective, wd: float, device: torch.device) -> list[dict[str, Any]]:
    """Those of the network and of the heads that an objective trains along, which are moved to the device."""
    heads = objective.heads()
    return groups(net, wd) + ([] if heads is None else groups(heads.to(device), wd))


def fit(clip: CLIP, objective: Objective, stream: Stream, accelerator: Accelerator, schedule: Schedule, folder: Path, *,
        resume: bool = False, save_frequency: int = 0, save_steps: int = 0, seed: int = 0,
        each_epoch: Callable[[int], dict[str, Any]] = lambda epoch: {}) -> Progress:
    """Trains `clip.net` in place and returns what it took.

    Writes folder/checkpoints/epoch_latest.pt after every epoch (and every `save_steps` steps, and epoch_N.pt every
    `save_frequency` epochs) and a line of folder/log.jsonl per epoch: means of what the objective returned, and what
    `each_epoch(epoch)` measured (epoch 0 is the model before training). `stream.batch_size` is that of one step, all
    its micro-batches together. A run that is killed and resumed ends with the weights of an unbroken one (on CPU; on
    GPU up to the order of its sums).
    """
    clip.net.to(accelerator.device).to(memory_format=torch.channels_last)  # a sixth faster for convolutions on a CPU
    peak_memory(reset=True)
    objective.setup(clip)
    if accelerator.is_main_process:
        write_json(folder / CARD, clip.card)  # without which a checkpoint of a run under way is not loaded
    optimizer = torch.optim.AdamW(all_groups(clip.net, objective, schedule.wd, accelerator.device), lr=schedule.lr,
                                  betas=(schedule.beta1, schedule.beta2), eps=schedule.eps, fused=True)
    model, optimizer = accelerator.prepare(clip.net, optimizer)
    net = accelerator.unwrap_model(model)
    shape = {"global batch": stream.batch_size * stream.world, "lanes": stream.lanes}
    done = load(folder, net, optimizer, objective, accelerator, shape) if resume else Progress()
    log = Log(folder / "log.jsonl", done, accelerator)
    if not done.global_step:
        log.write({"epoch": 0, "step": 0} | each_epoch(0))
    steps = schedule.epochs * len(stream)
    pairs = stream.batch_size * stream.world
    bar = tqdm(total=steps * pairs, initial=done.global_step * pairs, desc="train", unit="pair", unit_scale=True,
               disable=None if accelerator.is_main_process else True)
    for epoch in range(done.epoch, schedule.epochs):
        began, sums = time.monotonic(), Means(accelerator, done)
        objective.start_epoch(clip, lambda epoch=epoch: stream.batches(epoch), epoch)  # type: ignore[misc]
        model.train()
        for batch in stream.batches(epoch, start=done.step):
            skipped = torch.tensor(float(len(batch.pop("skipped", ()))), device=accelerator.device)
            seed_step(keyed.integer(seed, "step", str(done.global_step), str(accelerator.process_index)))
            for group in optimizer.param_groups:
                group["lr"] = lr = objective.pace(epoch) * schedule.lr_at(done.global_step, steps)
            sums.add(update(model, objective, batch, optimizer, accelerator, schedule) | {"undecodable": skipped})
            with torch.no_grad():
                net.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            done.step, done.global_step, done.samples_seen = done.step + 1, done.global_step + 1, done.samples_seen + pairs
            if done.global_step == 1:
                check_in_step(net, objective, accelerator)
            bar.set_description(f"epoch {epoch + 1}/{schedule.epochs}", refresh=False)
            bar.update(pairs)
            if save_steps and done.global_step % save_steps == 0 and done.step < len(stream):
                now = time.monotonic()
                done.seconds, began, done.sums = done.seconds + now - began, now, sums.means()
                save(folder, ["epoch_latest.pt"], net, optimizer, objective, done, accelerator, shape)
        check_in_step(net, objective, accelerator)
        from_first(net.buffers())  # each process has its own running statistics of its last batch; the first one's are saved
        took = time.monotonic() - began
        done.epoch, done.step, done.seconds, done.sums = epoch + 1, 0, done.seconds + took, {}
        numbers = {k: v / len(stream) for k, v in sums.means().items()}
        done.skipped += (skips := round(numbers.pop("undecodable") * len(stream) * stream.world))
        numbers |= {"undecodable": skips} if skips else {}
        finite(numbers, epoch + 1)
        model.eval()
        log.write({"epoch": epoch + 1, "step": done.global_step, "lr": lr, "seconds": round(took, 3)} | numbers | each_epoch(epoch + 1))
        names = ["epoch_latest.pt"] + [f"epoch_{epoch + 1}.pt"] * bool(save_frequency and (epoch + 1) % save_frequency == 0)
        save(folder, names, net, optimizer, objective, done, accelerator, shape)
    bar.close()
    clip.net.eval()
    return done


def seed_step(seed: int) -> None:
    """What a network draws in a step, dropout say, depends on the step alone."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def update(model: nn.Module, objective: Objective, batch: Batch, optimizer: Any, accelerator: Accelerator,
           schedule: Schedule) -> dict[str, Tensor]:
    """One optimizer step over all micro-batches of a batch."""
    n = schedule.accum_freq
    pieces = [{k: v[i::n] for k, v in batch.items()} for i in range(n)]
    sums: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        piece = {k: v.to(accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in piece.items()}
        with accelerator.no_sync(model) if i < n - 1 else nullcontext():
            out = objective.loss(model, piece)  # the prepared forward casts and returns float32; the loss itself stays in it
            accelerator.backward(out["loss"] / n)
        sums = {k: sums.get(k, 0) + v.detach() / n for k, v in out.items()}
    if schedule.grad_clip_norm:
        accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], schedule.grad_clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return sums


class Means:
    """Running sums of what an objective logs over the steps of an epoch, averaged over processes when asked."""

    def __init__(self, accelerator: Accelerator, done: Progress):
        self.accelerator = accelerator
        self.sums = {k: torch.tensor(v, device=accelerator.device) for k, v in done.sums.items()}

    def add(self, values: dict[str, Tensor]) -> None:
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0) + v.float()

    def means(self) -> dict[str, float]:
        return {k: float(self.accelerator.reduce(v, "mean")) for k, v in self.sums.items()}


def finite(numbers: dict[str, float], epoch: int) -> None:
    if not math.isfinite(numbers.get("loss", 0.0)):
        raise BadInput(f"the loss of epoch {epoch} is {numbers['loss']}: training diverged; lower --lr, lengthen --warmup, or set "
                       "--grad-clip-norm 1")


def logged(text: str) -> list[dict[str, Any]]:
    """Log lines by epoch. A killed run leaves a torn line, a resumed one repeats epochs: the last word counts."""
    rows: dict[float, dict[str, Any]] = {}
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows[float(row["epoch"])] = row
    return [rows[epoch] for epoch in sorted(rows)]


class Log:
    """log.jsonl, the same for people in out.log, and the trackers when there are any."""

    def __init__(self, path: Path, done: Progress, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = logged(path.read_text()) if path.is_file() and done.global_step else []
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in old if row["epoch"] <= done.epoch))

    def write(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            shown = " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, (int, float)))
            tqdm.write(shown)
            with open(self.path.with_name("out.log"), "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shown}\n")
        self.accelerator.log({f"train/{k}": v for k, v in row.items() if isinstance(v, (int, float))}, step=row["step"])


def check_in_step(net: nn.Module, objective: Objective, accelerator: Accelerator) -> None:
    """All processes must hold the same weights; they drift when a loss goes past the wrapped forward, or shows heads rows of its own."""
    if accelerator.num_processes == 1:
        return
    heads = objective.heads()
    total = sum(p.detach().double().abs().sum() for part in (net, heads) if part is not None for p in part.parameters())
    sums = accelerator.gather(torch.as_tensor(total).reshape(1))
    if float(sums.max() - sums.min()) > 1e-6 * float(sums.max()):
        raise RuntimeError(f"{type(objective).__name__}: the processes hold different weights; its loss must call "
                           "model(image, text), not model.module or an encoder of it")


def save(folder: Path, names: list[str], net: nn.Module, optimizer: Any, objective: Objective, done: Progress,
         accelerator: Accelerator, shape: dict[str, int]) -> None:
    """Checkpoints of tensors and plain values, which open_clip loads by path."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"name": folder.name, "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(),
                 "objective": objective.state_dict(), "shape": shape, **vars(done)}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        for name in names:
            with replacing(folder / "checkpoints" / name) as temporary:
                torch.save(state, temporary)
    accelerator.wait_for_everyone()


def load(folder: Path, net: nn.Module, optimizer: Any, objective: Objective, accelerator: Accelerator,
         shape: dict[str, int]) -> Progress:
    """Restores the newest checkpoint of a run; a run that has none yet starts from the beginning. The run goes on in the `shape` in which
    it was begun: what decides the batches, besides the recipe."""
    path = folder / "checkpoints" / "epoch_latest.pt"
    if len(set(gather_list([path.is_file()]))) > 1:
        raise BadInput(f"{path}: some of the processes do not see it; runs must lie on a disk that all machines share")
    if not path.is_file():
        return Progress()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, KeyError, EOFError, ValueError) as error:
        what = re.sub(r"\s+", " ", str(error))[:120]
        raise BadInput(f"{path}: cannot be resumed by this recipe ({what}); remove {folder} to start again") from error
    if (begun := state.get("shape", shape)) != shape:
        told = [", ".join(f"{k} {v}" for k, v in of.items()) for of in (begun, shape)]
        raise BadInput(f"{path}: was begun with {told[0]}, not {told[1]}; go on with as many processes and --workers as then")
    objective.load_state_dict(state["objective"])
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Progress(**{k: state[k] for k in vars(Progress())})


def peak_memory(reset: bool = False) -> int | None:
    """MiB: of the GPU where there is one, else resident in this process; since it was last reset, where Linux can."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return round(torch.cuda.max_memory_allocated() / 2**20)
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) // 1024
    return None


def cost(done: Progress) -> dict[str, Any]:
    """The `cost` part of a result."""
    return {"train_seconds": round(done.seconds, 2), "samples_seen": done.samples_seen,
            "samples_per_second": round(done.samples_seen / max(done.seconds, 1e-9), 1), "peak_memory_mb": peak_memory()}
