"""The stream: every pair once an epoch, the same batches on any number of processes and workers, resumable to the step."""
from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import picture

from mmbackdoor import keyed, shards, stream
from mmbackdoor.index import Index, find
from mmbackdoor.poison import DirtyLabel, plan, poison
from mmbackdoor.stream import Part, Stream
from mmbackdoor.triggers import Patch
from mmbackdoor.types import BadInput, Target, image_view, text_view

PIXEL = picture(size=(1, 1))
UNEQUAL = (500, 1, 7)


class Bare:
    """Stands in for a CLIP model where no view needs one."""

    def front(self) -> Bare:
        return self


def number(clip, sample, rng):
    """A view of nothing but its own randomness."""
    return torch.rand(3, generator=rng)


def write(folder: Path, sizes: Sequence[int], broken: Sequence[str] = ()) -> Index:
    """Shards of these many pairs with keys SSSSS_IIII; some images cannot be decoded."""
    for i, n in enumerate(sizes):
        keys = [f"{i:05d}_{j:04d}" for j in range(n)]
        shards.write_shard(folder / f"{i:05d}.tar", [
            {"__key__": k, "jpg": b"broken" if k in broken else PIXEL, "txt": f"this is {k}"} for k in keys])
    return find(str(folder))


@pytest.fixture(scope="module")
def unequal(tmp_path_factory) -> Index:
    return write(tmp_path_factory.mktemp("unequal"), UNEQUAL)


@pytest.fixture(scope="module")
def equal(tmp_path_factory) -> Index:
    return write(tmp_path_factory.mktemp("equal"), [30] * 5)


def of(index: Index, batch: int = 16, **options) -> Stream:
    return Stream(index, Bare(), options.pop("views", {}), batch, **options)


def epoch_of(s: Stream, epoch: int = 0, start: int = 0) -> list[dict]:
    """One process's batches, the loader's workers taking turns inside this process."""
    turns = []
    for worker in range(max(1, s.workers)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "get_worker_info", lambda worker=worker: SimpleNamespace(id=worker) if s.workers else None)
            turns.append(list(Part(s, epoch, start)))
    assert len({len(t) for t in turns}) == 1
    return [stream.join(parts) for parts in zip(*turns, strict=True)]


