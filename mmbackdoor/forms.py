"""A plan in its three forms: spliced shards, a patch set that is laid over the clean shards, or the stream (poison.poison).

All three give the same samples. Each shard is one task of `spread.map_shards`; what is done is known by NNNNN_stats.json,
which is written after its shard and tells the job that wrote it, so a rerun does what is missing.
"""
from __future__ import annotations

import filecmp
import glob
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain, groupby
from typing import Any, Literal

from . import index as indices
from . import shards, stores, tars
from .index import Index, Part, read_row
from .poison import Plan, choose, poisoned, publish, scouted
from .shards import Codec, Incomplete, Raw, Stage, group, splice, write_shard
from .spread import Spread, map_shards
from .types import Attack, BadInput

Form = Literal["shards", "patch"]
MANIFEST, PLAN, SIZES, ADDED = "manifest.json", "plan.parquet", "sizes.json", "added"
ALONE = Spread(processes=1)
PATCH_SHARD = 10_000
"""Planned pairs, about, in each shard of a patch set."""


@dataclass(frozen=True)
class Job:
    """What is done to every shard: one value, the same in every process."""

    attack: Attack
    seed: int
    codec: Codec
    incomplete: Incomplete
    out: str
    id: str
    """A hash of all that decides its bytes: shards that another job wrote are not taken for this one's."""

    def poisoned(self, raw: Raw) -> Raw:
        return poisoned(raw, self.attack, self.seed, self.codec, self.incomplete)


@dataclass(frozen=True)
class Piece:
    """Some samples of one shard."""

    part: Part
    keys: tuple[str, ...]


# ---- one shard


def stats_path(out: str, name: str) -> str:
    return stores.join(out, f"{name.removesuffix('.tar')}_stats.json")


def finished(job: Job, name: str) -> dict[str, Any] | None:
    """What the stats of a shard say, if this job wrote it and it is whole."""
    path, target = stats_path(job.out, name), stores.join(job.out, name)
    if not stores.exists(path) or not stores.exists(target):
        return None
    try:
        stats = stores.read_json(path)
    except BadInput:  # a machine that lost power leaves empty files
        return None
    return stats if (stats.get("job"), stats.get("bytes")) == (job.id, stores.size(target)) else None


def close(job: Job, name: str, samples: int, changed: int) -> dict[str, Any]:
    """Writes the stats of a shard that is done, by the names of img2dataset and open_clip for its size; without times, so
    that a rerun writes the same bytes."""
    stats = {"count": samples, "successes": samples, "failed_to_download": 0, "failed_to_resize": 0, "changed": changed,
             "bytes": stores.size(stores.join(job.out, name)), "job": job.id}
    stores.write_json(stats_path(job.out, name), stats)
    return stats


def splice_shard(job: Job, piece: Piece) -> dict[str, Any]:
    """Copies a shard with its planned samples poisoned in their places, unless that is done. Gives its stats."""
    name, changed = stores.name_of(piece.part.shard), 0

    def change(raw: Raw) -> Raw:
        nonlocal changed
        new = job.poisoned(raw)
        changed += new is not raw
        return new

    if found := finished(job, name):
        return found
    samples = splice(piece.part.shard, stores.join(job.out, name), piece.keys, change)
    return close(job, name, samples, changed)


def patch_shard(job: Job, task: tuple[str, Sequence[Piece]]) -> dict[str, Any]:
    """Writes the planned samples of several shards, poisoned, into one shard, unless that is done. Gives its stats."""
    name, pieces = task
    if found := finished(job, name):
        return found

    def samples() -> Iterator[Raw]:
        for piece in pieces:
            there = 0
            for raw in piece.part.raws(piece.keys):
                there += 1
                yield job.poisoned(raw)
            if there < len(piece.keys):
                raise BadInput(f"{piece.part.shard}: lacks {len(piece.keys) - there} planned samples; it changed since it was indexed, so "
                               "index it again")

    n = write_shard(stores.join(job.out, name), samples())
    return close(job, name, n, n)


