"""Run by test_distributed.py under torchrun: one program, as many processes as it is told, results by rank 0."""
import copy
import json
import sys
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator

from mmbackdoor import clip, run, shards
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.defenses.abd import ABD
from mmbackdoor.defenses.abl import ABL
from mmbackdoor.defenses.augmented import Augmented
from mmbackdoor.defenses.cbpt import CBPT
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.defenses.cleanerclip import CleanerCLIP
from mmbackdoor.defenses.compress import CompRess
from mmbackdoor.defenses.fine_pruning import FinePruning
from mmbackdoor.defenses.last_layer import LastLayer
from mmbackdoor.defenses.localized import LocalizedCropping
from mmbackdoor.defenses.par import PAR
from mmbackdoor.defenses.roclip import RoCLIP
from mmbackdoor.defenses.rvpt import RVPT
from mmbackdoor.defenses.safeclip import SafeCLIP
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.features import How
from mmbackdoor.fit import Schedule, check_in_step, fit, groups
from mmbackdoor.index import find
from mmbackdoor.losses import Clip, SigLip, gather, gather_list, info_nce
from mmbackdoor.poison import plan, poison
from mmbackdoor.recipe import Data, Recipe
from mmbackdoor.sets import open_set
from mmbackdoor.stream import Stream
from mmbackdoor.types import Objective

TOY, MODEL, OUT = (Path(a) for a in sys.argv[1:4])
RESNET = Path(__file__).parent.parent / "configs/toy/rn_tiny.json"
GLOBAL = 48


class PastTheWrapper(Objective):
    """The mistake that `check_in_step` is for: the loss bypasses the wrapped forward."""

    def loss(self, model, batch):
        inner = getattr(model, "module", model)
        x, t = inner.encode_image(batch["image"], normalize=True), inner.encode_text(batch["text"], normalize=True)
        return {"loss": info_nce(x, t, inner.logit_scale.exp())}


OBJECTIVES = {  # with the epoch whose beginning is looked at
    "clip": (Clip, 0), "siglip": (SigLip, 0), "siglip cleaned": (CleanCLIP, 0),
    "cleanclip": (CleanCLIP, 0), "cleanclip symmetric": (partial(CleanCLIP, symmetric=True), 0),
    "cleanerclip": (CleanerCLIP, 0), "augmented": (Augmented, 0), "last layer": (LastLayer, 0), "par": (PAR, 0), "abd": (ABD, 0),
    "abl": (partial(ABL, share=0.2), 0), "abl local": (partial(ABL, share=0.2, local=True), 0),
    "compress": (partial(CompRess, anchors=80), 0), "slip": (partial(SLIP, hidden=16, out=8, text=0.5), 0),
    "localized slip": (lambda: LocalizedCropping(SLIP(hidden=16, out=8)), 0),
    "roclip plain": (partial(RoCLIP, bank=80), 0), "roclip matched": (partial(RoCLIP, bank=80), 1),
    "safeclip unimodal": (partial(SafeCLIP, warmup=1, bank=80), 0), "safeclip slow": (partial(SafeCLIP, warmup=1, bank=80), 1),
    "safeclip mixed": (partial(SafeCLIP, warmup=1, bank=80), 2),
    "rvpt": (partial(RVPT, n=2), 0), "cbpt": (partial(CBPT, ("circle", "square", "triangle", "star", "cross", "ring"), steps=3), 0),
}


@cache
def loaded(siglip):
    return clip.load(clip.Model(str(MODEL), siglip=siglip), seed=1)


def fresh(siglip=False):
    """The model before any training."""
    return replace(loaded(siglip), net=copy.deepcopy(loaded(siglip).net), card=copy.deepcopy(loaded(siglip).card))


