"""Input that cannot work: exit status 2, one line on stderr that names the thing and the mend, nothing half-written."""
from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Ended, forget, load_program, picture, tar

from mmbackdoor import recipe, shards

HEAD = """\
from mmbackdoor import Data, DirtyLabel, Model, Patch, Recipe, Schedule, Target
"""
CONFIG = HEAD + """
data = Data(root={toy!r}, train="{{root}}/train", validation="{{root}}/val", zero_shot="{{root}}/test")
recipe = Recipe("run", data, Model({model!r}), batch_size=50, workers=0, schedule=Schedule(epochs=1, warmup=2),
                poison=DirtyLabel(Patch(4 / 32), Target("red star"), rate=0.02))
"""


CHANGED = "from dataclasses import replace\nfrom conf import Target, recipe\n"
FINISHED = ("index.json", "results.json", "evaluation.json", "open_clip_model.safetensors", "examples.json")
"""What only work that came to its end may leave below runs/ or index/."""


@pytest.fixture
def home(tmp_path: Path, toy: Path, tiny_model: str) -> Path:
    """The folder that programs are run in, with the config conf.py of a run that works."""
    (tmp_path / "val").symlink_to(toy / "val")
    (tmp_path / "conf.py").write_text(CONFIG.format(toy=str(toy), model=tiny_model))
    return tmp_path


@pytest.fixture
def refuses(program: Callable[..., Ended], home: Path) -> Callable[..., str]:
    """refuses(program, *args, says=...) checks what every refusal must be, and gives the line."""

    def check(name: str, *args, says: str | tuple[str, ...]) -> str:
        before = everything(home)
        ended = program(name, *args)
        assert ended.status == 2, ended
        assert ended.err.startswith("error: ") and ended.err.endswith("\n") and ended.err.count("\n") == 1, ended.err
        for word in (says,) if isinstance(says, str) else says:
            assert word in ended.err
        new = [p for p, body in everything(home).items() if before.get(p, ...) != body]
        begun = [p for p in new if p.startswith("runs") or Path(p).name == "index" or Path(p).parent.name == "index"]
        assert not [p for p in new if p not in begun or Path(p).name in FINISHED]
        return ended.err

    return check


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if p.suffix != ".pyc"}


def works(program: Callable[..., Ended], name: str, *args) -> None:
    ended = program(name, *args)
    assert ended.status == 0, ended


def pairs(n: int, image: bytes = b"") -> dict[str, bytes]:
    return {f"{i:03d}.{f}": b for i in range(n) for f, b in (("jpg", image or picture()), ("txt", b"a dog"))}


@pytest.fixture(scope="module")
def done(toy: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of conf.py."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "conf.py").write_text(CONFIG.format(toy=str(toy), model=tiny_model))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        load_program("train").train(recipe.load("conf.py", ["--name", "done"]))
    forget(folder)
    return folder / "runs" / "done"


@pytest.fixture
def trained(done: Path, home: Path) -> Path:
    """A finished run, and the network of another architecture beside it."""
    (home / "wide.json").write_text(json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"width": 64}}))
    return Path(shutil.copytree(done, home / "runs" / "done"))


# ---- shards

SHARDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such shard": ("nowhere/00000.tar", ("nowhere/00000.tar: no such shard", "check")),
    "no such folder": ("nowhere", ("nowhere: no such shard", "check")),
    "a brace pattern that matches nothing": (
        "nowhere/{00000..00009}.tar", ("nowhere/00000.tar: no such shard (10 of 10", "{00000..00009}", "numbers in the braces")),
    "a glob that matches nothing": ("nowhere/*.tar", ("nowhere/*.tar: no file matches", "check")),
    "a folder without shards": ("bare", ("bare: the folder holds no .tar file", "name the folder")),
    "nothing": ("", ("no shards named", "give a folder")),
    "a pipe": ("pipe:touch it_ran", ("pipe:touch it_ran", "refused", "download")),
    "a truncated tar": ("cut", ("cut/00000.tar: a truncated or corrupt tar", "fetch or write it again")),
    "a tar that ends in a header": ("header", ("header/00000.tar: a truncated or corrupt tar", "fetch or write it again")),
    "half a first header": ("stub", ("stub/00000.tar: a truncated or corrupt tar", "fetch or write it again")),
    "a web page": ("page", ("page/00000.tar: a truncated or corrupt tar", "fetch or write it again")),
    "an image without caption": ("lone", ("lone/00000.tar: sample 000x lacks", "1 of 61 samples", "incomplete skip")),
    "a key with a dot": ("dots", ("dots/00000.tar: sample a lacks", "the key is a and the field b.jpg")),
    "a key that occurs twice": ("twice", ("key 000 occurs in twice/00000.tar and twice/00001.tar", "--rename OUT")),
    "a key that occurs twice in one shard": ("again", ("again/00000.tar", "000", "write the shard again")),
    "sizes.json disagrees": ("sizes", ("sizes/00000.tar: holds 60 samples, sizes.json beside it says 70", "correct sizes.json")),
    "sizes.json is no JSON": ("nojson", ("nojson/sizes.json", )),
}


