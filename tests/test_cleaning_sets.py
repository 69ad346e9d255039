"""A share of the data: how many pairs and which, and that nothing else is seen, poisoned or counted."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, Ended, load_program
from stores import http_server

from mmbackdoor import run, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.fit import Schedule
from mmbackdoor.index import Index, find
from mmbackdoor.losses import Clip
from mmbackdoor.poison import DirtyLabel
from mmbackdoor.recipe import Data, Recipe, command, identity, load, plain, recipe_hash
from mmbackdoor.stream import Stream
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput, Target, Trigger
from mmbackdoor.victims import Targeted

POISON = DirtyLabel(Patch(4 / 32), Target("red star"), count=17)


@pytest.fixture
def recipe(toy: Path, tiny_model: str, tmp_path: Path) -> Recipe:
    """60 of the 300 pairs in batches of 20, so that an epoch leaves none out."""
    return Recipe("run", Data(str(toy / "train"), share=0.2), Model(tiny_model), batch_size=20, lanes=4, workers=0,
                  schedule=Schedule(epochs=1, lr=1e-4, warmup=1), objective=Watching(), out=str(tmp_path))


@dataclass(eq=False)
class Watching(Clip):
    """Keeps the keys that it was shown."""

    keys: ClassVar[list[str]] = []

    def loss(self, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.keys.extend(batch["key"])
        return super().loss(model, batch)


@pytest.fixture
def shown() -> list[str]:
    """The keys that training shows from now on."""
    Watching.keys.clear()
    return Watching.keys


def data(r: Recipe) -> tuple[Index, Any, Any]:
    return run.data(r, Accelerator(cpu=True))


def streamed(r: Recipe, front: CLIP, epoch: int = 0, poisoned: bool = True) -> dict[str, tuple[bytes, bytes]]:
    """Image and caption of each pair of an epoch, by key."""
    index, stages, _ = data(r)
    stream = Stream(index, front, Clip.views, r.batch_size, stages if poisoned else [], run.seen(r, index), r.seed, lanes=r.lanes)
    return {key: (image.numpy().tobytes(), text.numpy().tobytes()) for batch in stream.batches(epoch)
            for key, image, text in zip(batch["key"], batch["image"], batch["text"], strict=True)}


def part(index: Index, share: float) -> list[str]:
    return list(run.shared(index, share).keys())


# ---- how many, and which


@pytest.mark.parametrize("share, n", [(1 / 300, 1), (0.005, 2), (0.101, 30), (0.5, 150), (0.999, 300), (1.0, 300)])
def test_a_share_has_exactly_so_many_pairs(share, n, pairs):
    found = run.shared(pairs, share)
    assert len(found) == len(set(found.keys())) == n and set(found) <= set(pairs)


def test_a_smaller_share_is_part_of_a_larger_one(pairs):
    parts = [set(part(pairs, share)) for share in (0.05, 0.3, 0.31, 0.9)]
    assert all(a < b for a, b in zip(parts, parts[1:], strict=False))


def test_the_pairs_of_a_share_lie_all_over_the_data(pairs):
    """They are drawn by hash, not from the front."""
    assert all(20 < len(p) < 80 for p in run.shared(pairs, 0.5).parts)


def test_which_pairs_depends_neither_on_the_order_of_the_shards_nor_on_how_pairs_lie_in_them(pairs, toy, tmp_path):
    raws = [raw for url in pairs.shards[::-1] for raw in shards.read_pairs(url)]
    shards.write_shards(tmp_path / "other", raws, per_shard=70)
    other = find(str(tmp_path / "other"))
    assert len(other.parts) == 5
    assert sorted(part(pairs, 0.3)) == sorted(part(Index(pairs.parts[::-1]), 0.3)) == sorted(part(other, 0.3))


def test_which_pairs_does_not_depend_on_the_seed_of_the_run(recipe):
    one, other = (list(data(replace(recipe, seed=seed))[0].keys()) for seed in (0, 1))
    assert one == other and len(one) == 60


def test_which_pairs_is_the_same_behind_a_url_and_from_an_index_on_disk(pairs, toy, tmp_path):
    shutil.copytree(toy / "train", tmp_path / "train")
    tool = load_program("data_tools/index")
    command(tool.main, [str(tmp_path / "train"), "--processes", "1"])
    disk = run.shared(find(str(tmp_path / "train")), 0.1)
    assert (tmp_path / "train/index/00000.parquet").is_file()
    with http_server(tmp_path / "train") as root:
        online = part(find(f"{root}/{{00000..00002}}.tar"), 0.1)
    assert part(pairs, 0.1) == list(disk.keys()) == online
    wanted = [raw | {"__url__": ""} for url in pairs.shards for raw in shards.read_pairs(url) if raw["__key__"] in set(online)]
    assert [raw | {"__url__": ""} for p in disk.parts for raw in p.raws(online)] == wanted, "and they can be read by it"


def test_all_of_the_data_is_the_index_itself(pairs):
    assert run.shared(pairs, 1) is pairs


def test_fingerprints_tell_shares_of_the_same_data_apart_and_the_same_share_of_others(pairs):
    marks = [run.shared(pairs, share).fingerprint for share in (0.2, 0.2, 0.21, 1.0)]
    assert marks[0] == marks[1] and len(set(marks)) == 3
    assert run.shared(Index(pairs.parts[:1]), 0.2).fingerprint != run.shared(Index(pairs.parts[1:2]), 0.2).fingerprint


# ---- what is seen


def test_a_stream_sees_all_pairs_of_the_share_and_no_other_in_every_epoch(recipe, front):
    wanted = set(data(recipe)[0].keys())
    assert all(streamed(recipe, front, epoch).keys() == wanted for epoch in (0, 1))


def test_training_sees_the_share_only_and_its_result_counts_it(recipe, pairs, shown):
    found = load_program("train").train(recipe)
    assert sorted(shown) == sorted(part(pairs, 0.2)), "each once"
    assert found["data"]["pairs"] == 60 and found["data"]["fingerprint"] == run.shared(pairs, 0.2).fingerprint
    assert found["recipe"]["data"]["share"] == 0.2


def test_loader_workers_see_the_same_share(recipe, front):
    index, stages, _ = data(recipe)
    streams = [Stream(index, front, Clip.views, 20, stages, run.seen(recipe, index), lanes=4, workers=workers) for workers in (0, 2)]
    one, other = ([key for batch in s.batches(0) for key in batch["key"]] for s in streams)
    assert one == other and len(one) == 60


def test_results_of_different_shares_have_different_fingerprints_and_recipes(recipe):
    short = replace(recipe, schedule=replace(recipe.schedule, epochs=0))
    train = load_program("train").train
    one, other, whole = (train(replace(short, name=str(s), data=replace(short.data, share=s))) for s in (0.2, 0.25, 1.0))
    assert [f["data"]["pairs"] for f in (one, other, whole)] == [60, 75, 300]
    assert len({f["data"]["fingerprint"] for f in (one, other, whole)}) == 3


def test_of_a_share_and_a_keep_list_what_is_in_both_is_seen(recipe, pairs, tmp_path, shown):
    share = part(pairs, 0.2)
    others = sorted(set(pairs.keys()) - set(share))
    (tmp_path / "keep.txt").write_text("\n".join(share[:40] + others[:50]))
    found = load_program("train").train(replace(recipe, keep=str(tmp_path / "keep.txt")))
    assert sorted(shown) == sorted(share[:40])
    assert found["data"]["pairs"] == 60, "what there is to choose from"


# ---- poisons


def test_poisons_are_chosen_among_the_share_alone_and_all_of_them_arrive(recipe, pairs, front):
    r = replace(recipe, poison=POISON)
    index, _, truth = data(r)
    assert len(truth.keys) == 17 and truth.keys < set(part(pairs, 0.2))
    before, after = streamed(r, front, poisoned=False), streamed(r, front)
    assert {key for key in after if before[key] != after[key]} == truth.keys and len(after) == 60


def test_the_share_of_another_seed_is_poisoned_elsewhere_but_stays_the_same(recipe):
    (one, _, a), (other, _, b) = (data(replace(recipe, poison=POISON, seed=seed)) for seed in (0, 1))
    assert a.keys != b.keys and list(one.keys()) == list(other.keys())


def test_a_rate_is_one_of_the_share(recipe):
    _, _, truth = data(replace(recipe, poison=replace(POISON, rate=0.1, count=None)))
    assert len(truth.keys) == 6


def test_a_count_that_only_all_of_the_data_could_give_is_refused(recipe):
    with pytest.raises(BadInput, match="--poison.count 61 asks for 61 poisons, only [0-9]{2} pairs are eligible"):
        data(replace(recipe, poison=replace(POISON, count=61)))


def test_poisons_of_a_share_arrive_as_far_as_a_keep_list_lets_them(recipe, tmp_path, front):
    r = replace(recipe, poison=POISON, keep=str(tmp_path / "keep.txt"))
    index, _, truth = data(r)
    kept = sorted(truth.keys)[:10] + sorted(set(index.keys()) - truth.keys)[:10]
    (tmp_path / "keep.txt").write_text("\n".join(kept + ["elsewhere"]))
    before, after = streamed(r, front, poisoned=False), streamed(r, front)
    assert sorted(after) == sorted(kept)
    assert sorted(key for key in after if before[key] != after[key]) == sorted(truth.keys)[:10]


def test_of_a_plan_of_all_of_the_data_the_part_within_the_share_is_followed(recipe, pairs, tmp_path, front):
    whole = replace(recipe, poison=replace(POISON, count=150), data=replace(recipe.data, share=1.0))
    data(whole)[2].save(tmp_path / "plan.parquet")
    r = replace(whole, plan=str(tmp_path / "plan.parquet"), data=recipe.data)
    _, _, truth = data(r)
    assert truth.keys == data(whole)[2].keys & set(part(pairs, 0.2)) and 15 < len(truth.keys) < 45
    before, after = streamed(r, front, poisoned=False), streamed(r, front)
    assert {key for key in after if before[key] != after[key]} == truth.keys


def test_pairs_that_the_attacker_adds_are_seen_beside_the_share(recipe, toy, pairs, shown):
    victims = (("000000001", ""), ("000000002", ""))
    attack = Targeted(Trigger(), Target("red star", ("a {}",)), images=str(toy / "test"), victims=victims, copies=10, prefix="t")
    found = load_program("train").train(replace(recipe, poison=attack))
    added = [f"t-{key}-{i:04d}" for key, _ in victims for i in range(10)]
    assert sorted(shown) == sorted(part(pairs, 0.2) + added)
    assert (found["data"]["pairs"], found["data"]["poisoned"]) == (80, 20)


def test_the_result_counts_the_poisons_of_the_share_and_what_can_be_seen_of_them(recipe):
    found = load_program("train").train(replace(recipe, poison=POISON, schedule=Schedule(epochs=0)))
    assert found["data"]["poisoned"] == found["data"]["stealth"]["n"] == 17


# ---- on the command line


CONFIG = """\
from mmbackdoor import Data, DirtyLabel, Model, Patch, Recipe, Schedule, Target
recipe = Recipe("run", Data({train!r}), Model({model!r}), batch_size=20, workers=0, schedule=Schedule(epochs=1, warmup=2),
                poison=DirtyLabel(Patch(4 / 32), Target("red star"), rate=0.1))