def in_double(batch):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def told(value):
    """What a state holds, as JSON: of each tensor its shape, its norm and a sample of its numbers."""
    if isinstance(value, torch.Tensor):
        x = value.detach().double().flatten()
        return [list(value.shape), float(x.norm()), x[:: max(1, len(x) // 100)].tolist()]
    return {k: told(v) for k, v in value.items()} if isinstance(value, dict) else value


def gradients(accelerator, objective, epoch, siglip):
    """Two steps at the beginning of an epoch, each process holding its share of the rows: both losses, the gradients of the second, for
    which the model and the objective have changed, and what each process then keeps.

    In double precision, so that only a wrong gradient can differ."""
    net = fresh(siglip)
    net.net.double()
    objective.setup(net)
    heads = objective.heads().double() if objective.heads() is not None else torch.nn.Module()
    stream = Stream(find(str(TOY / "train")), net, objective.views, GLOBAL // accelerator.num_processes, rank=accelerator.process_index,
                    world=accelerator.num_processes, workers=0)
    objective.start_epoch(net, lambda: map(in_double, stream.batches(epoch)), epoch)
    model = accelerator.prepare(net.net.train())
    both = torch.nn.ModuleDict({"net": net.net, "heads": heads})
    free = {k: p for k, p in both.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.SGD(free.values(), 0.1), []
    for batch in map(in_double, islice(stream.batches(epoch), 2)):
        if losses:
            optimizer.step()
        optimizer.zero_grad()
        out = objective.loss(model, batch)
        accelerator.backward(out["loss"])
        losses.append({k: float(accelerator.reduce(v.detach().double(), "mean")) for k, v in out.items()})
    each = gather_list([{"state": told(objective.state_dict()), "buffers": told(dict(heads.named_buffers())),
                         "heads": {k: told(p.grad) for k, p in free.items() if k.startswith("heads.")}}])
    return {"losses": losses, "grads": {k: told(p.grad) for k, p in free.items()}, "each": each}


def edited(accelerator):
    """What each process holds after an edit that looks at the data."""
    net = fresh()
    r = Recipe("edited", Data(str(TOY / "train")), edit=FinePruning(pairs=100), batch_size=30, workers=0)
    return gather_list([told(run.edited(r, net, find(r.data.train), []).net.state_dict())])


def training(accelerator, folder):
    """Two epochs of poisoned training; returns the log, the keys seen by all processes and a digest of the weights."""
    net = fresh()
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


def statistics(accelerator, folder):
    """What each process's batch norm holds after an epoch, and what is saved of it."""
    net = clip.load(clip.Model(str(RESNET)), seed=1)
    stream = Stream(find(str(TOY / "train")), net, Clip().views, GLOBAL // accelerator.num_processes, rank=accelerator.process_index,
                    world=accelerator.num_processes, workers=0)
    fit(net, Clip(), stream, accelerator, Schedule(epochs=1, lr=1e-3, warmup=2), folder)
    saved = clip.load_run(folder).net
    return gather_list([[told(dict(n.named_buffers())) for n in (net.net, saved)]])


def evaluation(accelerator, folder):
    """Every number of sets of odd sizes, under two threats, computed, then cached, then read."""
    net = fresh()
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


def shared_gradient(accelerator):
    """The gradients of two gathered tensors that are added, and so are handed one and the same."""
    a, b = (torch.ones(2, 1, dtype=torch.double, requires_grad=True) for _ in range(2))
    rows = gather(a) + gather(b)
    (rows[:, 0] @ torch.arange(len(rows), dtype=torch.double)).backward()
    return gather_list([[x.grad.flatten().tolist() for x in (a, b)]])


def out_of_step(accelerator):
    net = fresh()
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
    found = {"world": accelerator.num_processes, "edited": edited(accelerator),
             "objectives": {name: gradients(accelerator, kind(), epoch, "siglip" in name) for name, (kind, epoch) in OBJECTIVES.items()},
             "training": training(accelerator, OUT.parent / f"run{accelerator.num_processes}"),
             "shared_gradient": shared_gradient(accelerator),
             "statistics": statistics(accelerator, OUT.parent / f"resnet{accelerator.num_processes}"),
             "evaluation": evaluation(accelerator, OUT.parent / f"sets{accelerator.num_processes}"),
             "out_of_step": out_of_step(accelerator)}
    if accelerator.is_main_process:
        OUT.write_text(json.dumps(found))
    accelerator.end_training()
