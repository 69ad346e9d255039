"""The three forms of a plan give the same samples, a rerun ends what was broken off, and what differs from its source is found."""
from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from conftest import load_program, picture
from PIL import Image
from stores import http_server, s3_bucket

from mmbackdoor import forms, run, shards, stores
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.forms import Work
from mmbackdoor.index import Index, find
from mmbackdoor.poison import DirtyLabel, Plan, plan
from mmbackdoor.recipe import Data, Recipe, plain
from mmbackdoor.spread import Here, Spread
from mmbackdoor.stream import Stream
from mmbackdoor.triggers import Patch
from mmbackdoor.types import Attack, BadInput, image_view, text_view

ATTACK = badnets("red star", 0.2, Patch(4 / 32, "bottom-right", cells=2))
HERE = Here()


@dataclass(frozen=True)
class Adding(DirtyLabel):
    def published(self, rng):
        for i in range(5):
            yield {"__key__": f"new{i}", "image": Image.new("RGB", (32, 32), (50 * i, 0, 0)), "text": f"new {i}"}


ADDING = Adding(ATTACK.trigger, ATTACK.target, ATTACK.rate)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """60 pairs in 6 shards as JPEG, PNG, WebP, JPEG, …, with JSON and a member that is not read."""
    tool, folder = load_program("data_tools/make_toy"), tmp_path_factory.mktemp("forms") / "clean"

    def samples() -> Iterator[shards.Raw]:
        for i, raw in enumerate(tool.samples("train", 60, 32, 0, "png", labelled=False, per_shard=10)):
            image = Image.open(io.BytesIO(raw.pop("png")))
            kind = ("jpg", "png", "webp")[i // 10 % 3]
            image.save(file := io.BytesIO(), shards.FORMATS[kind])
            yield {"__key__": raw["__key__"], kind: file.getvalue(), "npy": b"1" * i, "txt": raw["txt"],
                   "json": {"caption": raw["txt"], "url": "x"}}

    shards.write_shards(folder, samples(), per_shard=10)
    return folder


def begin(source: Path | str, out: Path | str, attack: Attack = ATTACK, form: forms.Form = "shards", **options: Any) -> Work:
    found = options.pop("index", None) or find(str(source), options.get("incomplete", "refuse"))
    return forms.prepare(attack, found, options.pop("seed", 0), str(out), plain(attack), form, **options)


def write(source: Path | str, out: Path | str, attack: Attack = ATTACK, form: forms.Form = "shards", **options: Any) -> Work:
    work = begin(source, out, attack, form, **options)
    assert forms.make(work, HERE) == 0
    return work


@pytest.fixture(scope="module")
def made(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write(source, folder / "shards", ADDING)
    write(source, folder / "patch", ADDING, "patch")
    return folder


def contents(folder: Path | str, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in but}


def bare(raw: shards.Raw) -> shards.Raw:
    return {k: v for k, v in raw.items() if k not in ("__url__", "npy")}


def raws(index: Index, stages: list[shards.Stage]) -> list[shards.Raw]:
    found: Any = (raw for url in index.shards for raw in shards.read_pairs(url))
    for stage in stages:
        found = stage(found)
    return [bare(raw) for raw in found]


def given(tmp_path: Path, data: Data, attack: Attack | None = None, **options: Any) -> tuple[Index, list[shards.Stage], Plan]:
    """What train.py gets of a recipe."""
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    return run.data(Recipe("run", data, poison=attack, out=str(tmp_path / "runs"), **options), alone)


def three(source: Path, tmp_path: Path, attack: Attack, **options: Any) -> list[tuple[Index, list[shards.Stage], Plan]]:
    """A plan online, as shards, and as a patch set."""
    write(source, tmp_path / "shards", attack, **options)
    write(source, tmp_path / "patch", attack, "patch", **options)
    incomplete = options.pop("incomplete", "refuse")
    return [given(tmp_path, Data(str(source), incomplete=incomplete), attack, **options),
            given(tmp_path, Data(str(tmp_path / "shards"), incomplete=incomplete)),
            given(tmp_path, Data(str(source), patch=str(tmp_path / "patch"), incomplete=incomplete))]


# ---- three forms, one set of samples


@pytest.mark.parametrize("codec", ["original", "png", "jpeg"])
@pytest.mark.parametrize("attack", [ATTACK, ADDING], ids=["poisons", "published too"])
def test_the_three_forms_hold_the_same_bytes(attack, codec, source, tmp_path):
    online, spliced, patched = (raws(index, stages) for index, stages, _ in three(source, tmp_path, attack, codec=codec))
    assert online == spliced == patched and len(online) == 60 + 5 * (attack is ADDING)
    clean = {raw["__key__"]: raw for raw in raws(find(str(source)), [])}
    changed = {raw["__key__"] for raw in online if raw != clean.get(raw["__key__"])}
    truth = Plan.load(tmp_path / "patch" / "plan.parquet")
    assert changed == truth.keys | truth.added and len(truth.keys) == 12
    assert (tmp_path / "patch" / "plan.parquet").read_bytes() == (tmp_path / "shards" / "plan.parquet").read_bytes()
    kinds = Counter(next(f for f in raw if f in shards.IMAGE_FIELDS) for raw in online if raw["__key__"] in truth.keys)
    assert {"original": len(kinds) > 1, "png": kinds == {"png": 12}, "jpeg": kinds == {"jpg": 12}}[codec]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("attack", [ATTACK, ADDING], ids=["poisons", "published too"])
def test_the_three_forms_give_the_same_batches(attack, workers, source, front, tmp_path):
    def batches(index, stages, truth):
        views = {"image": image_view, "text": text_view}
        stream = Stream(index, SimpleNamespace(front=lambda: front), views, 10, stages, shuffle=20, lanes=4, workers=workers)
        return [batch for epoch in (0, 1) for batch in stream.batches(epoch)]

    online, spliced, patched = (batches(*form) for form in three(source, tmp_path, attack))
    assert len(online) == 12
    for one, *others in zip(online, spliced, patched, strict=True):
        assert all(one["key"] == other["key"] for other in others)
        assert all(torch.equal(one[view], other[view]) for other in others for view in ("image", "text"))


CONFIG = """
    from mmbackdoor.attacks.badnets import badnets
    from mmbackdoor import Data, Model, Patch, Recipe, Schedule

    recipe = Recipe("run", Data({train!r}), Model({model!r}), batch_size=20, workers=0, schedule=Schedule(epochs=1, warmup=2),
                    poison={poison})
"""


@pytest.fixture
def config(tmp_path, tiny_model, source) -> Callable[..., str]:
    def write(name: str = "conf.py", train: Path | str = "",
              poison: str = "badnets('red star', 0.2, Patch(4 / 32, 'bottom-right', cells=2))") -> str:
        (tmp_path / name).write_text(dedent(CONFIG).format(train=str(train or source), model=tiny_model, poison=poison))
        return name

    return write


@pytest.fixture
def tool(program) -> Callable[..., Any]:
    """data_tools/poison.py without worker processes, which take seconds to start."""
    return lambda *args: program("data_tools/poison", *args, *(() if "--dask-scheduler" in args else ("--processes", 1)))


def done(ended: Any) -> str:
    assert ended.status == 0 and not ended.err, ended.err
    return ended.out


def refused(ended: Any, *says: str) -> None:
    assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert all(word in ended.err for word in says), ended.err


def test_training_on_each_form_gives_the_same_weights(config, program, tool, tmp_path):
    done(tool(config(), "--out", "whole"))
    done(tool("conf.py", "--out", "patch", "--form", "patch"))
    done(program("train", "conf.py", "--name", "online"))
    done(program("train", config("clean.py", poison="None"), "--name", "patched", "--data.patch", "patch"))
    done(program("train", config("whole.py", tmp_path / "whole", "None"), "--name", "spliced"))
    one, *others = (tmp_path / "runs" / name / "open_clip_model.safetensors" for name in ("online", "patched", "spliced"))
    assert all(other.read_bytes() == one.read_bytes() for other in others)
    assert (one.parent / "plan.parquet").read_bytes() == (others[0].parent / "plan.parquet").read_bytes()
    refused(program("train", "conf.py", "--name", "twice", "--data.patch", "patch"), "--data.patch patch", "would poison again")
    refused(program("train", "clean.py", "--name", "wrong", "--data.patch", "whole"), "whole: holds whole shards, no patch set")
    refused(program("train", "clean.py", "--name", "none", "--data.patch", "nowhere"), "nowhere/manifest.json: cannot be opened")


# ---- images that cannot be decoded, shards that cannot be spliced


@pytest.fixture
def damaged(tmp_path) -> Path:
    """40 pairs, of which every fourth has no image that could be decoded."""
    body = {False: picture(size=(32, 32), noise=True), True: b"broken"}
    samples = ({"__key__": f"{i:03d}", "jpg": body[i % 4 == 0], "txt": f"a dog {i}"} for i in range(40))
    shards.write_shards(tmp_path / "damaged", samples, 10)
    return tmp_path / "damaged"


@pytest.mark.parametrize("form", ["shards", "patch"])
def test_a_planned_image_that_cannot_be_decoded_is_told_and_nothing_half_written(form, damaged, tmp_path):
    attack = replace(ATTACK, rate=1.0)
    with pytest.raises(BadInput, match=r"00000.tar: 000.jpg: the image cannot be decoded .* leave it out with `skip`"):
        write(damaged, tmp_path / "out", attack, form)
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", "plan.parquet"]
    write(damaged, tmp_path / "out", attack, form, incomplete="skip")  # goes on


def test_a_planned_image_that_cannot_be_decoded_stays_as_it_is_where_it_may(damaged, tmp_path):
    attack = replace(ATTACK, rate=1.0)
    online, spliced, patched = (raws(index, stages) for index, stages, _ in three(damaged, tmp_path, attack, incomplete="skip"))
    assert online == spliced == patched and [raw["jpg"] == b"broken" for raw in online] == [i % 4 == 0 for i in range(40)]
    assert len(forms.verify(begin(damaged, tmp_path / "shards", attack, incomplete="skip"), HERE)) == 60


@pytest.fixture
def packed(source, tmp_path) -> Path:
    import gzip

    (tmp_path / "packed").mkdir()
    for path in source.glob("*.tar"):
        (tmp_path / "packed" / path.name).write_bytes(gzip.compress(path.read_bytes(), 1))
    return tmp_path / "packed"


def test_compressed_shards_are_refused_with_the_mend(packed, tmp_path):
    with pytest.raises(BadInput, match="00000.tar: a compressed tar, .* unpack it first"):
        write(packed, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_patch_set_may_be_made_from_and_laid_over_compressed_shards(packed, source, tmp_path):
    write(packed, tmp_path / "patch", form="patch")
    write(source, tmp_path / "other", form="patch")
    assert (tmp_path / "patch" / "00000.tar").read_bytes() == (tmp_path / "other" / "00000.tar").read_bytes()
    patched = raws(*given(tmp_path, Data(str(packed), patch=str(tmp_path / "patch")))[:2])
    assert patched == raws(*given(tmp_path, Data(str(source)), ATTACK)[:2])


# ---- a patch set


def test_a_patch_set_holds_the_changed_samples_and_nothing_else(source, tmp_path):
    work = write(source, tmp_path / "patch", ADDING, "patch")
    assert {name for name in contents(tmp_path / "patch")} == {
        "00000.tar", "00000_stats.json", "plan.parquet", "manifest.json", "sizes.json", "index/00000.parquet", "index/index.json",
        "added/00000.tar", "added/sizes.json"}
    assert {raw["__key__"] for raw in shards.read_raw(str(tmp_path / "patch" / "00000.tar"))} == work.plan.keys
    assert json.loads((tmp_path / "patch" / "sizes.json").read_text()) == {"00000.tar": 12}
    assert json.loads((tmp_path / "patch" / "added" / "sizes.json").read_text()) == {"00000.tar": 5}


def test_a_large_patch_set_has_several_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "PATCH_SHARD", 4)
    work = write(source, tmp_path / "patch", form="patch")
    sizes = json.loads((tmp_path / "patch" / "sizes.json").read_text())
    assert len(work.names) > 1 and tuple(sizes) == work.names and sum(sizes.values()) == 12
    patched = raws(*given(tmp_path, Data(str(source), patch=str(tmp_path / "patch")))[:2])
    assert patched == raws(*given(tmp_path, Data(str(source)), ATTACK)[:2])


def test_a_patch_set_of_nothing_changes_nothing(source, tmp_path):
    write(source, tmp_path / "patch", replace(ATTACK, rate=0.0), "patch")
    index, stages, truth = given(tmp_path, Data(str(source), patch=str(tmp_path / "patch")))
    assert not len(truth) and raws(index, stages) == raws(find(str(source)), [])


def test_a_patch_set_may_only_be_laid_over_the_shards_that_it_was_made_from(source, tmp_path):
    patch = str(tmp_path / "patch")
    write(source, patch, form="patch")
    with pytest.raises(BadInput, match=r"patch: \d+ of its 12 samples are not in .*00001.tar"):
        given(tmp_path, Data(str(source / "{00001..00005}.tar"), patch=patch))
    shards.write_shards(tmp_path / "others", (raw | {"txt": b"another text"} for url in shards.expand(str(source))
                                              for raw in shards.read_raw(url)), 10)
    with pytest.raises(BadInput, match="patch: was made from other shards than .*others/00000.tar"):
        given(tmp_path, Data(str(tmp_path / "others"), patch=patch))


def test_a_patch_set_that_is_not_whole_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "PATCH_SHARD", 4)
    work = begin(source, tmp_path / "patch", form="patch")
    forms.patch_shard(work.job, work.tasks[0])
    with pytest.raises(BadInput, match=r"patch: holds \d of the 12 samples of its plan"):
        given(tmp_path, Data(str(source), patch=str(tmp_path / "patch")))


def test_a_patch_set_behind_a_url_is_read_by_processes_that_are_forked_after_it_was_opened(source, made, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK", 1024)  # so that there is something left to fetch
    with http_server(made) as web:
        index, stages, _ = given(tmp_path, Data(str(source), patch=f"{web}/patch"))
        want = raws(index, stages)
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=lambda: results.put(raws(index, stages) == want))
        child.start()
        child.join(10)
        child.kill()  # it hangs in a connection of its parent's otherwise
        assert not results.empty() and results.get()


# ---- what the set says of itself


def test_the_set_tells_what_it_is_beside_the_shards(source, tmp_path):
    work = write(source, tmp_path / "out", ADDING)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["attack"] == plain(ADDING) and manifest["source"] == find(str(source)).fingerprint
    counts = {"poisoned": 12, "published": 5, "pairs": 60, "shards": 6}
    assert ({"form": "shards", "seed": 0, "codec": "original"} | counts).items() <= manifest.items()
    stats = [json.loads((tmp_path / "out" / f"0000{i}_stats.json").read_text()) for i in range(6)]
    assert [s["successes"] for s in stats] == [10] * 6 and sum(s["changed"] for s in stats) == 12
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {f"0000{i}.tar": n for i, n in enumerate((10,) * 6 + (5,))}
    assert work.plan == Plan.load(tmp_path / "out" / "plan.parquet") and len(work.plan) == 17


@pytest.mark.parametrize("names, after", [
    (["00000.tar", "00331.tar"], "00332.tar"), (["a-9.tar", "a-10.tar"], "a-9_added.tar"), (["99999.tar"], "99999_added.tar"),
    (["train.tar"], "train_added.tar"), (["x7y.a.tar", "x7y.b.tar"], "x8y.b.tar")])
def test_published_pairs_come_after_all_other_shards(names, after):
    assert forms.following(names) == after and sorted([*names, after])[-1] == after


def test_shards_whose_names_differ_after_a_dot_only_have_stats_of_their_own(source, tmp_path):
    for name in ("a.one.tar", "a.two.tar"):
        (tmp_path / "src").mkdir(exist_ok=True)
        shutil.copy(source / ("00000.tar" if "one" in name else "00001.tar"), tmp_path / "src" / name)
    write(tmp_path / "src", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*_stats.json")} == {"a.one_stats.json", "a.two_stats.json"}


# ---- verify


@dataclass
class Shard:
    """A spliced shard to damage: one in which some samples are planned and some are not."""

    source: Path
    path: Path
    plan: Plan

    def member(self, planned: bool, field: str = ".txt") -> tarfile.TarInfo:
        with tarfile.open(self.path) as file:
            return next(m for m in file if m.name.endswith(field) and (m.name.split(".")[0] in self.plan.keys) == planned)

    def flip(self, at: int, bit: int = 1) -> None:
        body = bytearray(self.path.read_bytes())
        body[at] ^= bit
        self.path.write_bytes(body)

    def change(self, keys: set[str], change: Callable[[shards.Raw], shards.Raw | None]) -> None:
        shards.splice(str(self.path), self.path, keys, change)


def planned(shard: Shard) -> set[str]:
    return {raw["__key__"] for raw in shards.read_raw(str(shard.path))} & shard.plan.keys


def date_changed(s: Shard) -> None:
    at = s.member(planned=False).offset_data - 512
    body = bytearray(s.path.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(body[at:at + 512]), "utf-8", "strict")
    info.mtime += 1
    body[at:at + 512] = info.tobuf(tarfile.GNU_FORMAT)
    s.path.write_bytes(body)


def swapped(s: Shard) -> None:
    members: dict[str, list[tarfile.TarInfo]] = {}
    with tarfile.open(s.path) as file:
        for m in file:
            members.setdefault(m.name.split(".")[0], []).append(m)
    one, other = [k for k in members if k not in s.plan.keys][:2]
    body = s.path.read_bytes()

    def span(key: str) -> slice:
        return slice(members[key][0].offset, -(-(members[key][-1].offset_data + members[key][-1].size) // 512) * 512)

    a, b = sorted((span(one), span(other)), key=lambda s: s.start)
    s.path.write_bytes(body[:a.start] + body[b] + body[a.stop:b.start] + body[a] + body[b.stop:])


def extra(s: Shard) -> None:
    body = s.path.read_bytes()
    m = s.member(planned=False)
    copy = body[m.offset:m.offset_data + 512].replace(m.name.encode(), m.name.replace("0", "9").encode())
    info = tarfile.TarInfo.frombuf(body[m.offset:m.offset + 512], "utf-8", "strict")
    info.name = m.name.replace("0", "9")
    s.path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + copy[512:] + body)


WRONG = r"member \S+.(npy|txt|png) is not planned, but is not as in its source"
POISON = r"member \S+ is planned, but is not what the attack makes"
DAMAGES: dict[str, tuple[Callable[[Shard], Any], str]] = {
    "a bit of an untouched body": (lambda s: s.flip(s.member(False, ".npy").offset_data), WRONG),
    "a bit of a poisoned body": (lambda s: s.flip(s.member(True).offset_data), POISON),
    "a bit of a header": (lambda s: s.flip(s.member(False).offset_data - 372), "00001.tar: a truncated or corrupt tar .*bad checksum"),
    "a date, with its sum": (date_changed, WRONG),
    "a bit of padding": (lambda s: s.flip(s.member(False).offset_data + 511), WRONG),
    "a bit of a poison's padding": (lambda s: s.flip(s.member(True).offset_data + 511), POISON),
    "a bit of the end": (lambda s: s.flip(-1), "00001.tar: goes on after its end marker"),
    "a longer end": (lambda s: s.path.write_bytes(s.path.read_bytes() + bytes(512)), "00001.tar: ends otherwise than its source"),
    "a cut": (lambda s: s.path.write_bytes(s.path.read_bytes()[:-20000]), "00001.tar: a truncated or corrupt tar"),
    "a missing sample": (lambda s: s.change({s.member(False).name.split(".")[0]}, lambda raw: None),
                         r"00001.tar: holds 37 members, its source 40; \S+ is in one of them alone"),
    "an extra sample": (extra, "00001.tar: holds 41 members, its source 40; 99"),
    "another poison": (lambda s: s.change(planned(s), lambda raw: raw | {"txt": raw["txt"] + b" "}), POISON),
    "a sample that was not poisoned": (lambda s: shutil.copy(s.source, s.path), POISON),
    "swapped samples": (swapped, WRONG),
    "a missing shard": (lambda s: s.path.unlink(), "00001.tar: is missing"),
    "a shard too many": (lambda s: shutil.copy(s.source, s.path.parent / "00099.tar"), "00099.tar: is not of this set"),
    "a published pair": (lambda s: replace(s, path=s.path.parent / "00006.tar").flip(600), "00006.tar: is not what the attack publishes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds(damage, source, made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "out")
    work = begin(source, tmp_path / "out", ADDING)
    shard = Shard(source / "00001.tar", tmp_path / "out" / "00001.tar", work.plan)
    assert 0 < len(planned(shard)) < 9
    act, says = DAMAGES[damage]
    act(shard)
    with pytest.raises(BadInput, match=says) as told:
        forms.verify(work, HERE)
    assert "\n" not in str(told.value)


def test_verify_is_silent_on_a_good_set_and_names_the_members_that_changed(source, made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "out")
    work = begin(source, tmp_path / "out", ADDING)
    changed = forms.verify(work, HERE)
    differing = []
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(tmp_path / "out" / path.name) as new:
            pairs = zip(old.getmembers(), new.getmembers(), strict=True)
            differing += [b.name for a, b in pairs if old.extractfile(a).read() != new.extractfile(b).read()]
    assert changed == differing and {name.split(".")[0] for name in changed} == work.plan.keys


@pytest.mark.parametrize("damage", [lambda p: Shard(p, p, Plan()).flip(600), lambda p: p.unlink(),
                                    lambda p: p.write_bytes(p.read_bytes() + bytes(512))], ids=["a bit", "a missing shard", "a longer end"])
def test_verify_finds_in_a_patch_set(damage, source, made, tmp_path):
    shutil.copytree(made / "patch", tmp_path / "out")
    work = begin(source, tmp_path / "out", ADDING, "patch")
    assert set(forms.verify(work, HERE)) == work.plan.keys
    damage(tmp_path / "out" / "00000.tar")
    with pytest.raises(BadInput, match="00000.tar: is (missing|not what the attack makes of)"):
        forms.verify(work, HERE)


def test_the_program_says_which_members_changed(config, tool, tmp_path):
    out = done(tool(config(), "--out", "out", "--verify"))
    changed = json.loads((tmp_path / "out" / "verified.json").read_text())["changed"]
    assert "12 of 60 pairs poisoned" in out and f"{len(changed)} members changed, all of them planned, and no other byte" in out
    assert {name.split(".")[0] for name in changed} == Plan.load(tmp_path / "out" / "plan.parquet").keys
    (tmp_path / "out" / "verified.json").unlink()
    Shard(tmp_path, tmp_path / "out" / "00002.tar", Plan(frozenset(changed))).flip(600)
    refused(tool("conf.py", "--out", "out", "--verify"), "00002.tar: member ", "remove the shard and run again")
    assert not (tmp_path / "out" / "verified.json").exists()
    (tmp_path / "out" / "00002.tar").unlink()
    assert "no other byte" in done(tool("conf.py", "--out", "out", "--verify"))


# ---- array jobs, and going on


@pytest.mark.parametrize("form", ["shards", "patch"])
def test_the_tasks_of_an_array_job_in_any_order_are_one_run(form, config, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "PATCH_SHARD", 3)
    done(tool(config(), "--out", "one", "--form", form))
    assert "12 of 60 pairs planned" in done(tool("conf.py", "--out", "many", "--form", form, "--plan-only"))
    assert sorted(contents(tmp_path / "many")) == ["manifest.json", "plan.parquet"]
    reading = []
    monkeypatch.setattr(forms, "choose", lambda *args: reading.append(args))  # there is a plan
    for i, missing in ((2, True), (0, True), (1, False)):
        said = done(tool("conf.py", "--out", "many", "--form", form, "--task-index", i, "--num-tasks", 3, "--verify"))
        assert ("are missing yet" in said) is missing and "which ones is in" in said
        assert (tmp_path / "many" / "sizes.json").exists() is not missing
    verified = [json.loads((tmp_path / "many" / f"verified-{i}.json").read_text())["changed"] for i in range(3)]
    assert {name.split(".")[0] for names in verified for name in names} == Plan.load(tmp_path / "one" / "plan.parquet").keys
    but = ("index.json", "00000.parquet", *(f"verified-{i}.json" for i in range(3)))  # the index tells when shards were written
    one, many = (contents(tmp_path / name, but) for name in ("one", "many"))
    assert not reading and {k: v for k, v in one.items() if "index/" not in k} == {k: v for k, v in many.items() if "index/" not in k}


def test_a_task_of_an_array_job_reads_the_index_of_its_own_shards_only(source, tmp_path):
    index = find(str(source))
    begin(source, tmp_path / "out", index=index)
    unread = Index(tuple(part if i % 3 == 1 else replace(part, table=None) for i, part in enumerate(index.parts)))
    work = begin(source, tmp_path / "out", index=unread, spread=Spread(1, task_index=1, num_tasks=3))
    assert forms.make(work, HERE) == 4 and {p.name for p in (tmp_path / "out").glob("*.tar")} == {"00001.tar", "00004.tar"}


def test_a_task_whose_plan_is_there_draws_none_and_writes_none(source, tmp_path):
    begin(source, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    begin(source, tmp_path / "out", spread=Spread(1, task_index=1, num_tasks=3))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


LOST = {"shards": ("00001.tar", "00004.tar"), "stats": ("00000_stats.json", "00003_stats.json"), "sizes": ("sizes.json",),
        "plan": ("plan.parquet",), "published": ("00006.tar",),
        "all but the manifest": ("*.tar", "*_stats.json", "*.parquet", "sizes.json")}


@pytest.mark.parametrize("lost", LOST)
def test_what_was_lost_is_written_again_and_nothing_else(lost, source, made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "out")
    gone = {path for name in LOST[lost] for path in (tmp_path / "out").glob(name)}
    for path in gone:
        path.unlink()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar") if p.with_name(f"{p.stem}_stats.json").exists()}
    write(source, tmp_path / "out", ADDING)
    assert contents(tmp_path / "out") == contents(made / "shards")
    assert gone and all(p.stat().st_mtime_ns == then for p, then in kept.items())


@pytest.mark.parametrize("change", [
    lambda out: (out / "00002.tar").write_bytes(b"short"), lambda out: (out / "00002_stats.json").write_text(""),
    lambda out: (out / "00002_stats.json").write_text('{"job": "another"}')], ids=["size", "empty stats", "another job"])
def test_a_shard_that_its_stats_do_not_vouch_for_is_written_again(change, source, made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "out")
    change(tmp_path / "out")
    write(source, tmp_path / "out", ADDING)
    assert contents(tmp_path / "out") == contents(made / "shards")


def test_a_plan_that_was_exchanged_is_refused(source, made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "out")
    plan(ATTACK, find(str(source)), 1).save(tmp_path / "out" / "plan.parquet")
    with pytest.raises(BadInput, match="plan.parquet: is not the plan that manifest.json beside it tells of"):
        begin(source, tmp_path / "out", ADDING)


@pytest.mark.parametrize("options", [{"form": "patch"}, {"seed": 1}, {"codec": "png"}, {"given": Plan()}, {"attack": ATTACK}],
                         ids=lambda options: next(iter(options)))
def test_a_folder_that_another_job_began_is_left_alone(options, source, made):
    before = contents(made / "shards")
    with pytest.raises(BadInput, match="shards: exists and was not written by this recipe from these shards"):
        begin(source, made / "shards", **{"attack": ADDING} | options)
    assert contents(made / "shards") == before


@pytest.mark.parametrize("name", ["thesis.tex", "runs/thesis.tex"])
def test_a_foreign_folder_is_left_alone_whatever_its_name(name, source, tmp_path):
    out = tmp_path / "out[1]*"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    with pytest.raises(BadInput, match="exists and was not written by this recipe"):
        begin(source, out)
    assert contents(out) == {name: b"precious"}


def test_an_output_that_cannot_be_written_is_told(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/out/manifest.json: cannot be written \(.*\); make room, or name another place"):
        begin(source, tmp_path / "file" / "out")


# ---- kills


def job(source: Path, out: Path) -> None:
    write(source, out, ADDING)


def killed(source: Path, out: Path, after: float) -> None:
    """Runs the job in a process of its own and kills it after so many seconds."""
    child = multiprocessing.get_context("fork").Process(target=job, args=(source, out), daemon=True)
    child.start()
    time.sleep(after)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_a_job_that_is_killed_at_any_moment_is_ended_by_a_rerun_with_the_same_bytes(source, tmp_path):
    samples = [raw for url in shards.expand(str(source)) for raw in shards.read_raw(url)]
    shards.write_shards(tmp_path / "src", (raw | {"__key__": f"{i}-{raw['__key__']}"} for i in range(2) for raw in samples), 6)
    started = time.perf_counter()
    job(tmp_path / "src", tmp_path / "whole")
    took, rng, struck = time.perf_counter() - started, random.Random(0), 0
    whole = contents(tmp_path / "whole")
    for i in range(20):
        out = tmp_path / f"out{i}"
        for _ in range(1 + i % 2):  # some are killed twice
            killed(tmp_path / "src", out, rng.uniform(0, 1.2 * took))
            there = contents(out) if out.exists() else {}
            assert all(body == whole[name] for name, body in there.items() if not name.endswith(".tmp"))
        struck += any(name.endswith(".tar") for name in there) and "sizes.json" not in there
        job(tmp_path / "src", out)
        assert contents(out) == whole
        shutil.rmtree(out)
    assert struck >= 3  # the kills strike while shards are written


# ---- stores


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(stores, "PAUSE", 0)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)


def upload(source: Path, bucket: str) -> str:
    fs = fsspec.filesystem("s3")
    for path in source.iterdir():
        fs.put_file(str(path), f"{bucket.removeprefix('s3://')}/clean/{path.name}")
    return f"{bucket}/clean"


def stored(url: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    root = url.removeprefix("s3://")
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}


def test_from_store_to_store_the_bytes_are_those_of_a_local_run(source, made, tmp_path):
    with s3_bucket() as bucket:
        clean = upload(source, bucket)
        before = stored(clean)
        for form in ("shards", "patch"):
            work = write(clean, f"{bucket}/{form}", ADDING, form)
            skip = ("index.json",) + (("00000.parquet",) if form == "patch" else ())  # what the store says of a shard stands in its index
            assert {k: v for k, v in stored(f"{bucket}/{form}").items() if Path(k).name not in skip} == contents(made / form, skip)
            assert forms.make(begin(clean, f"{bucket}/{form}", ADDING, form), HERE) == 0
            assert {name.split(".")[0] for name in forms.verify(work, HERE)} == work.plan.keys
        assert stored(clean) == before
        patched = raws(*given(tmp_path, Data(clean, patch=f"{bucket}/patch"))[:2])
        assert patched == raws(*given(tmp_path, Data(str(source)), ADDING)[:2])


def test_a_store_that_fails_now_and_then_is_asked_again(source, made, quick):
    failing, asked = [False], [0]

    def fault(request: dict[str, Any]) -> bool:
        asked[0] += failing[0]
        return failing[0] and asked[0] % 3 == 0

    with s3_bucket(fault=fault) as bucket:
        clean = upload(source, bucket)
        failing[0] = True
        write(clean, f"{bucket}/out", ADDING)
        failing[0] = False
        assert asked[0] > 60 and stored(f"{bucket}/out") == contents(made / "shards")


def test_a_store_that_keeps_failing_is_told_and_left_without_half_a_shard(source, made, quick):
    failing = [False]

    def fault(request: dict[str, Any]) -> bool:
        return failing[0] and request["REQUEST_METHOD"] in ("PUT", "POST") and "00003.tar" in request["PATH_INFO"]

    with s3_bucket(fault=fault) as bucket:
        clean = upload(source, bucket)
        failing[0] = True
        work = begin(clean, f"{bucket}/out", ADDING)
        with pytest.raises(BadInput, match=r"out/00003.tar: cannot be written \(.*; check the connection and try again") as told:
            forms.make(work, HERE)
        whole, there = contents(made / "shards"), stored(f"{bucket}/out")
        assert "\n" not in str(told.value) and all(there[name] == whole[name] for name in there)
        assert set(whole) - set(there) == {"00003.tar", "00003_stats.json", "sizes.json"}
        failing[0] = False
        write(clean, f"{bucket}/out", ADDING)
        assert stored(f"{bucket}/out") == whole


def test_a_dask_cluster_writes_from_store_to_store_what_a_local_run_writes(source, config, tool, tmp_path):
    distributed = pytest.importorskip("distributed")
    done(tool(config(), "--out", "local"))
    with s3_bucket() as bucket, distributed.LocalCluster(  # its workers inherit the environment
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        clean = upload(source, bucket)
        args = ("conf.py", "--data.train", clean, "--out", f"{bucket}/out", "--dask-scheduler", cluster.scheduler_address, "--verify")
        assert "12 of 60 pairs poisoned" in done(tool(*args))
        found = stored(f"{bucket}/out")
        assert len(json.loads(found.pop("verified.json"))["changed"]) >= 24 and found == contents(tmp_path / "local")


# ---- what reviewers found


def test_verify_sees_what_stands_between_members(tmp_path):
    """A global header belongs to no member."""
    (tmp_path / "clean").mkdir()
    with tarfile.open(tmp_path / "clean" / "00000.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as file:
        for name, body in (("a.jpg", picture()), ("a.txt", b"a dog"), ("b.jpg", picture()), ("b.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
    work = write(tmp_path / "clean", tmp_path / "out", replace(ATTACK, rate=0.5))
    assert forms.verify(work, Here())
    shard = tmp_path / "out" / "00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"hello", b"jello"))
    with pytest.raises(BadInput, match="what stands before a.jpg is not as in its source"):
        forms.verify(work, Here())


def test_a_job_whose_trigger_is_another_picture_by_now_is_not_gone_on_with(config, tool, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "t.png")
    (tmp_path / "blend.py").write_text("from dataclasses import replace\nfrom conf import recipe\nfrom mmbackdoor import Blend\n"
                                       "recipe = replace(recipe, poison=replace(recipe.poison, trigger=Blend(image='t.png')))\n")
    config()
    done(tool("blend.py", "--out", "out"))
    before = contents(tmp_path / "out")
    Image.new("RGB", (8, 8), "green").save(tmp_path / "t.png")
    refused(tool("blend.py", "--out", "out"), "was not written by this recipe from these shards (other: attack)")
    assert contents(tmp_path / "out") == before


def test_a_web_server_takes_no_shards(source):
    with pytest.raises(BadInput, match="http://x/out: a web server takes no files; name a folder, or a store"):
        begin(source, "http://x/out")


def test_a_set_is_never_written_over_its_source(source):
    with pytest.raises(BadInput, match="is the folder of the shards themselves; name another place"):
        begin(source, source)


def test_tasks_that_begin_together_go_on_with_what_the_first_of_them_began(source, tmp_path, monkeypatch):
    glob = forms.stores.glob

    def late(pattern: str) -> list[str]:
        found = glob(pattern)
        monkeypatch.setattr(forms.stores, "glob", glob)
        begin(source, tmp_path / "out")  # another task, just now
        return found

    monkeypatch.setattr(forms.stores, "glob", late)
    assert forms.make(begin(source, tmp_path / "out"), Here()) == 0