def ranks(index: Index, world: int, total: int, epoch: int = 0, **options) -> list[list[dict]]:
    """The batches of every process."""
    return [epoch_of(of(index, total // world, rank=rank, world=world, **options), epoch) for rank in range(world)]


def steps(per_rank: list[list[dict]]) -> list[set[str]]:
    """The keys of each global batch."""
    found = [[k for b in batches for k in b["key"]] for batches in zip(*per_rank, strict=True)]
    assert all(len(set(keys)) == len(keys) for keys in found)
    return [set(keys) for keys in found]


# ---- cut


def test_cut_gives_the_lanes_a_rotation_of_the_shuffled_shards_in_order():
    rng = random.Random(0)
    rotations = set()
    for trial in range(300):
        sizes = [rng.choice((0, 1, 2, rng.randrange(30), rng.randrange(200))) for _ in range(rng.randrange(1, 9))]
        if not sum(sizes):
            continue
        left = rng.randrange(sum(sizes)) if trial % 3 else 0
        ends = sorted(rng.randrange(sum(sizes) - left + 1) for _ in range(rng.randrange(8)))
        shares = [b - a for a, b in zip([0, *ends], [*ends, sum(sizes) - left], strict=True)]
        lanes = stream.cut(sizes, shares, seed=trial, epoch=trial % 4)

        got = [[(span.shard, span.skip + j) for span in lane for j in range(span.take)] for lane in lanes]
        order = keyed.permutation(len(sizes), trial, "shards", str(trial % 4))
        whole = [(shard, j) for shard in order for j in range(sizes[shard])]
        flat = list(chain(*got))
        first = whole.index(flat[0]) if flat else 0
        assert [len(lane) for lane in got] == shares
        assert flat == (whole[first:] + whole[:first])[: len(flat)]
        assert all(span.take > 0 for lane in lanes for span in lane)
        rotations.add(first * 8 // len(whole))
    assert len(rotations) == 8  # starts anywhere


# ---- every pair once


@pytest.mark.parametrize("sizes", [UNEQUAL, [30] * 5], ids=["500, 1, 7", "5 x 30"])
@pytest.mark.parametrize("world, workers, total", [
    (1, 0, 16), (1, 1, 16), (1, 3, 16), (1, 2, 50), (2, 0, 16), (2, 2, 16), (3, 0, 27), (3, 2, 27), (4, 2, 16), (5, 3, 15), (1, 0, 7),
    (1, 8, 8)])
def test_an_epoch_has_every_pair_at_most_once_and_all_but_less_than_a_batch(sizes, world, workers, total, unequal, equal):
    index = unequal if sizes is UNEQUAL else equal
    per_rank = ranks(index, world, total, workers=workers)
    assert {len(batches) for batches in per_rank} == {sum(sizes) // total}
    assert all(len(b["key"]) == total // world for batches in per_rank for b in batches)
    keys = [k for batches in per_rank for b in batches for k in b["key"]]
    assert len(set(keys)) == len(keys) and len(index) - total < len(keys) <= len(index)
    assert set(keys) <= {key for key, _ in index}


@pytest.mark.parametrize("world, workers", [(1, 1), (1, 2), (1, 4), (2, 0), (2, 1), (2, 2), (4, 0), (8, 1)])
def test_global_batches_are_the_same_on_any_number_of_processes_and_workers(world, workers, unequal):
    alone = ranks(unequal, 1, 16, epoch=3, seed=5)
    shared = ranks(unequal, world, 16, epoch=3, seed=5, workers=workers)
    assert steps(shared) == steps(alone)
    joined = [[k for batch in batches for k in batch["key"]] for batches in zip(*shared, strict=True)]
    assert joined == [b["key"] for b in alone[0]]  # and in the same order, so that a global loss is the same to the bit


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_real_loader_workers_give_the_same_batches(workers, equal):
    s = of(equal, 16, workers=workers, views={"n": number})
    got = list(s.batches(1))
    assert [b["key"] for b in got] == [b["key"] for b in epoch_of(s, 1)] and len(got) == len(s) == 9
    if workers < 3:
        assert [b["key"] for b in got] == [b["key"] for b in of(equal, 16).batches(1)]
    known = {k: v for b in of(equal, 16, views={"n": number}).batches(1) for k, v in zip(b["key"], b["n"], strict=True)}
    assert all(torch.equal(v, known[k]) for b in got for k, v in zip(b["key"], b["n"], strict=True) if k in known)


def test_variables_that_a_launcher_left_behind_do_not_split_the_data(equal, monkeypatch):
    before = [b["key"] for b in of(equal).batches(0)]
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [b["key"] for b in of(equal, workers=1).batches(0)] == before


def test_epochs_differ_in_order_and_in_who_is_left_out(equal):
    s = of(equal, 40)
    everyone, orders, absent = {key for key, _ in equal}, [], []
    for epoch in range(6):
        order = [k for b in s.batches(epoch) for k in b["key"]]
        orders.append(tuple(order))
        absent.append(everyone - set(order))
    assert len(set(orders)) == 6 and all(len(a) == 30 for a in absent)
    assert len(set(map(frozenset, absent))) >= 5 and not set.intersection(*absent)
    assert [k for b in s.batches(0) for k in b["key"]] == list(orders[0])  # asking again replays that epoch and no other


def test_seeds_differ_in_order(equal):
    assert len({tuple(k for b in of(equal, seed=seed).batches(0) for k in b["key"]) for seed in range(4)}) == 4


def test_a_batch_mixes_shards(equal):
    assert all(len({k[:5] for k in b["key"]}) >= 3 for b in of(equal, 32).batches(0))


def test_shuffling_can_be_turned_off_within_lanes(equal):
    flat = [k for b in of(equal, 8, shuffle=0, lanes=1).batches(0) for k in b["key"]]
    runs = sum(a[:5] != b[:5] or int(b[6:]) != int(a[6:]) + 1 for a, b in zip(flat, flat[1:], strict=False))
    assert runs <= 5  # five shards, one of them cut by the rotation
    assert flat != [k for b in of(equal, 8, lanes=1).batches(0) for k in b["key"]]


# ---- randomness


def test_views_get_the_same_random_numbers_whatever_the_processes(unequal):
    views = {"a": number, "b": number}

    def drawn(**options):
        world = options.pop("world", 1)
        return {k: (a.tolist(), b.tolist()) for batches in ranks(unequal, world, 16, views=views, **options) for batch in batches
                for k, a, b in zip(batch["key"], batch["a"], batch["b"], strict=True)}

    alone = drawn(epoch=2)
    assert alone == drawn(epoch=2, world=2, workers=2) == drawn(epoch=2, world=4)
    other = drawn(epoch=3)
    assert all(alone[k] != other[k] for k in alone.keys() & other.keys())
    other = drawn(epoch=2, seed=1)
    assert all(alone[k] != other[k] for k in alone.keys() & other.keys())
    assert all(a != b for a, b in alone.values()) and len({tuple(a) for a, _ in alone.values()}) == len(alone)


def test_global_random_states_neither_matter_nor_change(equal):
    s = of(equal, views={"n": number})
    torch.manual_seed(1)
    random.seed(1)
    before, python = torch.get_rng_state(), random.getstate()
    first = list(s.batches(0))
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python
    torch.manual_seed(2)
    random.seed(2)
    second = list(s.batches(0))
    assert all(a["key"] == b["key"] and torch.equal(a["n"], b["n"]) for a, b in zip(first, second, strict=True))


# ---- resume


@pytest.mark.parametrize("incomplete", ["refuse", "skip"])
@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_gives_the_rest_of_the_epoch(incomplete, workers, tmp_path):
    index = write(tmp_path, [40, 3, 30], ["00000_0004", "00002_0011"] if incomplete == "skip" else [])
    s = of(index, 8, workers=workers, incomplete=incomplete, views={"n": number})
    whole = epoch_of(s, 1)
    for start in (0, 1, 5, len(s) - 1, len(s)):
        rest = list(s.batches(1, start)) if start == 5 else epoch_of(s, 1, start)
        assert len(rest) == len(s) - start
        assert all(a["key"] == b["key"] and torch.equal(a["n"], b["n"]) for a, b in zip(rest, whole[start:], strict=True))


# ---- what is left out


def test_only_pairs_of_the_keep_list_are_seen(unequal):
    keep = frozenset(key for i, (key, _) in enumerate(unequal) if i % 3 == 0)
    for world, workers in ((1, 0), (2, 2), (3, 0)):
        seen = [k for batches in ranks(unequal, world, 12, workers=workers, keep=keep | {"unknown"}) for b in batches for k in b["key"]]
        assert set(seen) <= keep and len(set(seen)) == len(seen) == len(keep) // 12 * 12


def test_a_keep_list_may_leave_a_shard_empty(unequal):
    keep = frozenset(key for key, _ in unequal if not key.startswith("00000"))
    batches = list(of(unequal, 8, keep=keep).batches(0))
    assert [set(b["key"]) for b in batches] == [keep]


@pytest.mark.parametrize("keep, batch, world", [(None, 2000, 1), (None, 300, 2), (frozenset(), 8, 1), (frozenset(("00001_0000",)), 2, 1)])
def test_too_few_pairs_for_a_batch_are_refused(keep, batch, world, unequal):
    with pytest.raises(BadInput, match=r"pairs do not fill one batch of .*--batch-size or more data"):
        of(unequal, batch, keep=keep, world=world)


def test_just_enough_pairs_for_a_batch_are_one_step(unequal):
    one, = of(unequal, 508).batches(0)
    assert set(one["key"]) == {key for key, _ in unequal}


def test_more_workers_than_pairs_in_a_batch_are_refused(equal):
    with pytest.raises(BadInput, match="--workers 5 is more than --batch-size 4"):
        of(equal, 4, workers=5)


# ---- what cannot be decoded


def test_the_place_of_an_undecodable_image_is_filled(tmp_path):
    broken = [f"00000_{i:04d}" for i in range(0, 60, 7)] + ["00001_0003"]
    index = write(tmp_path, [60, 20], broken)
    for world, workers in ((1, 0), (2, 0), (2, 2)):
        per_rank = ranks(index, world, 16, workers=workers, incomplete="skip")
        keys = [k for batches in per_rank for b in batches for k in b["key"]]
        assert all(len(batches) == 5 for batches in per_rank) and len(keys) == 80
        assert not set(keys) & set(broken) and len(set(keys)) == 80 - len(broken)
        assert max(map(keys.count, keys)) <= 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image_is_refused_by_name(workers, tmp_path):
    s = of(write(tmp_path, [20, 20], ["00001_0013"]), 8, workers=workers)
    with pytest.raises(BadInput, match=r"00001\.tar: 00001_0013\.jpg: the image cannot be decoded"):
        list(s.batches(0))


def test_a_stretch_without_a_good_image_is_refused_rather_than_read_for_ever(tmp_path):
    s = of(write(tmp_path, [24], [f"00000_{i:04d}" for i in range(24)]), 8, incomplete="skip")
    with pytest.raises(BadInput, match="cannot be decoded"):
        list(s.batches(0))


# ---- shards that change under the stream


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("incomplete", ["refuse", "skip"])
def test_a_shard_that_shrank_after_indexing_is_told(workers, incomplete, tmp_path):
    index = write(tmp_path, [40, 10])
    write(tmp_path, [20, 10])
    with pytest.raises(BadInput, match=r"00000\.tar: has fewer pairs than its index says.*index it again"):
        list(of(index, 10, workers=workers, incomplete=incomplete).batches(0))


def test_a_shard_that_went_away_is_told(tmp_path):
    index = write(tmp_path, [40, 10])
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(BadInput, match=r"00000\.tar: cannot be opened"):
        list(of(index, 10).batches(0))


# ---- stages and views


def test_stages_see_every_pair_before_the_shuffle(equal):
    def shout(raws):
        for raw in raws:
            yield raw | {"txt": raw["txt"].upper()}

    def text(clip, sample, rng):
        return torch.tensor(list(sample["text"].encode()))

    for batch in of(equal, stages=[shout], views={"text": text}).batches(0):
        assert [bytes(t.tolist()).decode() for t in batch["text"]] == [f"THIS IS {k}" for k in batch["key"]]


def test_the_keep_list_holds_for_poisons_too(equal, tmp_path):
    attack = DirtyLabel(Patch(), Target("banana"), rate=0.5)
    truth = plan(attack, equal, 0)
    keep = frozenset(key for key, _ in equal) - truth.keys
    seen = [k for b in of(equal, stages=[partial(poison, attack=attack, plan=truth)], keep=keep).batches(0) for k in b["key"]]
    assert len(seen) == 64 and not set(seen) & truth.keys


@pytest.mark.parametrize("where", ["poisoned", "beside it"])
def test_an_undecodable_image_is_skipped_whether_it_was_to_be_poisoned_or_not(where, tmp_path):
    attack = DirtyLabel(Patch(), Target("banana"), rate=0.25)
    clean = write(tmp_path, [80])
    truth = plan(attack, clean, 0)
    broken = min(key for key, _ in clean if (key in truth.keys) == (where == "poisoned"))
    index = write(tmp_path, [80], [broken])
    seen = [k for b in of(index, stages=[partial(poison, attack=attack, plan=truth)], incomplete="skip").batches(0) for k in b["key"]]
    assert len(seen) == 80 and set(seen) == {key for key, _ in index} - {broken}


def test_what_a_worker_gets_can_be_sent_to_a_spawned_process(toy, front):
    index = find(str(toy / "train"))
    attack = DirtyLabel(Patch(), Target("red star"), rate=0.1)
    truth = plan(attack, index, 0)
    s = Stream(index, front, {"image": image_view, "text": text_view}, 30, [partial(poison, attack=attack, plan=truth)], workers=1)
    body = pickle.dumps(Part(s, 1, 2))
    got, want = list(pickle.loads(body)), list(s.batches(1, 2))
    assert len(body) < 20_000_000 and len(got) == len(want) == 8
    assert got[0]["image"].shape == (30, 3, 32, 32) and got[0]["text"].shape == (30, 16)
    for a, b in zip(got, want, strict=True):
        assert a["key"] == b["key"] and torch.equal(a["image"], b["image"]) and torch.equal(a["text"], b["text"])


def test_the_network_does_not_travel_to_the_workers(equal):
    class Heavy(Bare):
        def front(self):
            return Bare()

        def __reduce__(self):
            raise AssertionError("the network was pickled")

    s = Stream(equal, Heavy(), {}, 16)
    assert [b["key"] for b in pickle.loads(pickle.dumps(Part(s, 0, 0)))] == [b["key"] for b in s.batches(0)]