@pytest.fixture
def broken(home: Path) -> None:
    (home / "bare").mkdir()
    whole = tar(home / "cut" / "00000.tar", pairs(60))
    for folder in ("header", "stub", "page"):
        (home / folder).mkdir()
    (home / "header" / "00000.tar").write_bytes(whole.read_bytes()[: 8 * 2560 + 200])
    (home / "stub" / "00000.tar").write_bytes(whole.read_bytes()[:300])
    whole.write_bytes(whole.read_bytes()[: 8 * 2560 + 600])
    (home / "page" / "00000.tar").write_text("<html>404</html>\n" * 100)
    tar(home / "lone" / "00000.tar", pairs(60) | {"000x.jpg": picture()})
    tar(home / "dots" / "00000.tar", pairs(60) | {"a.b.jpg": picture(), "a.b.txt": b"x"})
    tar(home / "again" / "00000.tar", [*pairs(60).items(), *pairs(1).items()])
    for name in ("00000", "00001"):
        tar(home / "twice" / f"{name}.tar", pairs(60))
    for folder, text in (("sizes", '{"00000.tar": 70}'), ("nojson", "{oh")):
        tar(home / folder / "00000.tar", pairs(60))
        (home / folder / "sizes.json").write_text(text)


@pytest.mark.parametrize("train, says", SHARDS.values(), ids=list(SHARDS))
def test_training_on_shards_that_cannot_work(train, says, broken, refuses):
    refuses("train", "conf.py", "--data.train", train, says=says)


@pytest.mark.parametrize("train, says", SHARDS.values(), ids=list(SHARDS))
def test_poisoning_shards_that_cannot_work(train, says, broken, refuses):
    refuses("data_tools/poison", "conf.py", "--data.train", train, "--out", "out", says=says)


@pytest.mark.parametrize("train, says", SHARDS.values(), ids=list(SHARDS))
def test_indexing_shards_that_cannot_work(train, says, broken, refuses):
    refuses("data_tools/index", train, says=says)


@pytest.mark.parametrize("wrong, right", [
    (("--data.train", "nowhere"), ()),
    (("--data.train", "lone"), ("--data.train", "lone", "--data.incomplete", "skip")),
    (("--data.zero-shot", "nowhere"), ()),
    (("--poison.rate", "0.999"), ("--poison.rate", "0.5")),
    (("--batch-size", "301"), ()),
    (("--workers", "51"), ()),
    (("--keep", "keep.txt"), ()),
    (("--init", "runs/missing"), ()),
    (("--model.name", "RN51"), ()),
], ids=lambda flags: " ".join(flags))
def test_a_refused_run_does_not_stand_in_the_way_of_the_next(wrong, right, broken, program, home):
    assert program("train", "conf.py", *wrong).status == 2
    ended = program("train", "conf.py", *right)
    assert ended.status == 0, ended
    assert (home / "runs/run/results.json").is_file()


@pytest.mark.parametrize("name, args", [("train", ("conf.py", "--data.train", "lone")), ("data_tools/index", ("lone",)),
                                        ("data_tools/poison", ("conf.py", "--data.train", "lone", "--out", "out"))])