def verify_shard(job: Job, piece: Piece) -> dict[str, Any]:
    """Compares a spliced shard with its source, byte by byte: {"changed": members that differ and may, "wrong": faults}."""
    target = stores.join(job.out, stores.name_of(piece.part.shard))
    if not stores.exists(target):
        return {"changed": [], "wrong": [f"{target}: is missing"]}
    with (stores.local(piece.part.shard) as a, stores.local(target) as b,
          tars.open_tar(str(a), piece.part.shard) as source, tars.open_tar(str(b), target) as made):
        return compare(job, source, made, frozenset(piece.keys))


def compare(job: Job, source: tars.Tar, made: tars.Tar, planned: frozenset[str]) -> dict[str, Any]:
    old, new = list(source.members()), list(made.members())
    if len(old) != len(new):
        names = {m.name for m in old} ^ {m.name for m in new}
        named = f"; {min(names)} is in one of them alone" if names else ""
        return {"changed": [], "wrong": [f"{made.url}: holds {len(new)} members, its source {len(old)}{named}"]}
    samples = [s for s in group(source.url, old) if s["__key__"] in planned]
    missing = sorted(planned - {s["__key__"] for s in samples})
    changed, wrong = [], [f"{made.url}: planned sample {key} is not in its source" for key in missing]
    due = chain((found for s in samples for found in shards.remade(source, s, job.poisoned)), [None])
    expected, before, after = next(due), 0, 0
    for was, now in zip(old, new, strict=True):
        if not same(source, before, was.start, made, after, now.start):
            wrong.append(f"{made.url}: what stands before {now.name} is not as in its source")
        before, after = was.end, now.end
        if expected and expected[0].start == was.start:
            changed.append(now.name)
            if made.at(now.start, now.end - now.start) != expected[1]:
                wrong.append(f"{made.url}: member {now.name} is planned, but is not what the attack makes of it")
            expected = next(due)
        elif not same(source, was.start, was.end, made, now.start, now.end):
            wrong.append(f"{made.url}: member {now.name} is not planned, but is not as in its source either")
    if not same(source, before, None, made, after, None):
        wrong.append(f"{made.url}: ends otherwise than its source")
    return {"changed": changed, "wrong": wrong}


def same(one: tars.Tar, a: int, a_end: int | None, other: tars.Tar, b: int, b_end: int | None, step: int = 1 << 20) -> bool:
    """Whether two stretches are equal; to the end of the file without an end."""
    if a_end is not None and b_end is not None and a_end - a != b_end - b:
        return False
    while a_end is None or a < a_end:
        n = step if a_end is None else min(step, a_end - a)
        first, second = one.at(a, n), other.at(b, n)
        if first != second:
            return False
        if not first:
            break
        a, b = a + n, b + n
    return True


def verify_patch(job: Job, task: tuple[str, Sequence[Piece]]) -> dict[str, Any]:
    """Compares a shard of a patch set, byte by byte, with one that is made anew: what verify_shard gives, with keys for members."""
    target = stores.join(job.out, task[0])
    if not stores.exists(target):
        return {"changed": [], "wrong": [f"{target}: is missing"]}
    with tempfile.TemporaryDirectory() as folder, stores.local(target) as made:
        patch_shard(replace(job, out=folder), task)
        equal = filecmp.cmp(stores.join(folder, task[0]), made, shallow=False)
    return {"changed": [key for piece in task[1] for key in piece.keys],
            "wrong": [] if equal else [f"{target}: is not what the attack makes of the planned samples"]}


# ---- a patch set, laid over


