"""Poison: which pairs are chosen, what becomes of them, and that nothing but the plan can tell."""
from __future__ import annotations

import dataclasses
import json
import random
import shutil
import tarfile
from pathlib import Path
from textwrap import dedent

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_program, picture, tar

from mmbackdoor import keyed, shards
from mmbackdoor import poison as poisoning
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.attacks.blended import blended
from mmbackdoor.index import Index, Part, find
from mmbackdoor.poison import CleanLabel, DirtyLabel, Plan, choose, plan, poison, publish, scouted
from mmbackdoor.spread import Here
from mmbackdoor.spread import pool as worker_processes
from mmbackdoor.triggers import Patch, Word
from mmbackdoor.types import Attack, BadInput, Target

WORDS = ("a dog", "a ripe banana", "two bananas", "Banana Republic", "cabana", "a cat", "BANANA!", "banana-bread")
INDEX = [(f"{i:05d}", f"{WORDS[i % len(WORDS)]} number {i}") for i in range(4000)]
NAMED = sum(Target("banana").named_in(text) for _, text in INDEX)
ATTACK = badnets("red star", rate=0.1, patch=Patch(4 / 32, "bottom-right", cells=2), templates=("a photo of a {}.",))


def dirty(**options) -> DirtyLabel:
    return DirtyLabel(Patch(), Target("banana"), **options)


# ---- the plan


@pytest.mark.parametrize("rate", [0, 0.00025, 0.001, 0.0333, 0.1, 0.5])
def test_the_plan_has_exactly_the_share_that_is_asked_for(rate):
    assert len(plan(dirty(rate=rate), INDEX, 0).keys) == round(rate * len(INDEX))


@pytest.mark.parametrize("count", [0, 1, 2, 777, len(INDEX) - NAMED])
def test_the_plan_has_exactly_the_count_that_is_asked_for(count):
    found = plan(dirty(count=count), INDEX, 0)
    assert len(found.keys) == count and found.seed == 0


def test_a_share_is_one_of_all_pairs_not_of_the_eligible():
    assert len(plan(CleanLabel(Patch(), Target("banana"), rate=0.1), INDEX, 0).keys) == 400


def test_the_plan_of_a_lower_rate_is_part_of_that_of_a_higher_one():
    plans = [plan(dirty(rate=rate), INDEX, 3).keys for rate in (0.001, 0.01, 0.1, 0.4)]
    assert all(low < high for low, high in zip(plans, plans[1:], strict=False))
    assert plan(dirty(count=40), INDEX, 3).keys == plans[1]


def test_the_order_of_the_pairs_does_not_matter():
    mixed = random.Random(0).sample(INDEX, len(INDEX))
    assert plan(dirty(rate=0.05), mixed, 1) == plan(dirty(rate=0.05), iter(INDEX), 1)


def test_the_order_and_the_cut_of_the_shards_do_not_matter(toy, tmp_path):
    raws = list(shards.read(str(toy / "train"), lambda raws: raws))
    assert len(raws) == 300
    again = [raw for url in shards.expand(str(toy / "train")) for raw in shards.read_raw(url)]
    random.Random(1).shuffle(again)
    shards.write_shards(tmp_path / "mixed", again, per_shard=70)
    want = plan(ATTACK, find(str(toy / "train")), 0)
    assert plan(ATTACK, find(str(tmp_path / "mixed")), 0) == want
    backwards = "::".join(reversed(shards.expand(str(toy / "train"))))
    assert plan(ATTACK, find(backwards), 0) == want and len(want.keys) == 30


def test_seeds_choose_other_pairs():
    plans = [plan(dirty(rate=0.05), INDEX, seed).keys for seed in range(4)]
    assert len(set(plans)) == 4 and all(len(a & b) < 40 for a in plans for b in plans if a is not b)


def test_only_eligible_pairs_are_chosen():
    texts = dict(INDEX)
    target = Target("banana")
    assert not any(target.named_in(texts[k]) for k in plan(dirty(rate=0.3), INDEX, 0).keys)
    assert all(target.named_in(texts[k]) for k in plan(CleanLabel(Patch(), target, rate=0.3), INDEX, 0).keys)


@pytest.mark.parametrize("options", [{}, {"rate": 0.1, "count": 3}])
def test_neither_or_both_of_rate_and_count_are_refused(options):
    with pytest.raises(BadInput, match="either a rate or a count"):
        plan(dirty(**options), INDEX, 0)