def test_the_flag_that_is_named_for_skipping_exists(name, args, broken, program):
    flag, = re.findall(r"--[\w.-]+ skip", program(name, *args).err)
    ended = program(name, *args, *flag.split(), *(("--name", "again") if name == "train" else ()))
    assert ended.status == 0, ended


def test_what_was_skipped_is_counted_in_the_results(broken, program, home):
    works(program, "train", "conf.py", "--data.train", "lone", "--data.incomplete", "skip")
    data = json.loads((home / "runs/run/results.json").read_text())["data"]
    assert (data["pairs"], data["incomplete"]) == (60, 1)


def test_repeated_keys_can_be_renamed(broken, program):
    works(program, "data_tools/index", "twice", "--rename", "new")
    works(program, "train", "conf.py", "--data.train", "new")


def test_incomplete_samples_are_counted_when_they_are_skipped(broken, program, home):
    ended = program("data_tools/index", "lone", "--incomplete", "skip")
    assert ended.status == 0 and "60 pairs in 1 shards, 1 samples lack a half" in ended.out
    works(program, "data_tools/poison", "conf.py", "--data.train", "lone", "--data.incomplete", "skip", "--out", "out")
    with tarfile.open(home / "out" / "00000.tar") as file:
        assert "000x.jpg" in file.getnames()