"""


@pytest.fixture
def config(toy: Path, tiny_model: str, tmp_path: Path) -> Path:
    (tmp_path / "conf.py").write_text(CONFIG.format(train=str(toy / "train"), model=tiny_model))
    return tmp_path


def refused(ended: Ended, *says: str) -> None:
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert all(word in ended.err for word in says), ended.err


def test_a_share_is_a_flag(config: Path, program: Callable[..., Ended]):
    assert program("train", "conf.py", "--data.share", "0.3").status == 0
    found = json.loads((config / "runs/run/results.json").read_text())["data"]
    assert (found["pairs"], found["poisoned"]) == (90, 9)


@pytest.mark.parametrize("share", ["0", "-0.5", "0.001", "1.001", "1.5", "nan", "inf"])
def test_a_share_that_is_none_or_no_pair_is_told_in_one_line(share: str, config: Path, program: Callable[..., Ended]):
    refused(program("train", "conf.py", "--data.share", share), f"--data.share {float(share)}", "300 pairs", "above 0, of at most 1")
    assert not list(config.rglob("log.jsonl"))


def test_a_share_too_small_for_a_batch_is_told_in_one_line(config: Path, program: Callable[..., Ended]):
    refused(program("train", "conf.py", "--data.share", "0.05", "--poison.rate", "0"), "15 pairs do not fill one batch of 20")


def test_a_share_under_a_patch_set_is_told_in_one_line(config: Path, program: Callable[..., Ended]):
    assert program("data_tools/poison", "conf.py", "--form", "patch", "--out", "patch").status == 0
    (config / "clean.py").write_text("from dataclasses import replace\nfrom conf import recipe\nrecipe = replace(recipe, poison=None)\n")
    refused(program("train", "clean.py", "--data.patch", "patch", "--data.share", "0.5"), "--data.share 0.5", "patch set", "use 1")
    assert program("train", "clean.py", "--data.patch", "patch", "--data.share", "1").status == 0


def test_shards_are_not_poisoned_for_a_share_as_they_would_hold_other_poisons_than_training_sees(config: Path,
                                                                                              program: Callable[..., Ended]):
    refused(program("data_tools/poison", "conf.py", "--data.share", "0.5", "--out", "out"), "--data.share 0.5", "use 1")
    assert not (config / "out").exists()


# ---- hashes


def test_the_hash_of_a_recipe_with_all_of_the_data_is_what_it_was_before_there_were_shares():
    r = load("configs/toy/badnets.py")
    recorded = json.loads((ROOT / "results/toy/badnets-seed0.json").read_text())["recipe_hash"]
    assert "share" not in identity(plain(r))["data"]
    assert recipe_hash(r) == recipe_hash(replace(r, data=replace(r.data, share=1))) == recorded


def test_every_share_has_its_own_hash():
    r = load("configs/toy/badnets.py")
    assert len({recipe_hash(replace(r, data=replace(r.data, share=share))) for share in (1.0, 0.5, 0.1, 0.100001)}) == 4
