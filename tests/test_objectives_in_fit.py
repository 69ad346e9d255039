"""Every objective in the loop: its pace, its heads, its micro-batches, and what must survive when a run is killed within an epoch."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from torch import Tensor, nn

from mmbackdoor import clip, fit
from mmbackdoor.defenses.abd import ABD
from mmbackdoor.defenses.abl import ABL
from mmbackdoor.defenses.augmented import Augmented
from mmbackdoor.defenses.cbpt import CBPT
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.defenses.cleanerclip import CleanerCLIP
from mmbackdoor.defenses.compress import CompRess
from mmbackdoor.defenses.last_layer import LastLayer
from mmbackdoor.defenses.localized import LocalizedCropping
from mmbackdoor.defenses.par import PAR
from mmbackdoor.defenses.roclip import RoCLIP
from mmbackdoor.defenses.rvpt import RVPT
from mmbackdoor.defenses.safeclip import SafeCLIP
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.index import find
from mmbackdoor.losses import Bank, Clip
from mmbackdoor.stream import Stream
from mmbackdoor.types import Objective

STEPS = 4
"""Of an epoch: 60 pairs in batches of 15."""
SCHEDULE = fit.Schedule(epochs=4, lr=1e-3, warmup=3)
KEEPING: dict[str, Callable[[], Objective]] = {
    "RoCLIP matched": lambda: RoCLIP(every=1, bank=40),
    "RoCLIP every second epoch": lambda: RoCLIP(every=2, bank=40),
    "SafeCLIP": lambda: SafeCLIP(warmup=1, slow=1, bank=30, growth=0.05),
    "SLIP": lambda: SLIP(hidden=16, out=8, text=0.5),
    "localized SLIP": lambda: LocalizedCropping(SLIP(hidden=16, out=8)),
    "PAR": PAR,
    "ABD": ABD,
    "ABL": lambda: ABL(share=0.2, early=1),
    "CompRess": lambda: CompRess(anchors=40),
    "RVPT": lambda: RVPT(n=2),
    "CBPT": lambda: CBPT(("circle", "square", "triangle", "star", "cross", "ring"), words=2, steps=3),
}
"""Objectives that keep something beside the model. Their phases change from one epoch to the next."""
OTHERS: dict[str, Callable[[], Objective]] = {
    "CLIP": Clip, "CleanCLIP": CleanCLIP, "symmetric CleanCLIP": lambda: CleanCLIP(symmetric=True), "CleanerCLIP": CleanerCLIP,
    "Augmented": Augmented, "LastLayer": LastLayer, "local ABL": lambda: ABL(share=0.2, early=1, local=True),
}
EVERY = KEEPING | OTHERS


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> clip.CLIP:
    """The tiny model with a text tower that is smaller still, since there are many checkpoints to write."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY | {"text_cfg": TINY["text_cfg"] | {"width": 8}}))
    return clip.load(clip.Model(str(path)), seed=3)


@pytest.fixture(scope="module")
def stream(toy: Path, front: clip.CLIP) -> Callable[..., Stream]:
    """The stream of an objective's views of 60 pairs."""
    index = find(str(toy / "train/00000.tar"))
    keys = frozenset(sorted(index.keys())[:60])
    return lambda objective, batch=15: Stream(index.only(keys), front, objective.views, batch, keep=keys, lanes=5, seed=5)


@pytest.fixture
def train(stream: Callable[..., Stream], model: clip.CLIP, tmp_path: Path) -> Callable[..., Any]:
    def run(name: str, objective: Objective, schedule: fit.Schedule = SCHEDULE, batch: int = 15, **options: Any) -> tuple[nn.Module, Path]:
        net, data = replace(model, net=copy.deepcopy(model.net), card=copy.deepcopy(model.card)), stream(objective, batch)
        if options.get("resume") and (tmp_path / name / "checkpoints").exists():  # nothing may hang on what the process began with
            with torch.no_grad():
                net.net.logit_scale.add_(1)
                net.net.text_projection.mul_(2)
                net.net.visual.proj.neg_()
        fit.fit(net, objective, data, Accelerator(cpu=True), schedule, tmp_path / name, seed=7, **options)
        return net.net, tmp_path / name

    return run