def test_a_refused_renaming_leaves_nothing(broken, refuses):
    refuses("data_tools/index", "lone", "--rename", "new", says=("sample 0", "lacks"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image(workers, home, refuses, program):
    tar(home / "bad" / "00000.tar", pairs(60) | {"x.jpg": b"no image", "x.txt": b"a dog"} | {f"y{k}": v for k, v in pairs(39).items()})
    args = ("conf.py", "--data.train", "bad", "--workers", workers)
    refuses("train", *args, says=("bad/00000.tar: x.jpg: the image cannot be decoded", "skip"))
    works(program, "train", *args, "--data.incomplete", "skip", "--name", "skipping")


def test_an_undecodable_image_that_is_to_be_poisoned(home, program):
    members = pairs(60) | {k: b"no image" for k in pairs(30) if k.endswith(".jpg")}
    tar(home / "bad" / "00000.tar", members)
    args = ("conf.py", "--data.train", "bad", "--poison.rate", "0.5", "--out", "out")
    ended = program("data_tools/poison", *args)
    assert ended.status == 2 and ended.err.startswith("error: bad/00000.tar: 0") and ended.err.count("\n") == 1
    assert "the image cannot be decoded" in ended.err and "skip" in ended.err
    assert not list(home.glob("out/*.tar")) and not list(home.glob("out/.*.tmp"))
    works(program, "data_tools/poison", *args, "--data.incomplete", "skip")
    with tarfile.open(home / "out" / "00000.tar") as file:
        assert all(file.extractfile(f"{i:03d}.jpg").read() == b"no image" for i in range(30))


# ---- configs

CONFIGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "without a recipe": (HEAD + "x = 1\n", ("bad.py: defines no `recipe`", "end it with `recipe = Recipe(")),
    "whose recipe is something else": (HEAD + "recipe = {'lr': 1}\n", ("bad.py: defines no `recipe`",)),
    "with a suite": (HEAD + "from conf import recipe as r\nsuite = [r]\n", ("bad.py: defines no `recipe`", "bench.py")),
    "with a syntax error": (HEAD + "recipe = Recipe(\n", ("bad.py", "SyntaxError", "line 2", "correct the config")),
    "with a mistyped field": (HEAD + "recipe = Recipe('x', Data('y'),\n    batchsize=3)\n",
                              ("bad.py:2: TypeError", "batchsize", "correct the config")),
    "with a mistyped name": (HEAD + "recipe = Recipie('x')\n", ("bad.py:2: NameError", "Recipie")),
    "with an import that is not there": ("import nosuchmodule\n", ("bad.py:1: ModuleNotFoundError", "nosuchmodule")),
    "that raises in several lines": (HEAD + "raise ValueError('first\\nsecond')\n", ("bad.py:2: ValueError", "first", "correct")),
    "without anything": ("", ("bad.py: defines no `recipe`",)),
}


@pytest.mark.parametrize("text, says", CONFIGS.values(), ids=list(CONFIGS))
def test_a_config(text, says, home, refuses):
    (home / "bad.py").write_text(text)
    refuses("train", "bad.py", says=says)


def test_a_config_that_is_not_there_or_not_python(home, refuses):
    (home / "notes.md").write_text("# hello")
    refuses("train", "missing.py", says=("missing.py: no such config", "see configs/"))
    refuses("train", "runs", says=("runs: no such config",))
    refuses("train", "notes.md", says=("notes.md",))


def test_a_config_may_have_the_name_of_a_module_that_is_loaded(home, program):
    (home / "configs").mkdir()
    for name in ("random.py", "configs/conf.py"):
        (home / name).write_text((home / "conf.py").read_text().replace('"run"', f'"{name[:-3]}"'))
        works(program, "train", name)
        assert (home / "runs" / name[:-3] / "results.json").is_file()


def test_no_config_is_a_help(program):
    for name in ("train", "data_tools/poison"):
        ended = program(name)
        assert ended.status == 2 and "conf" in ended.out
        ended = program(name, "--help")
        assert ended.status == 0 and "conf" in ended.out


@pytest.mark.parametrize("flag, near", [("--poison.rat", "--poison.rate"), ("--poison.trigger.sise", "--poison.trigger.size"),
                                        ("--batch-sise", "--batch-size"), ("--data.tran", "--data.train")])
@pytest.mark.parametrize("name", ["train", "data_tools/poison"])
def test_an_unknown_flag_is_refused_with_the_one_that_was_meant(name, flag, near, program, home):
    ended = program(name, "conf.py", flag, "1")
    assert ended.status == 2 and flag in ended.err and near in ended.err and "Traceback" not in ended.err
    assert not (home / "runs").exists()


@pytest.mark.parametrize("flag, value", [("--poison.rate", "lots"), ("--precision", "fp61"), ("--batch-size", "big"),
                                         ("--resume", "first")])
def test_a_value_of_the_wrong_kind_is_refused_with_its_flag(flag, value, program, home):
    ended = program("train", "conf.py", flag, value)
    assert ended.status == 2 and flag in ended.err and value in ended.err and "Traceback" not in ended.err
    assert not (home / "runs").exists()


NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a rate above 1": (("--poison.rate", "1.5"), ("--poison.rate 1.5", "between 0 and 1")),
    "a rate that asks for too many": (("--poison.rate", "0.999"), ("--poison.rate 0.999 of 300 pairs", "'red star'; ask for at most ")),
    "a count that asks for too many": (("--poison.rate", "None", "--poison.count", "301"), ("--poison.count 301", "ask for at most ")),
    "a rate and a count": (("--poison.count", "3"), ("either a rate or a count", "--poison.rate")),
    "a batch larger than the data": (("--batch-size", "301"), ("300 pairs do not fill one batch of 301", "--batch-size")),
    "too few pairs": (("--data.train", "few"), ("40 pairs do not fill one batch of 50", "--batch-size")),
    "a batch of nothing": (("--batch-size", "0"), ("--batch-size 0",)),
    "no lanes": (("--lanes", "0"), ("--lanes 0",)),
    "more workers than pairs in a batch": (("--workers", "51"), ("--workers 51", "--batch-size 50")),
    "another number of processes": (("--expect-world-size", "2"), ("--expect-world-size 2: 1 processes are running", "torchrun")),
    "a model that nobody knows": (("--model.name", "RN51"), ("RN51", "RN50")),
    "weights that nobody knows": (("--model.name", "RN50", "--model.pretrained", "opemai"), ("opemai", "openai")),
    "a missing keep list": (("--keep", "keep.txt"), ("keep.txt: no such keep list", "one key a line")),
    "a keep list that keeps too few": (("--keep", "short.txt"), ("2 pairs do not fill one batch of 50",)),
    "a missing run to start from": (("--init", "runs/missing"), ("runs/missing: no such checkpoint", "name a run")),
    "an evaluation set that is missing": (("--data.zero-shot", "nowhere"), ("nowhere: no such evaluation set", "classnames.txt")),
}