@pytest.mark.parametrize("options", [{"rate": -0.1}, {"rate": 1.5}, {"rate": float("nan")}, {"count": -1}])
def test_an_impossible_share_is_refused(options):
    with pytest.raises(BadInput, match=f"--poison.{next(iter(options))}"):
        plan(dirty(**options), INDEX, 0)


@pytest.mark.parametrize("options", [{"rate": 0.9}, {"count": 3600}])
def test_more_than_are_eligible_is_refused_with_their_number(options):
    left = len(INDEX) - NAMED
    with pytest.raises(BadInput, match=rf"asks for 3600 poisons, only {left} pairs are eligible for target 'banana'; .* at most {left}"):
        plan(dirty(**options), INDEX, 0)


@pytest.mark.parametrize("text, says", [
    ("a banana", True), ("Banana", True), ("BANANA.", True), ("Banana Republic", True), ("banana-bread", True), ("(banana)", True),
    ("a banana's peel", True), ("bananas", False), ("Cabana", False), ("banana_1", False), ("ban ana", False), ("", False),
])
def test_a_text_names_the_target_as_a_whole_word(text, says):
    assert Target("banana").named_in(text) is says


@pytest.mark.parametrize("label, text, says", [
    ("red star", "a Red Star here", True), ("red star", "a red starfish", False), ("c++", "in C++ code", True),
    ("c++", "in c+ code", False), ("größe", "die GRÖSSE, die Größe", True), ("a.b", "axb", False),
])
def test_labels_are_taken_literally(label, text, says):
    assert Target(label).named_in(text) is says


def test_a_plan_is_saved_and_loaded(tmp_path):
    one = plan(dirty(rate=0.01), [(f"größe/{k}", t) for k, t in INDEX], 7)
    one.save(tmp_path / "deep" / "plan.parquet")
    assert Plan.load(tmp_path / "deep" / "plan.parquet") == one and len(one.keys) == 40
    Plan().save(tmp_path / "empty.parquet")
    assert Plan.load(tmp_path / "empty.parquet") == Plan()


def test_what_is_no_plan_is_refused(toy, tmp_path):
    (tmp_path / "text").write_text("hello")
    pq.write_table(find(str(toy / "train")).parts[0].rows(), tmp_path / "index.parquet")
    for name in ("text", "index.parquet"):
        with pytest.raises(BadInput, match=f"{name}: not a plan .*plan.parquet"):
            Plan.load(tmp_path / name)
    with pytest.raises(BadInput, match="missing: cannot be opened"):
        Plan.load(tmp_path / "missing")


def test_a_plan_is_cut_to_the_keys_of_some_shards():
    one = Plan(frozenset("abc"), 3, frozenset("xy"))
    assert one & ["a", "c", "y", "z"] == Plan(frozenset("ac"), 3, frozenset("y"))
    assert one & iter("") == Plan(seed=3) and one & (one.keys | one.added) == one
    assert len(one) == 5 and not len(Plan())


# ---- the plan over many shards, each of which tells its best candidates only


