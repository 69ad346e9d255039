"""The loop: schedule, weight decay, accumulation, logs, checkpoints, and a killed run that ends as an unbroken one."""
import copy
import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import Accelerator

from mmbackdoor import clip, fit, shards
from mmbackdoor.index import find
from mmbackdoor.losses import Clip
from mmbackdoor.stream import Stream
from mmbackdoor.types import BadInput

SCHEDULE = fit.Schedule(epochs=3, lr=1e-3, warmup=3)


class Killed(Exception):
    pass


class Counting(Clip):
    """Keeps state that must survive a restart, and can be killed at a step."""

    def __init__(self, kill_at=None):
        self.count, self.kill_at = torch.zeros(()), kill_at

    def loss(self, model, batch):
        if self.kill_at is not None and int(self.count) == self.kill_at:
            raise Killed
        self.count += 1
        return super().loss(model, batch) | {"count": self.count.clone()}

    def state_dict(self):
        return {"count": self.count.clone()}

    def load_state_dict(self, state):
        self.count = state["count"].clone()


@pytest.fixture
def train(toy, tiny_model, tmp_path):
    def run(name="run", objective=None, batch=32, schedule=SCHEDULE, workers=0, **options):
        net = clip.load(clip.Model(str(tiny_model)), seed=3)
        stream = Stream(find(str(toy / "train")), net, Clip.views, batch, workers=workers, seed=5)
        done = fit.fit(net, objective or Clip(), stream, Accelerator(cpu=True), schedule, tmp_path / name, seed=7, **options)
        return net.net.state_dict(), done, tmp_path / name

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kill_at, save_steps", [(13, 0), (13, 2), (0, 0), (5, 3)], ids=["epoch", "within", "at once", "first epoch"])
def test_killed_and_resumed_ends_with_the_weights_of_an_unbroken_run(train, kill_at, save_steps):
    whole, done, whole_folder = train("whole", Counting(), save_steps=save_steps)
    with pytest.raises(Killed):
        train("broken", Counting(kill_at), save_steps=save_steps)
    resumed, redone, folder = train("broken", Counting(), save_steps=save_steps, resume=True)
    assert same(whole, resumed)
    assert (done.global_step, done.samples_seen) == (redone.global_step, redone.samples_seen)
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole_folder, folder)]
    for row in logs[0] + logs[1]:
        row.pop("seconds", None)
    assert logs[0] == logs[1] and [row["epoch"] for row in logs[0]] == [0, 1, 2, 3]


def test_resuming_a_finished_run_changes_nothing(train):
    whole, _, _ = train()
    again, _, _ = train(resume=True)
    assert same(whole, again)


def test_loader_workers_do_not_change_the_weights(train):
    assert same(train("a", workers=0)[0], train("b", workers=2)[0])


def test_same_seed_same_weights(train):
    assert same(train("a")[0], train("b")[0])