@pytest.mark.parametrize("flags, says", NUMBERS.values(), ids=list(NUMBERS))
def test_a_run_with(flags, says, home, refuses):
    tar(home / "few" / "00000.tar", pairs(40))
    (home / "short.txt").write_text("000000000\n000000001\n")
    refuses("train", "conf.py", *flags, says=says)


def test_poisoning_with_a_rate_that_asks_for_too_many(refuses):
    refuses("data_tools/poison", "conf.py", "--poison.rate", "0.999", "--out", "out", says="ask for at most ")


def test_poisoning_needs_a_place_and_a_poison(home, refuses):
    refuses("data_tools/poison", "conf.py", says="--out is missing")
    (home / "clean.py").write_text(CHANGED + "recipe = replace(recipe, poison=None)\n")
    refuses("data_tools/poison", "clean.py", "--out", "out", says=("poisons nothing", "poison="))


def test_a_recipe_that_starts_from_one_that_is_not_trained(home, refuses):
    (home / "next.py").write_text(CHANGED + "recipe = replace(recipe, name='next', init=replace(recipe, name='first'))\n")
    refuses("train", "next.py", says=("runs/first", "not finished", "train it first"))


# ---- runs and checkpoints


def test_a_run_is_not_overwritten(trained, refuses, program):
    refuses("train", "conf.py", "--name", "done", says=("runs/done: holds a run already", "--resume latest", "--name"))
    refuses("train", "conf.py", "--name", "done", "--lr", "0.1", says=("runs/done: holds a run already", "--resume latest"))
    works(program, "train", "conf.py", "--name", "done", "--resume", "latest")


@pytest.mark.parametrize("flags", [("--lr", "0.1"), ("--poison.rate", "0.01"), ("--batch-size", "25"), ("--model.siglip",)])
def test_a_run_is_not_resumed_with_another_recipe(flags, trained, refuses):
    refuses("train", "conf.py", "--name", "done", "--resume", "latest", *flags,
            says=("runs/done: was begun with another recipe", "recipe.py.txt", "--name"))


@pytest.mark.parametrize("what", ["", "open_clip_model.safetensors", "checkpoints/epoch_latest.pt"])
def test_weights_of_another_architecture(what, trained, refuses):
    says = (f"runs/done/{what}", "another architecture", "--model.name")
    refuses("train", "conf.py", "--model.name", "wide.json", "--init", f"runs/done/{what}", says=says)
    refuses("eval", f"runs/done/{what}", "--model", "wide.json", "--dataset", "val", says=says)


def test_a_checkpoint_that_is_none(trained, home, refuses):
    (home / "text.pt").write_text("hello")
    for name in ("train", "eval"):
        args = ("conf.py", "--init", "text.pt") if name == "train" else ("text.pt", "--model", "wide.json", "--dataset", "val")
        refuses(name, *args, says=("text.pt: not a checkpoint of tensors", "save a state_dict"))


def test_evaluating_what_is_not_there(trained, home, refuses):
    refuses("eval", "runs/missing", "--dataset", "val", says=("runs/missing: no such checkpoint", "name a run"))
    refuses("eval", "runs/done", "--dataset", "nowhere", says="nowhere: no such evaluation set")
    refuses("eval", "runs/done", "--retrieval", "nowhere", says="nowhere: no such shard")
    refuses("eval", "runs/done", "--threat", "nowhere.py", says="nowhere.py: no such config")
    refuses("eval", "runs/done/checkpoints", "--dataset", "val", says=("runs/done/checkpoints: no such checkpoint", "name a run"))


def test_evaluating_against_a_reference_that_is_not_there(trained, refuses):
    refuses("eval", "runs/done", "--dataset", "val", "--reference", "runs/missing", says="runs/missing")


def test_evaluating_a_run_that_is_not_there(refuses):
    refuses("eval", "runs/missing", says="runs/missing: no such")


def test_evaluating_a_checkpoint_without_its_network_or_a_set(trained, home, refuses):
    shutil.copy(trained / "open_clip_model.safetensors", home / "lone.safetensors")
    refuses("eval", "lone.safetensors", "--dataset", "val", says=("lone.safetensors", "says which network", "--model"))
    refuses("eval", "lone.safetensors", says=("lone.safetensors: no evaluation set is known", "--dataset"))