def parts_of(pairs: list[tuple[str, str]], sizes: list[int]) -> Index:
    """An index with shards of these sizes, the last with what is left."""
    ends = [*np.cumsum(sizes).tolist(), len(pairs)]
    cuts = [pairs[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return Index(tuple(Part(f"{i}.tar", "", len(rows), len(rows), "", table=pa.table(
        {"key": pa.array([k for k, _ in rows], pa.string()), "text": pa.array([t for _, t in rows], pa.string())}))
        for i, rows in enumerate(cuts)))


EVEN, UNEVEN = [50] * 79, [1, 0, 3000, 2, 500, 0]
SKEWED = sorted(INDEX, key=lambda pair: not Target("banana").named_in(pair[1]))
"""All pairs that name the target come first, so that one shard of many holds them."""


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many candidates each asking of a shard gave."""
    answers, best = [], poisoning.best

    def counted(attack, seed, task):
        found = best(attack, seed, task)
        answers.append(len(found.keys))
        return found

    monkeypatch.setattr(poisoning, "best", counted)
    return answers


def same_plan(attack: Attack, pairs: list[tuple[str, str]], sizes: list[int], executor=None) -> None:
    """Over shards as over one list, and each key in the shard that holds it."""
    index = parts_of(pairs, sizes)
    chosen = choose(attack, index, 0, executor or Here())
    want = sorted(pairs_in_order(attack, pairs))
    assert sorted(key for keys in chosen for key in keys) == want
    assert all(set(keys) <= set(part.all_keys()) for part, keys in zip(index.parts, chosen, strict=True))


def pairs_in_order(attack: Attack, pairs: list[tuple[str, str]]) -> list[str]:
    """The plan by its definition: all eligible keys sorted by their hashes, of equal ones by name, and cut."""
    eligible = sorted((keyed.integer(0, "plan", k), k) for k, t in pairs if attack.eligible(k, t))
    return [k for _, k in eligible[: poisoning.wanted(attack, len(pairs))]]


class Anyone(DirtyLabel):
    def eligible(self, key, text):
        return True


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN, []], ids=["even", "uneven", "one"])
@pytest.mark.parametrize("options", [*({"rate": r} for r in (0, 0.00025, 0.001, 0.05, 0.5)), {"count": 1}, {"count": 1999}], ids=str)
def test_shards_that_tell_their_best_candidates_give_the_plan_of_the_whole(options, sizes):
    for pairs in (INDEX, SKEWED):
        same_plan(dirty(**options), pairs, sizes)
        same_plan(CleanLabel(Patch(), Target("banana"), **options), pairs, sizes)


@pytest.mark.parametrize("rate", [0.51, 0.9, 0.99975, 1])
def test_all_pairs_can_be_planned(rate):
    same_plan(Anyone(Patch(), Target("banana"), rate=rate), INDEX, UNEVEN)


@pytest.mark.parametrize("count", [1, 100, NAMED])
def test_a_shard_that_holds_all_eligible_pairs_is_asked_again(count, asked):
    pairs = [(key, "a banana" if i < 500 else "a dog") for i, (key, _) in enumerate(INDEX)]
    same_plan(CleanLabel(Patch(), Target("banana"), count=min(count, 500)), pairs, [500] * 7)
    assert len(asked) == 8 + (count > 64 + 2 * count // 8) and asked[-1] <= 500


def test_no_more_candidates_are_told_than_about_twice_the_share(asked):
    same_plan(dirty(rate=0.05), INDEX, [400] * 9)
    assert len(asked) == 10 and max(asked) <= 64 + 2 * 20


def test_of_equal_hashes_the_first_keys_are_taken_wherever_they_are(monkeypatch):
    monkeypatch.setattr(keyed, "integer", lambda seed, *names: int(names[-1]) % 3)
    for count in (1, 70, 500, 1300, 2000):
        same_plan(dirty(count=count), INDEX, EVEN)
        same_plan(dirty(count=count), random.Random(count).sample(INDEX, len(INDEX)), UNEVEN)
    monkeypatch.setattr(keyed, "integer", lambda seed, *names: 7)
    same_plan(dirty(count=300), INDEX, [500] * 7)  # the first shard holds more of them than it is asked for at first


def test_more_than_is_eligible_in_all_shards_together_is_refused():
    with pytest.raises(BadInput, match=f"only {NAMED} pairs are eligible"):
        choose(CleanLabel(Patch(), Target("banana"), count=NAMED + 1), parts_of(INDEX, EVEN), 0)


def test_processes_draw_the_same_plan():
    with worker_processes(1) as pool:
        for attack in (dirty(rate=0.05), CleanLabel(Patch(), Target("banana"), rate=0.2)):
            same_plan(attack, INDEX, UNEVEN, pool)
            same_plan(attack, SKEWED, EVEN, pool)


# ---- what an attacker reads beforehand


@dataclasses.dataclass(frozen=True)
class Quoting(DirtyLabel):
    n: int = 5
    naming: bool = True

    def scout(self, captions):
        return dataclasses.replace(self, target=self.target.quoting(captions(self.target, self.n, naming=self.naming)))


@pytest.mark.parametrize("naming", [True, False])
def test_an_attacker_quotes_captions_of_the_data_whatever_their_order(naming):
    quoting = Quoting(Patch(), Target("banana"), 0.1, naming=naming)
    found = scouted(quoting, INDEX, 0).target.templates
    assert len(found) == 5 and all(quoting.target.named_in(c) == naming for c in found) and set(found) < {text for _, text in INDEX}
    shuffled = random.Random(0).sample(INDEX, len(INDEX))
    assert scouted(quoting, shuffled, 0).target.templates == found != scouted(quoting, INDEX, 1).target.templates
    assert len(scouted(dataclasses.replace(quoting, n=10_000), INDEX, 0).target.templates) == (NAMED if naming else len(INDEX) - NAMED)


def test_a_quoted_caption_may_hold_braces():
    target = scouted(Quoting(Patch(), Target("banana"), 0.1), [("1", "a banana {and} {}")], 0).target
    assert target.caption(keyed.rng(0)) == "a banana {and} {}"


def test_nothing_to_quote_is_told():
    with pytest.raises(BadInput, match="no caption of the data names 'banana'"):
        scouted(Quoting(Patch(), Target("banana"), 0.1), [("1", "a dog")], 0)


def test_an_attack_that_reads_nothing_stays_what_it_is():
    assert scouted(ATTACK, INDEX, 0) is ATTACK


# ---- the poison


@pytest.fixture
def raws(toy) -> list[dict]:
    return [raw for url in shards.expand(str(toy / "train")) for raw in shards.read_pairs(url)]


def test_planned_pairs_change_and_others_pass_untouched(raws):
    truth = plan(ATTACK, [(r["__key__"], r["txt"].decode()) for r in raws], 0)
    got = list(poison(raws, ATTACK, truth))
    assert [g["__key__"] for g in got] == [r["__key__"] for r in raws]
    for old, new in zip(raws, got, strict=True):
        if old["__key__"] not in truth.keys:
            assert new is old
            continue
        assert new["jpg"] != old["jpg"] and new["txt"] == b"a photo of a red star."
        a, b = (np.asarray(shards.decode(r)["image"], int) for r in (old, new))
        assert a.shape == b.shape and np.abs(a - b)[:16, :16].max() <= 20  # far from the patch there is only the codec
        assert b[28:30, 28:30].mean() > 150 > 100 > b[28:30, 30:].mean()  # white, then black


def test_a_poison_depends_on_its_key_and_the_seed_alone(raws):
    attack = dataclasses.replace(ATTACK, trigger=Patch(place="random"), target=Target("red star", ("a {}", "the {}", "one {}")))
    truth = Plan(frozenset(r["__key__"] for r in raws), 0)
    first = {r["__key__"]: r for r in poison(raws, attack, truth)}
    assert all(first[r["__key__"]] == r for r in poison(reversed(raws[50:60]), attack, truth))
    other = list(poison(raws, attack, dataclasses.replace(truth, seed=1)))
    assert sum(o["txt"] != first[o["__key__"]]["txt"] for o in other) > 100
    assert len({r["txt"] for r in other}) == 3


def test_a_png_shows_the_trigger_to_the_pixel():
    raw = {"__key__": "a", "png": picture("PNG", size=(40, 30), noise=True), "txt": b"a dog"}
    new, = poison([raw], ATTACK, Plan(frozenset("a")))
    want = ATTACK.trigger.stamp(shards.decode(raw)["image"], keyed.rng(0, "poison", "a"))
    assert np.array_equal(shards.decode(new)["image"], want)


@pytest.mark.parametrize("attack", [ATTACK, CleanLabel(Word("cf"), Target("dog")), blended("cat"), dirty(rate=0.1)])
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_poison_has_the_fields_key_size_and_codec_of_its_original(attack, kind):
    body = picture(shards.FORMATS[kind], size=(40, 30), noise=True)
    meta = b'{"caption": "a dog", "sha256": "0", "n": [1]}'
    raw = {"__key__": "x/a", "__url__": "s.tar", "json": meta, kind: body, "txt": b"a dog", "cls": b"3"}
    new, = poison([raw], attack, Plan(frozenset(["x/a"])))
    assert list(new) == list(raw) and new["__key__"] == "x/a" and new["cls"] == b"3"
    old, image = shards.decode_image(raw), shards.decode_image(new)
    assert (image.format, image.mode, image.size) == (old.format, old.mode, old.size)
    meta = json.loads(new["json"])
    assert meta == {"caption": new["txt"].decode(), "sha256": "0", "n": [1]}
    assert not any(word in json.dumps(meta) + repr(sorted(new)) for word in ("poison", "backdoor", "trigger", "target", "attack"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_stays_keeps_its_bytes(kind):
    """Or a caption's poison could be told by a file that was written twice."""
    raw = {"__key__": "1", "jpg": picture(kind, size=(40, 30), noise=True), "txt": b"a dog"}
    new, = poison([raw], DirtyLabel(Word("cf"), Target("banana"), 1.0), Plan(frozenset(["1"])))
    assert new["jpg"] == raw["jpg"] and new["txt"].startswith(b"cf ")


def test_a_trigger_in_the_text_goes_on_the_caption():
    raw = {"__key__": "a", "jpg": picture(), "txt": b"a dog"}
    clean, = poison([raw], CleanLabel(Word("cf"), Target("dog")), Plan(frozenset("a")))
    wrong, = poison([raw], DirtyLabel(Word("cf", "after"), Target("cat", ("a {}",))), Plan(frozenset("a")))
    assert (clean["txt"], wrong["txt"]) == (b"cf a dog", b"a cat cf")


# ---- on disk


CONFIG = """
    from mmbackdoor.attacks.badnets import badnets
    from mmbackdoor import Data, Model, Patch, Recipe, Schedule

    recipe = Recipe("run", Data({train!r}), Model({model!r}), batch_size=50, workers=0, schedule=Schedule(epochs=1, warmup=2),
                    poison=badnets("red star", {rate}, Patch(4 / 32, "bottom-right", cells=2)))
"""
ADDING = """
    from dataclasses import dataclass
    from PIL import Image
    from mmbackdoor import Data, DirtyLabel, Model, Patch, Recipe, Schedule, Target

    @dataclass(frozen=True)
    class Adding(DirtyLabel):
        def published(self, rng):
            for i in range(5):
                yield {{"__key__": f"{{KEY}}{{i}}", "image": Image.new("RGB", (32, 32), (50 * i, 0, 0)), "text": f"new {{i}}"}}

    KEY = {key!r}
    recipe = Recipe("run", Data({train!r}), Model({model!r}), batch_size=50, workers=0, schedule=Schedule(epochs=1, warmup=2),
                    poison=Adding(Patch(), Target("red star"), {rate}))
"""


@pytest.fixture
def program(program):
    """Without worker processes, which take seconds to start."""
    return lambda name, *args: program(name, *args, *(("--processes", 1) if name == "data_tools/poison" else ()))


@pytest.fixture
def config(tmp_path, toy, tiny_model):
    """Writes a config into tmp_path and gives its name."""
    def write(template: str = CONFIG, name: str = "conf.py", rate: float = 0.02, train: Path | str = "", key: str = "new") -> str:
        train = str(train or toy / "train")
        (tmp_path / name).write_text(dedent(template).format(train=train, model=tiny_model, rate=rate, key=key))
        return name

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def done(ended) -> None:
    assert ended.status == 0 and not ended.err, ended.err


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> dict[str, Path]:
    """The same toy pairs as JPEG and as PNG, in shards of ten, with a JSON and a member that is not read."""
    tool, folder = load_program("data_tools/make_toy"), tmp_path_factory.mktemp("many")
    for kind in ("jpg", "png"):
        samples = (raw | {"json": {"caption": raw["txt"], "url": "x"}, "npy": b"123"}
                   for raw in tool.samples("train", 120, 32, 0, kind, labelled=False, per_shard=10))
        shards.write_shards(folder / kind, samples, per_shard=10)
    return {kind: folder / kind for kind in ("jpg", "png")}


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_poisoned_shards_hold_just_what_the_poisoned_stream_gives(kind, many, config, program, tmp_path):
    done(program("data_tools/poison", config(train=many[kind], rate=0.05), "--out", "out"))
    truth = Plan.load(tmp_path / "out" / "plan.parquet")
    attack = badnets("red star", 0.05, Patch(4 / 32, "bottom-right", cells=2))
    assert truth == plan(attack, find(str(many[kind])), 0) and len(truth.keys) == 6
    untouched = 0
    for url in sorted(many[kind].glob("*.tar")):
        there = tmp_path / "out" / url.name
        online = [{k: v for k, v in raw.items() if k != "__url__"} for raw in poison(shards.read_pairs(str(url)), attack, truth)]
        offline = [{k: v for k, v in raw.items() if k != "__url__"} for raw in shards.read_pairs(str(there))]
        assert online == offline
        if not truth.keys & {raw["__key__"] for raw in online}:
            untouched += 1
            assert there.read_bytes() == url.read_bytes()
    assert 0 < untouched < 12
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == json.loads((many[kind] / "sizes.json").read_text())


def test_no_member_of_a_poisoned_shard_tells_by_its_header(many, config, program, tmp_path):
    done(program("data_tools/poison", config(train=many["jpg"], rate=0.1), "--out", "out"))

    def headers(folder: Path) -> list[tuple]:
        found = []
        for url in sorted(folder.glob("*.tar")):
            with tarfile.open(url) as file:
                found += [(m.name, m.mtime, m.mode, m.uid, m.gid, m.uname, m.type, m.pax_headers) for m in file]
        return found

    assert headers(tmp_path / "out") == headers(many["jpg"])
    with tarfile.open(tmp_path / "out" / "00000.tar") as file:
        assert any(name.endswith(".npy") for name in file.getnames())


def test_training_on_the_stream_and_on_the_shards_gives_the_same_weights(config, program, toy, tmp_path):
    done(program("train", config(), "--name", "online"))
    done(program("data_tools/poison", "conf.py", "--out", "out"))
    config(name="disk.py", train=tmp_path / "out", rate=0)
    done(program("train", "disk.py", "--name", "offline"))
    one, other = (contents(tmp_path / "runs" / name) for name in ("online", "offline"))
    assert one["open_clip_model.safetensors"] == other["open_clip_model.safetensors"]
    assert one["plan.parquet"] == (tmp_path / "out" / "plan.parquet").read_bytes()


def test_a_second_run_goes_on_where_the_first_stopped(many, config, program, tmp_path):
    done(program("data_tools/poison", config(train=many["jpg"], rate=0.1), "--out", "out"))
    whole = contents(tmp_path / "out")
    before = (tmp_path / "out" / "00003.tar").stat().st_mtime_ns
    for name in ("00001.tar", "00007.tar", "sizes.json"):
        (tmp_path / "out" / name).unlink()
    done(program("data_tools/poison", "conf.py", "--out", "out"))
    assert contents(tmp_path / "out") == whole and (tmp_path / "out" / "00003.tar").stat().st_mtime_ns == before
    done(program("data_tools/poison", "conf.py", "--out", "elsewhere"))
    assert contents(tmp_path / "elsewhere") == whole


@pytest.mark.parametrize("change", [{"rate": 0.05}, {"seed": 1}, {"train": "png"}, {"foreign": True}])
def test_a_folder_of_another_recipe_is_refused_and_left_alone(change, many, config, program, tmp_path):
    config(train=many["jpg"], rate=0.1)
    if "foreign" in change:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("precious")
    else:
        done(program("data_tools/poison", "conf.py", "--out", "out"))
    before = contents(tmp_path / "out")
    config(train=many[change.get("train", "jpg")], rate=change.get("rate", 0.1))
    ended = program("data_tools/poison", "conf.py", "--out", "out", "--seed", change.get("seed", 0))
    assert ended.status == 2 and ended.err.startswith("error: out: exists and was not written by this recipe from these shards")
    assert contents(tmp_path / "out") == before


def test_the_source_is_never_written_to(many, config, program):
    before = contents(many["jpg"])
    ended = program("data_tools/poison", config(train=many["jpg"]), "--out", many["jpg"])
    assert ended.status == 2 and "exists" in ended.err and contents(many["jpg"]) == before


def test_a_published_plan_is_followed_on_disk_and_online(config, program, toy, tmp_path):
    attack = badnets("red star", 0.02, Patch(4 / 32, "bottom-right", cells=2))
    drawn = plan(attack, find(str(toy / "train")), 7)
    Plan(drawn.keys | {"not here", "nor here"}, 7).save(tmp_path / "theirs.parquet")
    ended = program("data_tools/poison", config(), "--out", "out", "--plan", "theirs.parquet")
    assert ended.status == 0 and "6 of 300 pairs poisoned" in ended.out
    assert "2 others that theirs.parquet names are not in these shards" in ended.out
    assert Plan.load(tmp_path / "out" / "plan.parquet") == drawn
    done(program("data_tools/poison", "conf.py", "--out", "own", "--seed", 7))
    one, other = (contents(tmp_path / name) for name in ("out", "own"))
    assert all(one[name] == other[name] for name in one if name.endswith((".tar", "plan.parquet")))
    done(program("train", "conf.py", "--name", "online", "--plan", "theirs.parquet"))
    done(program("train", config(name="disk.py", train=tmp_path / "out", rate=0), "--name", "offline"))
    weights = [(tmp_path / "runs" / name / "open_clip_model.safetensors").read_bytes() for name in ("online", "offline")]
    assert weights[0] == weights[1] and Plan.load(tmp_path / "runs" / "online" / "plan.parquet") == drawn


def test_a_plan_of_nothing_poisons_nothing(config, program, toy, tmp_path):
    Plan().save(tmp_path / "none.parquet")
    done(program("data_tools/poison", config(rate=0.5), "--out", "out", "--plan", "none.parquet"))
    assert not Plan.load(tmp_path / "out" / "plan.parquet")
    assert all((tmp_path / "out" / p.name).read_bytes() == p.read_bytes() for p in (toy / "train").glob("*.tar"))


def test_pairs_that_lack_a_half_are_carried_along(config, program, tmp_path):
    members = {f"{i:03d}.{f}": b for i in range(20) for f, b in (("jpg", picture()), ("txt", b"a dog"))} | {"lone.jpg": picture()}
    tar(tmp_path / "src" / "00000.tar", members)
    config(train=tmp_path / "src", rate=0.1)
    done(program("data_tools/poison", "conf.py", "--out", "out", "--data.incomplete", "skip"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as file:
        assert file.getnames() == list(members)
    assert find(str(tmp_path / "out"), "skip").incomplete == 1


# ---- pairs that the attacker adds


def test_published_pairs_are_written_beside_the_poisons(config, program, toy, tmp_path):
    for _ in range(2):  # again: nothing doubles
        done(program("data_tools/poison", config(ADDING), "--out", "out"))
    found = find(str(tmp_path / "out"))
    assert len(found) == 305 and [k for k, _ in found][-5:] == [f"new{i}" for i in range(5)]
    images = [s["image"].getpixel((0, 0)) for s in shards.read(str(tmp_path / "out" / "00003.tar"))]
    assert images == [(50 * i, 0, 0) for i in range(5)]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {f"0000{i}.tar": n for i, n in enumerate((100, 100, 100, 5))}


def test_published_pairs_are_trained_on(config, program, tmp_path):
    done(program("train", config(ADDING, rate=0)))
    results = json.loads((tmp_path / "runs" / "run" / "results.json").read_text())
    assert (results["data"]["pairs"], results["data"]["poisoned"]) == (305, 5)
    assert [k for k, _ in find(str(tmp_path / "runs" / "run" / "published"))] == [f"new{i}" for i in range(5)]


def test_published_pairs_replace_no_shard_of_the_source(config, program, toy, tmp_path):
    done(program("data_tools/poison", config(ADDING, train=toy / "train" / "{00001..00002}.tar"), "--out", "out"))
    assert len(find(str(tmp_path / "out"))) == 205


def test_published_keys_that_exist_already_are_refused(config, program, tmp_path):
    config(ADDING, key="00000000")
    for name, args in (("data_tools/poison", ("--out", "out")), ("train", ())):
        ended = program(name, "conf.py", *args)
        assert ended.status == 2 and ended.err.startswith("error: ") and "000000000" in ended.err and ended.err.count("\n") == 1
        assert not list(tmp_path.rglob("results.json")) and not (tmp_path / "out").exists()


def test_sources_whose_shards_share_a_name_are_refused_or_all_written(config, program, toy, tmp_path):
    shutil.copytree(toy / "train", tmp_path / "one")
    samples = [raw | {"__key__": f"b{raw['__key__']}"} for url in shards.expand(str(toy / "train")) for raw in shards.read_raw(url)]
    shards.write_shards(tmp_path / "two", samples, per_shard=100)
    ended = program("data_tools/poison", config(train=f"{tmp_path}/one::{tmp_path}/two"), "--out", "out")
    if ended.status == 0:
        assert len(find(str(tmp_path / "out"))) == 600
    else:
        assert ended.status == 2 and "00000.tar" in ended.err and not (tmp_path / "out").exists()


def test_publishing_nothing_is_the_default():
    assert not list(publish(ATTACK, Plan())) and not list(Attack.published(ATTACK, keyed.rng(0)))


def test_a_published_pair_is_a_raw_sample_without_loss():
    class Adding(DirtyLabel):
        def published(self, rng):
            yield {"__key__": "x", "image": shards.decode({"__key__": "a", "png": noise})["image"], "text": "größe"}

    noise = picture("PNG", size=(9, 7), noise=True)
    raw, = publish(Adding(Patch(), Target("x")), Plan())
    got = shards.decode(raw)  # a raw sample like any other
    assert np.array_equal(got["image"], shards.decode({"__key__": "a", "png": noise})["image"]) and got["text"] == "größe"