def test_learning_rate_is_warmed_up_then_a_cosine_to_zero():
    s = fit.Schedule(lr=1.0, warmup=10)
    assert s.lr_at(0, 110) == pytest.approx(0.1) and s.lr_at(9, 110) == pytest.approx(1.0)
    assert s.lr_at(60, 110) == pytest.approx(0.5) and s.lr_at(109, 110) < 1e-3
    assert s.lr_at(35, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("name", ["RN50", "ViT-S-32"])
def test_no_decay_groups_are_those_of_open_clip(name):
    net = open_clip.create_model(name)
    free, decayed = (set(map(id, g["params"])) for g in fit.groups(net, 0.2))
    for key, p in net.named_parameters():
        plain = p.ndim < 2 or "bn" in key or "ln" in key or "bias" in key or "logit_scale" in key
        assert (id(p) in free, id(p) in decayed) == (plain, not plain)
    assert [g["weight_decay"] for g in fit.groups(net, 0.2)] == [0.0, 0.2]


def test_logit_scale_is_clamped_at_100(toy, tiny_model, tmp_path):
    net = clip.load(clip.Model(str(tiny_model)))
    with torch.no_grad():
        net.net.logit_scale.fill_(20.0)
    stream = Stream(find(str(toy / "train")), net, Clip.views, 64)
    fit.fit(net, Clip(), stream, Accelerator(cpu=True), fit.Schedule(epochs=1, lr=1e-6, warmup=1), tmp_path)
    assert net.net.logit_scale.item() == pytest.approx(math.log(100), abs=1e-5)


def test_micro_batches_give_the_mean_of_their_gradients(toy, tiny_model):
    net = clip.load(clip.Model(str(tiny_model)), seed=3)
    batch = next(Stream(find(str(toy / "train")), net, Clip.views, 32).batches(0))
    halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
    by_hand = copy.deepcopy(net.net)
    losses = [Clip().loss(by_hand, half)["loss"] for half in halves]
    (sum(losses) / 2).backward()
    torch.optim.SGD(by_hand.parameters(), 0.1).step()
    optimizer = torch.optim.SGD(net.net.parameters(), 0.1)
    told = fit.update(net.net, Clip(), batch, optimizer, Accelerator(cpu=True), fit.Schedule(accum_freq=2))
    first, second = (loss.item() for loss in losses)
    assert told["loss"].item() == pytest.approx((first + second) / 2) != pytest.approx(second)
    for a, b in zip(by_hand.parameters(), net.net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_gradient_norm_is_clipped(toy, tiny_model):
    net = clip.load(clip.Model(str(tiny_model)), seed=3)
    batch = next(Stream(find(str(toy / "train")), net, Clip.views, 32).batches(0))
    before = torch.cat([p.detach().flatten().clone() for p in net.net.parameters()])
    fit.update(net.net, Clip(), batch, torch.optim.SGD(net.net.parameters(), 1.0), Accelerator(cpu=True), fit.Schedule(grad_clip_norm=0.01))
    after = torch.cat([p.detach().flatten() for p in net.net.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=0.02)


def test_checkpoints_are_plain_and_load_in_open_clip_by_path(train, tiny_model):
    weights, _, folder = train(save_frequency=2)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["epoch_2.pt", "epoch_latest.pt"]
    state = torch.load(folder / "checkpoints/epoch_latest.pt", weights_only=True)
    assert {"epoch", "name", "state_dict", "optimizer", "global_step", "samples_seen"} <= state.keys() and state["epoch"] == 3
    open_clip.add_model_config(str(tiny_model))
    net, _, _ = open_clip.create_model_and_transforms(Path(tiny_model).stem, pretrained=str(folder / "checkpoints/epoch_latest.pt"))
    assert same(net.state_dict(), weights)


def test_bfloat16_autocast_trains_and_keeps_float32_weights_and_losses(toy, tiny_model, tmp_path):
    from accelerate.state import AcceleratorState

    class Watching(Clip):
        def loss(self, model, batch):
            out = model(batch["image"], batch["text"])
            assert not torch.is_autocast_enabled("cpu") and out["image_features"].dtype == torch.float32
            assert model.visual.conv1.weight.dtype == torch.float32
            return super().loss(model, batch)

    AcceleratorState._reset_state()
    net = clip.load(clip.Model(str(tiny_model)))
    stream = Stream(find(str(toy / "train")), net, Clip.views, 64)
    fit.fit(net, Watching(), stream, Accelerator(cpu=True, mixed_precision="bf16"), fit.Schedule(epochs=1, lr=1e-3, warmup=1), tmp_path)
    AcceleratorState._reset_state()
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in net.net.parameters())


def test_divergence_is_told_in_one_line(train):
    class Diverging(Clip):
        def loss(self, model, batch):
            return {"loss": super().loss(model, batch)["loss"] * float("nan")}

    with pytest.raises(BadInput, match="diverged; lower --lr"):
        train(objective=Diverging())


def test_a_checkpoint_of_another_network_cannot_be_resumed(train):
    _, _, folder = train(schedule=fit.Schedule(epochs=1, warmup=1))
    torch.save({"state_dict": {}, "optimizer": {}}, folder / "checkpoints/epoch_latest.pt")
    with pytest.raises(BadInput, match="cannot be resumed"):
        train(resume=True)


def test_undecodable_images_that_are_skipped_are_counted_in_the_log(toy, tiny_model, tmp_path):
    raws = enumerate(shards.read_pairs(str(toy / "train/00000.tar")))
    broken = [raw | {"jpg": raw["jpg"][:200]} if i in (3, 40, 41) else raw for i, raw in raws]
    shards.write_shards(tmp_path / "broken", broken)
    net = clip.load(clip.Model(str(tiny_model)))
    for workers in (0, 2):
        stream = Stream(find(str(tmp_path / "broken")), net, Clip.views, 50, incomplete="skip", lanes=2, workers=workers)
        done = fit.fit(net, Clip(), stream, Accelerator(cpu=True), fit.Schedule(epochs=2, warmup=1), tmp_path / f"run{workers}")
        rows = [json.loads(line) for line in (tmp_path / f"run{workers}/log.jsonl").read_text().splitlines()]
        assert [row.get("undecodable") for row in rows] == [None, 3, 3] and done.skipped == 6


def test_a_run_goes_on_with_the_global_batch_it_was_begun_with(train):
    train(schedule=fit.Schedule(epochs=1, warmup=1))
    with pytest.raises(BadInput, match=r"begun with global batch 32, lanes 8, not global batch 64, lanes 8; go on with as many processes"):
        train(schedule=fit.Schedule(epochs=2, warmup=1), batch=64, resume=True)


def test_a_torn_line_of_the_log_does_not_keep_a_run_from_going_on(train):
    _, _, folder = train(schedule=fit.Schedule(epochs=1, warmup=1))
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')
    train(schedule=fit.Schedule(epochs=2, warmup=1), resume=True)
    assert [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()] == [0, 1, 2]
