"""Run by test_distributed.py under torchrun: one program, as many processes as it is told, results by rank 0."""
import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from mmbackdoor import clip, run, shards
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.features import How
from mmbackdoor.fit import Schedule, check_in_step, fit, groups
from mmbackdoor.index import find
from mmbackdoor.losses import Clip, SigLip, info_nce
from mmbackdoor.poison import plan, poison
from mmbackdoor.recipe import Data
from mmbackdoor.sets import open_set
from mmbackdoor.stream import Stream
from mmbackdoor.types import Objective

TOY, MODEL, OUT = (Path(a) for a in sys.argv[1:4])
GLOBAL = 48


class PastTheWrapper(Objective):
    """The mistake that `check_in_step` is for: the loss bypasses the wrapped forward."""

    def loss(self, model, batch):
        inner = getattr(model, "module", model)
        x, t = inner.encode_image(batch["image"], normalize=True), inner.encode_text(batch["text"], normalize=True)
        return {"loss": info_nce(x, t, inner.logit_scale.exp())}


def gradients(accelerator, objective, siglip=False):
    """Loss and gradients of one global batch, each process holding its share of the rows."""
    net = clip.load(clip.Model(str(MODEL), siglip=siglip), seed=1)
    index = find(str(TOY / "train"))
    stream = Stream(index, net, objective.views, GLOBAL // accelerator.num_processes, rank=accelerator.process_index,
                    world=accelerator.num_processes, workers=0)
    model = accelerator.prepare(net.net.double())  # in double precision, so that only a wrong gradient can differ
    batch = {k: v.double() if k.startswith("image") else v for k, v in next(stream.batches(0)).items()}
    loss = objective.loss(model, batch)["loss"]
    accelerator.backward(loss)
    small = {k: p for k, p in net.net.named_parameters() if p.grad is not None and p.numel() < 200_000}
    loss = float(accelerator.reduce(loss.detach(), "mean"))
    return {"loss": loss, "grads": {k: p.grad.flatten().tolist()[:2000] for k, p in small.items()}}


def training(accelerator, folder):
    """Two epochs of poisoned training; returns the log, the keys seen by all processes and a digest of the weights."""
    net = clip.load(clip.Model(str(MODEL)), seed=1)
    index = find(str(TOY / "train"))
    attack = badnets("red star", rate=0.05)
    truth = plan(attack, index, 0)
    stream = Stream(index, net, Clip().views, GLOBAL // accelerator.num_processes, [partial(poison, attack=attack, plan=truth)],
                    rank=accelerator.process_index, world=accelerator.num_processes, workers=1)
    seen = [key for batch in stream.batches(0) for key in batch["key"]]
    fit(net, Clip(), stream, accelerator, Schedule(epochs=2, lr=1e-3, warmup=2), folder)
    seen = accelerator.gather_for_metrics(seen, use_gather_object=True) if accelerator.num_processes > 1 else seen
    return {"plan": sorted(truth.keys), "seen": sorted(seen), "log": [json.loads(line) for line in open(folder / "log.jsonl")],
            "weights": float(sum(p.double().abs().sum() for p in net.net.parameters()))}


def evaluation(accelerator, folder):
    """Every number of sets of odd sizes, under two threats, computed, then cached, then read."""
    net = clip.load(clip.Model(str(MODEL)), seed=1)
    attack = badnets("red star")
    threats = {"corner": attack.threat, "input": replace(attack.threat, at="input")}
    how = How(accelerator.process_index, accelerator.num_processes, batch=8)
    kept = replace(how, cache=str(folder / "cache"))
    out = {}
    for n in (1, 7, 8, 9, 16, 49):
        raws = [raw for url in shards.expand(str(TOY / "test/test")) for raw in shards.read_raw(url)]
        others = [raw for raw in raws if int(raw["cls"]) != open_set(TOY / "test").target(attack.target)]
        if accelerator.is_main_process:
            shards.write_eval_set(folder / str(n), others[:n], open_set(TOY / "test").classnames, ("a photo of a {c}",))
        accelerator.wait_for_everyone()
        out[n] = [run.measure(net, run.open_sets(Data("", zero_shot=str(folder / str(n))), threats), threats, h)["zero_shot"]
                  for h in (how, kept, kept)]
    sets = run.open_sets(Data("", zero_shot=str(TOY / "test"), retrieval=str(TOY / "pairs")), threats, f"{TOY}/val?split=test")
    out["all"] = run.measure(net, sets, threats, how, folder / "tables")
    out["tables"] = {p.name: p.read_text() for p in sorted((folder / "tables").iterdir())} if accelerator.is_main_process else {}
    return out


def out_of_step(accelerator):
    net = clip.load(clip.Model(str(MODEL)), seed=1)
    objective = PastTheWrapper()
    stream = Stream(find(str(TOY / "train")), net, objective.views, 8, rank=accelerator.process_index,
                    world=accelerator.num_processes)
    model = accelerator.prepare(copy.deepcopy(net.net))
    optimizer = torch.optim.SGD(groups(accelerator.unwrap_model(model), 0.0), lr=0.1)
    accelerator.backward(objective.loss(model, next(stream.batches(0)))["loss"] + 100 * accelerator.process_index * sum(
        p.sum() for p in accelerator.unwrap_model(model).parameters()))
    optimizer.step()
    try:
        check_in_step(accelerator.unwrap_model(model), objective, accelerator)
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = {"world": accelerator.num_processes, "clip": gradients(accelerator, Clip()), "cleanclip": gradients(accelerator, CleanCLIP()),
             "siglip": gradients(accelerator, SigLip(), siglip=True),
             "training": training(accelerator, OUT.parent / f"run{accelerator.num_processes}"),
             "evaluation": evaluation(accelerator, OUT.parent / f"sets{accelerator.num_processes}"),
             "out_of_step": out_of_step(accelerator)}
    if accelerator.is_main_process:
        OUT.write_text(json.dumps(found))
    accelerator.end_training()