def killed_after(steps: int, objective: Objective) -> Objective:
    """The objective, whose process is killed in the loss after so many."""
    left, loss = iter(range(steps)), objective.loss

    def counted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        if next(left, None) is None:
            raise Killed
        return loss(model, batch)

    objective.loss = counted  # type: ignore[method-assign]
    return objective


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values below a value, by the path to them."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from flat(v, f"{name}/{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from flat(v, f"{name}/{i}")
    else:
        yield name, value


def differences(a: Any, b: Any) -> list[str]:
    one, other = dict(flat(a)), dict(flat(b))
    alike = (torch.equal(x, other[k]) if isinstance(x, Tensor) else x == other[k] for k, x in one.items() if k in other)
    return sorted(one.keys() ^ other.keys()) + [k for k, same in zip((k for k in one if k in other), alike, strict=True) if not same]


def checkpoint(folder: Path) -> dict[str, Any]:
    """All of the last one but times and names."""
    state = torch.load(folder / "checkpoints/epoch_latest.pt", weights_only=True)
    return {k: v for k, v in state.items() if k not in ("name", "seconds")}


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


# ---- killed and resumed


@pytest.mark.parametrize("kind", KEEPING.values(), ids=KEEPING)
def test_killed_within_each_epoch_and_resumed_it_ends_with_all_that_an_unbroken_run_ends_with(kind, train):
    whole = kind()
    net, folder = train("whole", whole, save_steps=2)
    begun = 0
    for kill in (3, 7, 11, 15):  # each within another epoch, a step after a checkpoint
        with pytest.raises(Killed):
            train("broken", killed_after(kill - begun, kind()), save_steps=2, resume=True)
        state = checkpoint(folder.with_name("broken"))
        begun = kill - 1
        assert (state["global_step"], state["step"]) == (begun, 2)
    resumed = kind()
    again, broken = train("broken", resumed, save_steps=2, resume=True)
    assert not differences(net.state_dict(), again.state_dict())
    assert not differences(checkpoint(folder), checkpoint(broken)), "weights, optimizer, and what the objective keeps"
    assert not differences(whole.state_dict(), resumed.state_dict())
    assert dict(flat(whole.state_dict())) or isinstance(whole, RVPT), "what RVPT keeps are the frozen weights of the network"
    assert rows(folder) == rows(broken) and [row["epoch"] for row in rows(folder)] == [0, 1, 2, 3, 4]
    check_phases(whole, rows(folder)[1:])


def check_phases(objective: Objective, log: list[dict[str, Any]]) -> None:
    """The runs above would be alike too if nothing had happened in them."""
    if isinstance(objective, RoCLIP):
        assert [row["matched"] for row in log] == ([1, 1, 1, 1] if objective.every == 1 else [0, 1, 0, 1])
        assert len(objective.captions.rows) == 40
    if isinstance(objective, SafeCLIP):
        assert [row["safe"] for row in log[:2]] == [0, 1] and 0 < log[2]["safe"] < log[3]["safe"] < 1
        assert objective.split_for == 3 and all(len(bank.rows) == 30 for bank in objective.banks.values())
    if isinstance(objective, ABL):
        assert len(objective.isolated) == 12 and log[0]["isolated"] == 0 and all(row["isolated"] > 0 for row in log[1:])
    if isinstance(objective, ABD):
        assert float(objective.delta.detach().abs().max()) == pytest.approx(objective.epsilon, rel=1e-6)
    if isinstance(objective, CompRess):
        assert all(len(bank.rows) == 40 for bank in objective.banks.values())
    if isinstance(objective, PAR):
        assert 0 < log[0]["distance_image"] < log[3]["distance_image"]


# ---- pace


@dataclass(eq=False)
class Paced(Clip):
    def pace(self, epoch: int) -> float:
        return (1.0, 0.0, 0.5, 2.0)[epoch]


@pytest.mark.parametrize("kind, pace", [(Paced, (1.0, 0.0, 0.5, 2.0)), (KEEPING["SafeCLIP"], (1.0, 0.01, 1.0, 1.0)), (Clip, (1.0,) * 4)],
                         ids=["its own", "SafeCLIP's slow epochs", "none"])
def test_the_logged_learning_rate_is_the_schedules_times_the_pace(kind, pace, train):
    _, folder = train("run", kind())
    lasts = [SCHEDULE.lr_at(STEPS * (epoch + 1) - 1, 4 * STEPS) for epoch in range(4)]
    assert [row["lr"] for row in rows(folder)[1:]] == pytest.approx([p * lr for p, lr in zip(pace, lasts, strict=True)], rel=1e-12)


def test_localized_cropping_has_the_pace_of_its_objective():
    assert [LocalizedCropping(Paced()).pace(epoch) for epoch in range(4)] == [1.0, 0.0, 0.5, 2.0]


def test_the_pace_reaches_the_optimizer(train):
    _, folder = train("run", Paced(), save_frequency=1)
    states = [torch.load(folder / f"checkpoints/epoch_{i}.pt", weights_only=True)["state_dict"] for i in (1, 2, 3)]
    assert not differences(states[0], states[1]), "an epoch at a rate of 0"
    assert differences(states[1], states[2])


def test_the_pace_is_the_same_for_heads(train):
    class PacedSLIP(SLIP):
        pace = Paced.pace

    _, folder = train("run", PacedSLIP(hidden=16, out=8), save_frequency=1)
    states = [torch.load(folder / f"checkpoints/epoch_{i}.pt", weights_only=True)["objective"]["mlps"] for i in (1, 2, 3)]
    names = [k for k in states[0] if "running" not in k and "tracked" not in k]
    assert all(torch.equal(states[0][k], states[1][k]) for k in names) and any(not torch.equal(states[1][k], states[2][k]) for k in names)


# ---- heads


@pytest.mark.parametrize("name", ["SLIP", "localized SLIP"])
def test_heads_are_trained_in_every_layer_and_saved_with_the_objective_but_not_with_the_model(name, train, model):
    fresh, objective = EVERY[name](), EVERY[name]()
    fresh.setup(model)
    before = dict(fresh.heads().named_parameters())
    net, folder = train("run", objective, schedule=fit.Schedule(epochs=1, lr=1e-2, warmup=1))
    after = dict(objective.heads().named_parameters())
    assert before.keys() == after.keys() and all((before[k] - after[k]).abs().max() > 1e-3 for k in after)
    state = checkpoint(folder)
    assert not differences(state["objective"]["mlps"], dict(objective.heads().state_dict()))
    assert state["state_dict"].keys() == net.state_dict().keys()
    held = sum(map(len, (group["params"] for group in state["optimizer"]["param_groups"])))
    assert held == len(list(net.parameters())) + len(after)


def test_heads_decay_as_the_model_does_but_for_gains_and_biases(train):
    objective = SLIP(hidden=16, out=8)
    _, folder = train("run", objective, schedule=fit.Schedule(epochs=1, lr=1e-3, warmup=1, wd=0.3))
    decays = [(group["weight_decay"], len(group["params"])) for group in checkpoint(folder)["optimizer"]["param_groups"]]
    assert decays[2:] == [(0.0, 4), (0.3, 3)], "two batch norms, three matrices"


# ---- micro-batches


@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
def test_micro_batches_of_every_objective_give_the_mean_of_their_gradients_one_after_another(kind, stream, model):
    """In the second epoch, in which RoCLIP matches and ABL unlearns; two steps, the second with what the first left."""
    net, objective = replace(model, net=copy.deepcopy(model.net), card=copy.deepcopy(model.card)), kind()
    data = list(stream(objective, 30).batches(1))
    objective.setup(net)
    objective.start_epoch(net, lambda: data, 1)
    by_hand, hand = copy.deepcopy((net.net, objective))
    parts = [nn.ModuleList([n, *filter(None, [o.heads()])]) for n, o in ((net.net, objective), (by_hand, hand))]
    optimizers = [torch.optim.SGD([p for p in part.parameters() if p.requires_grad], 0.1) for part in parts]
    for batch in data:
        for piece in ({k: v[i::2] for k, v in batch.items()} for i in range(2)):
            (hand.loss(by_hand, piece)["loss"] / 2).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        before = copy.deepcopy(parts[0].state_dict())
        fit.update(net.net, objective, batch, optimizers[0], Accelerator(cpu=True), fit.Schedule(accum_freq=2))
        assert differences(before, parts[0].state_dict())
        for (name, a), b in zip(parts[0].named_parameters(), parts[1].parameters(), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-7), name
    assert differences(objective.state_dict(), hand.state_dict()) == []


@pytest.mark.parametrize("kind", EVERY.values(), ids=EVERY)
def test_every_objective_trains_in_micro_batches(kind, train):
    objective = kind()
    net, folder = train("run", objective, fit.Schedule(epochs=3, lr=1e-3, warmup=1, accum_freq=2), batch=30)
    log = rows(folder)
    assert [row["step"] for row in log] == [0, 2, 4, 6] and all(torch.isfinite(torch.tensor(row["loss"])) for row in log[1:])
    assert all(torch.isfinite(p).all() for p in net.parameters())
    for bank in banks(objective):
        assert len(bank.rows) == bank.size and torch.allclose(bank.rows.norm(dim=1), torch.ones(bank.size), atol=1e-5)


def banks(objective: Objective) -> list[Bank]:
    held = [objective.captions] if isinstance(objective, RoCLIP) else []
    return held + list(getattr(objective, "banks", {}).values())


@pytest.mark.parametrize("dtype, kept", [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_bank_keeps_rows_as_they_are_but_for_halves_and_gives_them_back_as_they_came(dtype, kept):
    bank = Bank(5)
    rows = nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(dtype), dim=1)
    for part in (rows[:3], rows[3:]):
        bank.push(part)
    assert bank.rows.dtype == kept and sorted(bank.rows.tolist()) == sorted(rows[3:].to(kept).tolist())
    assert torch.equal(bank.nearest(rows[3:]), rows[3:]) and bank.nearest(rows).dtype == dtype