@dataclass(eq=False)
class Overlay:
    """A stage of the stream: samples that a patch set holds take the place of those of their keys."""

    patch: str

    @cached_property
    def rows(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Key -> shard of the patch set, and the row of its index."""
        found = indices.find(self.patch, "skip")
        return {row["key"]: (part.shard, row) for part in found.parts
                for row in part.rows(["key", "fields", "offsets", "sizes"]).to_pylist()}

    def __call__(self, raws: Iterable[Raw]) -> Iterator[Raw]:
        tar: tars.Tar | None = None
        with ExitStack() as stack:
            for raw in raws:
                shard, row = self.rows.get(raw["__key__"], ("", {}))
                if not shard:
                    yield raw
                    continue
                if tar is None or tar.url != shard:  # neighbours in the data are neighbours in the patch set
                    stack.close()
                    tar = stack.enter_context(tars.open_tar(shard))
                yield read_row(tar.at, shard, row)


def lay_over(index: Index, patch: str, incomplete: Incomplete) -> tuple[Index, list[Stage], Plan]:
    """A patch set over clean shards: their index with the pairs that the attacker added, the stage that exchanges samples, and
    the plan. Raises BadInput when the patch set is not whole, or was made from other shards."""
    made, truth, stage = stores.read_json(stores.join(patch, MANIFEST)), Plan.load(stores.join(patch, PLAN)), Overlay(patch)
    if made.get("form") != "patch":
        raise BadInput(f"{patch}: holds whole shards, no patch set; train on them with --data.train {patch}")
    there = sum(key in truth.keys for part in index.parts for key in part.all_keys())
    if there < len(truth.keys):
        raise BadInput(f"{patch}: {len(truth.keys) - there} of its {len(truth.keys)} samples are not in {index.shards[0]} and the shards "
                       "with it; lay it over the shards that it was made from")
    if made.get("source") != index.fingerprint:
        raise BadInput(f"{patch}: was made from other shards than {index.shards[0]} and those with it, or from another kind of index of "
                       "them; lay it over the shards that it was made from, indexed with or without --scan as they were then")
    if truth.keys and stage.rows.keys() != truth.keys:
        raise BadInput(f"{patch}: holds {len(stage.rows.keys() & truth.keys)} of the {len(truth.keys)} samples of its plan; write the rest "
                       "with data_tools/poison.py")
    if truth.added:
        added = indices.find(stores.join(patch, ADDED), incomplete)
        index = indices.whole(Index(index.parts + added.parts), incomplete)
    return index, [stage] if truth.keys else [], truth


# ---- a whole set


@dataclass(frozen=True)
class Work:
    """A job, its tasks, and what the set will hold beside them."""

    job: Job
    form: Form
    plan: Plan
    tasks: tuple[Any, ...]
    """Pieces, or for a patch set names with pieces: this task's share of them in an array job."""
    names: tuple[str, ...]
    """The shards that all tasks write, of all shares."""
    added: str = ""
    """The shard of the pairs that the attacker adds, if there are any."""
    spread: Spread = ALONE


def prepare(attack: Attack, index: Index, seed: int, out: str, said: Mapping[str, Any], form: Form = "shards", codec: Codec = "original",
            incomplete: Incomplete = "refuse", given: Plan | None = None, executor: Executor | None = None, spread: Spread = ALONE) -> Work:
    """Plans a job and begins its folder with manifest.json and plan.parquet, or goes on with a folder that it began.

    said: what the manifest tells of the attack. given: a plan to follow instead of drawing one. Raises BadInput when the
    folder holds anything else.
    """
    if out.startswith(("http://", "https://")):
        raise BadInput(f"{out}: a web server takes no files; name a folder, or a store such as s3://BUCKET/PATH")
    sources = [stores.name_of(url) for url in index.shards]
    if twice := [name for name, n in Counter(sources).items() if n > 1]:
        raise BadInput(f"{twice[0]}: two of the shards have this name, one would replace the other; poison each folder on its own")
    seed = seed if given is None else given.seed
    identity = {"form": form, "attack": dict(said), "seed": seed, "codec": codec, "source": index.fingerprint,
                "plan": None if given is None else digest(given)}
    attack = scouted(attack, index, seed, executor)
    job = Job(attack, seed, codec, incomplete, out, hashed(json.dumps(identity, sort_keys=True)))
    manifest, path = stores.join(out, MANIFEST), stores.join(out, PLAN)
    begun = begun_there(manifest)
    there = not begun and stores.glob(stores.join(glob.escape(out), "*"))
    begun = begun or begun_there(manifest)  # tasks begin together: another has, if anything was there
    if any(os.path.realpath(stores.folder_of(url)) == os.path.realpath(out) for url in index.shards):
        raise BadInput(f"{out}: exists, and is the folder of the shards themselves; name another place for the poisoned ones")
    if begun.get("job") != job.id if begun else there:
        other = ", ".join(name for name, value in identity.items() if begun and begun.get(name) != value)
        raise BadInput(f"{out}: exists and was not written by this recipe from these shards{f' (other: {other})' if other else ''}; "
                       "remove it or name another place")
    whole, published = range(len(sources)), list(publish(attack, Plan(seed=seed)))
    ours = spread.share(whole) if form == "shards" else whole
    if begun and stores.exists(path):
        plan = Plan.load(path)
        if digest(plan) != begun["keys"]:
            raise BadInput(f"{path}: is not the plan that {MANIFEST} beside it tells of; remove {out} and write it again")
        chosen = {i: keys_in(index.parts[i], plan) for i in ours}  # the index of other tasks' shards need not be read
    else:
        chosen = dict(enumerate(choose(attack, index, seed, executor) if given is None else (keys_in(p, given) for p in index.parts)))
        plan = with_published(Plan(frozenset(chain(*chosen.values())), seed), published, index)
        with stores.telling(out, "written"):
            stores.write_json(manifest, identity | {"job": job.id, "keys": digest(plan), "poisoned": len(plan.keys), "published":
                                                    len(plan.added), "pairs": len(index), "shards": len(sources)})
    added = (stores.join(ADDED, "00000.tar") if form == "patch" else following(sources)) if published else ""
    if added:  # again in a rerun: a machine that lost power leaves empty files
        write_shard(stores.join(out, added), published)
    if not stores.exists(path):
        plan.save(path)
    if form == "patch":
        tasks = patches([Piece(index.parts[i], tuple(chosen[i])) for i in ours])
        return Work(job, form, plan, tuple(spread.share(tasks)), tuple(name for name, _ in tasks), added, spread)
    pieces = (Piece(replace(index.parts[i], table=None), tuple(chosen[i])) for i in ours)
    return Work(job, form, plan, tuple(pieces), tuple(sources), added, spread)


def begun_there(manifest: str) -> dict[str, Any]:
    return stores.read_json(manifest) if stores.exists(manifest) else {}


def keys_in(part: Part, plan: Plan) -> list[str]:
    return [key for key in part.all_keys() if key in plan.keys]


def hashed(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest(plan: Plan) -> str:
    return hashed("\n".join([str(plan.seed), *sorted(plan.keys), "", *sorted(plan.added)]))


def patches(pieces: Sequence[Piece]) -> list[tuple[str, tuple[Piece, ...]]]:
    """Pieces in order, put together to shards of about PATCH_SHARD planned pairs."""
    planned = [piece for piece in pieces if piece.keys]
    before = accumulate((len(piece.keys) for piece in planned), initial=0)
    heaps = groupby(zip(before, planned), key=lambda pair: pair[0] // PATCH_SHARD)  # noqa: B905 (`before` has the total too)
    return [(f"{i:05d}.tar", tuple(piece for _, piece in heap)) for i, (_, heap) in enumerate(heaps)]


def following(names: Sequence[str]) -> str:
    """A shard's name that comes after all of these in order: the last with its number raised, or with more at its end."""
    last = max(names)
    digits = re.search(r"\d+(?=\D*$)", last.partition(".")[0])
    if digits and len(raised := str(int(digits[0]) + 1).zfill(len(digits[0]))) == len(digits[0]):
        return last[: digits.start()] + raised + last[digits.end() :]
    return last.partition(".")[0] + "_added.tar"


def with_published(plan: Plan, published: Sequence[Raw], index: Index) -> Plan:
    """The plan with the keys of the pairs that the attacker adds. Raises BadInput when one of them is in the data already."""
    keys = frozenset(raw["__key__"] for raw in published)
    if len(keys) < len(published):
        twice = next(key for key, n in Counter(raw["__key__"] for raw in published).items() if n > 1)
        raise BadInput(f"key {twice}: the attack publishes two pairs of it; name each victim once, and attacks of a mix a prefix each")
    if again := keys.intersection(index.keys()) if keys else frozenset():
        raise BadInput(f"key {min(again)}, which the attack publishes, is in the data already; publish other keys")
    return replace(plan, added=keys)


def make(work: Work, executor: Executor) -> int:
    """Does this share's tasks, then, when every shard is there, closes the set. Returns how many shards are still missing."""
    one: Callable[..., dict[str, Any]] = splice_shard if work.form == "shards" else patch_shard
    mine = map_shards(partial(one, work.job), work.tasks, executor, "poison")
    stats = dict(zip(work.spread.share(work.names), mine, strict=True))
    others = [name for name in work.names if name not in stats]
    there = set(stores.listing(work.job.out, "_stats.json")) if others else set()
    missing = sum(stats_path(work.job.out, name) not in there for name in others)
    if not missing and others:  # only now, as it takes several requests a shard
        found = map_shards(partial(finished, work.job), others, executor, "check")
        stats |= {name: s for name, s in zip(others, found, strict=True) if s}
        missing = len(work.names) - len(stats)
    if not missing:
        finish(work, {name: stats[name]["count"] for name in work.names}, executor)
    return missing


def finish(work: Work, sizes: dict[str, int], executor: Executor) -> None:
    """Writes sizes.json, indexes a patch set, and removes what killed processes left."""
    out = work.job.out
    beside = {stores.name_of(work.added): len(work.plan.added)} if work.added else {}
    if work.form == "patch":
        if sizes:
            indices.write([stores.join(out, name) for name in work.names], executor)
        if beside:
            stores.write_json(stores.join(stores.join(out, ADDED), SIZES), beside)
    stores.write_json(stores.join(out, SIZES), sizes | (beside if work.form == "shards" else {}))
    left = ".*.tmp" if work.spread.num_tasks == 1 else ".*.tar.*.tmp"  # another task may be writing sizes.json at this moment
    for path in [] if stores.is_remote(out) else glob.glob(f"{glob.escape(out)}/**/{left}", recursive=True):
        with suppress(FileNotFoundError):
            os.unlink(path)


def verify(work: Work, executor: Executor) -> list[str]:
    """The names of all members in which this share's shards differ from their sources; of a patch set, its keys. Raises
    BadInput when they differ in anything but what the plan says, or a shard is there that is not of the set."""
    one: Callable[..., dict[str, Any]] = verify_shard if work.form == "shards" else verify_patch
    found = map_shards(partial(one, work.job), work.tasks, executor, "verify")
    wrong = [fault for one in found for fault in one["wrong"]]
    if work.added:
        with tempfile.TemporaryDirectory() as folder, stores.local(path := stores.join(work.job.out, work.added)) as made:
            write_shard(anew := stores.join(folder, "anew.tar"), publish(work.job.attack, work.plan))
            if not filecmp.cmp(anew, made, shallow=False):
                wrong.append(f"{path}: is not what the attack publishes")
    own = {stores.join(work.job.out, name) for name in (*work.names, work.added)}
    wrong += [f"{path}: is not of this set" for path in stores.listing(work.job.out) if path not in own]
    if wrong:
        more = f" ({len(wrong)} faults in all)" if len(wrong) > 1 else ""
        raise BadInput(f"{wrong[0]}{more}; remove the shard and run again")
    return [name for one in found for name in one["changed"]]