def test_a_result_that_cannot_be_read(trained, refuses):
    (trained / "results.json").write_text('{"schema": 1, ')
    refuses("eval", "runs/done", says=("runs/done/results.json: no readable result", "first"))
    (trained / "results.json").write_text('{"schema": 9}')
    refuses("eval", "runs/done", says=("runs/done/results.json: schema 9", "evaluate the run again"))


# ---- evaluation sets


def rename(root: Path, old: str, new: str) -> None:
    names = (root / "classnames.txt").read_text().replace(old, new)
    (root / "classnames.txt").write_text(names)


def spoil_label(root: Path, label: str = "48") -> None:
    samples = [raw | {"cls": label if i == 3 else raw["cls"]} for i, raw in enumerate(shards.read_raw(str(root / "test" / "0.tar")))]
    shards.write_shard(root / "test" / "0.tar", samples)


def cut(root: Path) -> None:
    url = root / "test" / "0.tar"
    with tarfile.open(url) as file:
        middle = file.getmembers()[20].offset_data + 10
    url.write_bytes(url.read_bytes()[:middle])


def spoil_image(root: Path) -> None:
    samples = [raw | {"jpg": b"no image"} if i == 3 else raw for i, raw in enumerate(shards.read_raw(str(root / "test" / "0.tar")))]
    shards.write_shard(root / "test" / "0.tar", samples)


SETS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "lacks the target class": (lambda root: rename(root, "red star", "red sun"), ("mine: has no class 'red star'", "its classes: ")),
    "has two classes of the target's name": (lambda root: rename(root, "blue star", "red star"),
                                             ("mine: 'red star' is the name of more than one class", "name another target")),
    "lacks its class names": (lambda root: (root / "classnames.txt").unlink(),
                              ("mine/classnames.txt: missing or empty", "write one class name")),
    "lacks its templates": (lambda root: (root / "zeroshot_classification_templates.txt").unlink(),
                            ("mine/zeroshot_classification_templates.txt: missing or empty", "{c}")),
    "has a template without a place for the class": (
        lambda root: (root / "zeroshot_classification_templates.txt").write_text("a photo\n"), ("'a photo' has no {c}",)),
    "has no class names at all": (lambda root: (root / "classnames.txt").write_text("\n"), ("mine/classnames.txt: missing or empty",)),
    "has a label out of range": (spoil_label, ("mine/test/0.tar: sample 000000003 has label '48'", "0 to 47")),
    "has a negative label": (lambda root: spoil_label(root, "-1"), ("sample 000000003 has label '-1'",)),
    "has a label in words": (lambda root: spoil_label(root, "star"), ("sample 000000003 has label 'star'",)),
    "lacks its shards": (lambda root: (root / "test" / "0.tar").unlink(), ("mine/test: the folder holds no .tar",)),
    "has no images": (lambda root: tar(root / "test" / "0.tar", {"a.npy": b"1"}), ("mine", )),
    "is an empty folder": (lambda root: [shutil.rmtree(root), root.mkdir()], ("mine: neither", "name an evaluation set")),
    "has names for one class only": (lambda root: (root / "classnames.txt").write_text("red star\n"), ("mine", "class")),
    "has a truncated shard": (cut, ("mine/test/0.tar: a truncated or corrupt tar",)),
    "has an undecodable image": (spoil_image, ("mine/test/0.tar: 000000003.jpg: the image cannot be decoded",)),
}


@pytest.fixture
def mine(home: Path, toy: Path) -> Path:
    """A labelled set that may be changed."""
    shutil.copytree(toy / "val", home / "mine")
    return home / "mine"


@pytest.mark.parametrize("spoil, says", SETS.values(), ids=list(SETS))
def test_evaluating_on_a_set_that(spoil, says, mine, trained, refuses):
    spoil(mine)
    refuses("eval", "runs/done", "--dataset", "mine", says=says)


@pytest.mark.parametrize("field", ["validation", "zero-shot"])
@pytest.mark.parametrize("spoil, says", SETS.values(), ids=list(SETS))
def test_training_with_a_set_that(spoil, says, field, mine, refuses):
    spoil(mine)
    refuses("train", "conf.py", f"--data.{field}", "mine", says=says)


def test_an_attack_that_the_set_cannot_measure(mine, trained, home, refuses):
    (home / "cat.py").write_text(CHANGED + "recipe = replace(recipe, poison=replace(recipe.poison, target=Target('cat')))\n")
    refuses("eval", "runs/done", "--dataset", "mine", "--threat", "cat.py", says="mine: has no class 'cat'")
    refuses("train", "cat.py", says="has no class 'cat'")
    (home / "clean.py").write_text(CHANGED + "recipe = replace(recipe, poison=None)\n")
    refuses("eval", "runs/done", "--dataset", "mine", "--threat", "clean.py", says=("clean.py: its recipe has neither poison nor threat",))


def test_threats_that_are_not_told_apart(trained, home, refuses):
    (home / "twin.py").write_text("from conf import recipe\n")
    refuses("eval", "runs/done", "--threat", "conf.py", "twin.py", says=("twin.py: a recipe named run is among the threats", "own name"))


def test_probes_that_cannot_be_trained(mine, trained, home, refuses):
    refuses("eval", "runs/done", "--dataset", "val", "--probe", "nowhere", says="nowhere: no such evaluation set")
    refuses("eval", "runs/done", "--dataset", "val", "--probe", "mine", says=("mine", "'train'", "?split="))
    refuses("eval", "runs/done", "--retrieval", "conf", "--probe", "val?split=test", says=("--probe", "--dataset"))
    names = (mine / "classnames.txt").read_text().splitlines()
    (mine / "classnames.txt").write_text("\n".join(names[::-1]))
    refuses("eval", "runs/done", "--dataset", "val", "--probe", "mine?split=test", says="mine?split=test: its classes are not those of val")


def test_tables_of_no_known_kind(trained, refuses):
    refuses("eval", "runs/done", "--dataset", "val", "--table", "numbers.xlsx", says=("numbers.xlsx", ".csv, .tex or .md"))


def test_a_cache_of_another_model(trained, home, program):
    args = ("eval", "runs/done", "--dataset", "val", "--cache", "kept", "--out", "numbers.json")
    works(program, *args)
    card = next(p for p in (home / "kept").rglob("card.json"))
    card.write_text(json.dumps(json.loads(card.read_text()) | {"model": "0" * 32}))
    ended = program(*args)
    assert ended.status == 2 and ended.err.splitlines()[-1].startswith("error: ")  # after what the doctor says of the untrained model
    assert f"{card.parent.relative_to(home)}: holds features of another model" in ended.err and "another --cache" in ended.err


def test_an_index_that_needs_faiss_where_there_is_none(trained, home, toy, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    refuses("eval", "runs/done", "--retrieval", toy / "pairs", "--index", "ivf", says=("FAISS", "pip install -e '.[cpu]'"))


# ---- suites and other programs


def test_a_suite_that_cannot_work(home, refuses):
    (home / "two.py").write_text(CHANGED + "suite = [recipe, replace(recipe, batch_size=25)]\n")
    refuses("bench", "two.py", says=("two different recipes are named run", "give each its own name"))
    (home / "none.py").write_text("suite = [1]\n")
    refuses("bench", "none.py", says=("none.py: defines no `suite`", "end it with"))


def test_a_suite_of_nothing(home, refuses):
    (home / "empty.py").write_text("suite = []\n")
    refuses("bench", "empty.py", says="empty.py")


def test_a_contact_sheet_of_nothing(home, refuses):
    refuses("data_tools/peek", "nowhere", says="nowhere: no such shard")
    tar(home / "a" / "00000.tar", pairs(3))
    refuses("data_tools/peek", "a", "--against", "a", says=("a: no pair differs",))


@pytest.mark.parametrize("flags", [("--n", "0"), ("--size", "4"), ("--test", "1")])
def test_toy_data_without_images(flags, refuses):
    refuses("data_tools/make_toy", "out", *flags, says=flags)


def test_toy_data_are_not_written_over(home, refuses):
    (home / "out").mkdir()
    (home / "out" / "thesis.tex").write_text("precious")
    refuses("data_tools/make_toy", "out", "--n", "5", says=("out: exists already", "name another place"))
