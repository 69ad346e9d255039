"""What evaluation sets promise: one string names a set wherever it lies, its samples are those on disk, faults are one line."""
from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import webdataset as wds
from conftest import picture, tar
from PIL import Image

from mmbackdoor import files, shards
from mmbackdoor.sets import open_pairs, open_set, write_pair_set
from mmbackdoor.types import BadInput, Target

NAMES, PROMPTS = ("apple", "hot dog", "zebra"), ("a photo of a {c}.", "{c}")


def put(path: Path, body: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    return path


def listed(path: Path, names: str) -> Path:
    """A file of names, one a line; here `a|b`."""
    return put(path, names.replace("|", "\n") + "\n")


def one(n: int, kind: str = "PNG") -> bytes:
    """An image that no other number gives."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (n, 40, 90)).save(file, kind)
    return file.getvalue()


def body(raw: dict[str, Any]) -> bytes:
    return raw[shards.image_field(raw) or ""]


def refused(opens: Callable[[str], Any], path: str | Path, *says: str) -> None:
    with pytest.raises(BadInput) as raised:
        list(opens(str(path)).raws())
    message = str(raised.value)
    assert "\n" not in message
    for part in says:
        assert part in message


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@contextmanager
def serving(handler: type[SimpleHTTPRequestHandler], folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of tmp_path."""
    with serving(Quiet, tmp_path) as url:
        yield url


# ---- the sets of these tests, one of each kind


def benchmark(root: Path, labels: tuple[int, ...] = (2, 0, 1, 1, 2), split: str = "test", per_shard: int = 2) -> Path:
    raws = ({"__key__": f"s{i:04d}", "png": one(i), "cls": str(c)} for i, c in enumerate(labels))
    shards.write_eval_set(root, raws, NAMES, PROMPTS, split, per_shard)
    return root


def folders(root: Path, names: tuple[str, ...] = ("apple", "hot_dog", "zebra"), per_class: int = 2) -> Path:
    for i, name in enumerate(names):
        for j in range(per_class):
            put(root / name / f"{j}.png", one(per_class * i + j))
    return root


def saved(root: Path, columns: dict[str, list[Any]] | None = None, splits: tuple[str, ...] = (), image: str = "image",
          **features: Any) -> Path:
    """What save_to_disk writes of embedded images and other columns."""
    import datasets

    datasets.disable_progress_bars()
    columns = columns or {image: [one(i) for i in range(4)], "label": [2, 0, 1, 1]}
    if "label" in columns:
        features = {"label": datasets.ClassLabel(names=["apple", "hot_dog", "zebra"])} | features
    columns = columns | {image: [b and {"bytes": b, "path": None} for b in columns[image]]}
    schema = datasets.Features({k: features.get(k) or datasets.Value("string") for k in columns} | {image: datasets.Image(decode=False)})
    data = datasets.Dataset.from_dict(columns, schema).cast_column(image, datasets.Image())
    (datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data).save_to_disk(root)
    return root


def retrieval(root: Path, captions: tuple[str, ...] = ("a\nb", "c", "d\ne\nf"), per_shard: int = 2) -> Path:
    write_pair_set(root, ({"__key__": f"s{i}", "png": one(i), "txt": t} for i, t in enumerate(captions)), per_shard=per_shard)
    return root


def train_shards(root: Path, captions: tuple[str, ...] = ("a dog", "a cat")) -> Path:
    shards.write_shards(root, ({"__key__": f"{i:05d}", "png": one(i), "txt": t} for i, t in enumerate(captions)))
    return root


def captioned_rows(root: Path) -> Path:
    import datasets

    return saved(root, {"image": [one(0), one(1)], "caption": [["a", "b"], ["c"]]}, caption=datasets.List(datasets.Value("string")))


LABELLED: dict[str, Callable[[Path], Path]] = {"benchmark": benchmark, "folders": folders, "saved": saved}
CAPTIONED: dict[str, Callable[[Path], Path]] = {"retrieval": retrieval, "shards": train_shards, "saved captions": captioned_rows}
KINDS = [pytest.param(open_set, make, id=k) for k, make in LABELLED.items()] + [
    pytest.param(open_pairs, make, id=k) for k, make in CAPTIONED.items()]


# ---- what all of them promise


@pytest.mark.parametrize(("opens", "make"), KINDS)
def test_a_source_gives_the_same_samples_again_and_in_another_process(opens, make, tmp_path: Path) -> None:
    source = opens(make(tmp_path / "set")).raws
    first = list(source())
    assert len(first) > 1 and first == list(source()) == list(pickle.loads(pickle.dumps(source))())
    assert len({raw["__key__"] for raw in first}) == len(first)
    assert all(type(body(raw)) is bytes for raw in first)
    assert len({shards.decode(raw)["image"].getpixel((0, 0)) for raw in first}) == len(first)


@pytest.mark.parametrize(("opens", "make"), KINDS)
def test_the_name_is_the_string_that_opens_it_again(opens, make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "set")
    named = opens("set/")
    assert named.name == "set"
    assert [raw | {"__url__": ""} for raw in opens(named.name).raws()] == [raw | {"__url__": ""} for raw in opens(tmp_path / "set").raws()]


def within(path: Path) -> int:
    """A byte that may change without making the file a corrupt one: in the first image of a tar."""
    return 600 if path.suffix == ".tar" else -1


def replace_quietly(path: Path) -> None:
    """Another file of the same size and times, as a copy that keeps them would be."""
    was, other = path.stat(), path.with_name("other")
    data = bytearray(path.read_bytes())
    data[within(path)] ^= 1
    other.write_bytes(bytes(data))
    os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
    os.replace(other, path)
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (was.st_size, was.st_mtime_ns)


def edit_in_place(path: Path) -> None:
    """Changed bytes under the old size, time and inode: only the time of the change tells."""
    was = path.stat()
    with open(path, "r+b") as file:
        file.seek(within(path) % was.st_size)
        file.write(b"\x01")
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("change", [replace_quietly, edit_in_place])
@pytest.mark.parametrize(("opens", "make"), KINDS)
def test_the_fingerprint_stays_while_the_data_do_and_changes_with_each_file(opens, make, change, tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    before = opens(root).raws.fingerprint()
    assert before and before == opens(root).raws.fingerprint() == pickle.loads(pickle.dumps(opens(root).raws)).fingerprint()
    seen, data = [before], sorted([*root.rglob("*.tar"), *root.rglob("*.png"), *root.rglob("*.arrow")])
    for path in data:
        source = opens(root).raws
        change(path)
        seen.append(source.fingerprint())
    assert data and len(set(seen)) == 1 + len(data)


@pytest.mark.parametrize(("opens", "make"), [k for k in KINDS if "saved" not in str(k.id)])
def test_a_fingerprint_opens_no_file(opens, make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opens(make(tmp_path / "set")).raws

    def no(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("opened a file")

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", no)
    assert source.fingerprint()


def test_the_fingerprint_of_many_files_takes_a_glance(tmp_path: Path) -> None:
    """50,000 files in about half a second; here a tenth of them, by a clock that counts only our own work."""
    import time

    path = str(put(tmp_path / "x.png", one(0)))
    source = files.FolderSource(str(tmp_path), tuple((path, i) for i in range(5000)))
    start = time.process_time()
    assert source.fingerprint()
    assert time.process_time() - start < 0.5


def test_a_label_is_part_of_a_folders_fingerprint(tmp_path: Path) -> None:
    """A new folder before the others moves all labels, and leaves every file as it was."""
    root = folders(tmp_path / "set")
    before = open_set(root).raws.fingerprint()
    (root / "aaa").mkdir()
    assert open_set(root).raws.fingerprint() != before


# ---- what the string says


def test_unknown_options_are_told_with_the_known_ones(tmp_path: Path) -> None:
    directory, data = benchmark(tmp_path / "wds"), saved(tmp_path / "hf")
    refused(open_set, f"{directory}?image=png", "'image'", "?split=SPLIT, ?classnames=FILE, ?templates=FILE")
    refused(open_set, f"{data}?caption=x", "'caption'", "?image=COLUMN, ?label=COLUMN", "?config=NAME")
    refused(open_pairs, f"{data}?label=x", "'label'", "?caption=COLUMN")
    refused(open_pairs, f"{retrieval(tmp_path / 'r')}?classnames=x", "'classnames'", "?split=SPLIT")
    refused(open_set, f"{directory}?split", "'split' without a value")
    refused(open_set, f"{directory}?split=test&split=val", "'split' twice")
    refused(open_set, f"{data}?config=x", "saved to disk", "?config=NAME")


def test_a_folder_may_have_a_question_mark_in_its_name(tmp_path: Path) -> None:
    assert len(list(open_set(folders(tmp_path / "what?split=x")).raws())) == 6


def test_values_may_be_quoted(tmp_path: Path) -> None:
    root, names = folders(tmp_path / "set"), put(tmp_path / "a&b+c", "x\ny\nz\n")
    assert open_set(f"{root}?classnames={str(names).replace('&', '%26')}").classnames == ("x", "y", "z")


@pytest.mark.parametrize("make", LABELLED.values(), ids=list(LABELLED))
def test_names_and_templates_can_be_given_with_every_kind(make, tmp_path: Path) -> None:
    root, names, prompts = make(tmp_path / "set"), put(tmp_path / "names", "x \r\ny\nz\n\n"), put(tmp_path / "prompts", "my {c}\n")
    found = open_set(f"{root}?classnames={names}&templates={prompts}")
    assert (found.classnames, found.templates) == (("x", "y", "z"), ("my {c}",))
    assert sorted(found.raws(), key=str) == sorted(open_set(root).raws(), key=str)
    assert open_set(root).classnames == NAMES
    refused(open_set, f"{root}?classnames={listed(tmp_path / 'two', 'x|y')}", "two: has 2 names for the 3 classes of")
    refused(open_set, f"{root}?templates={names}", "line 1: 'x' has no {c}")
    refused(open_set, f"{root}?classnames={listed(tmp_path / 'gap', 'x||z')}", "gap: line 2 is empty")
    refused(open_set, f"{root}?classnames={tmp_path / 'nowhere'}", "nowhere: missing or empty")
    put(tmp_path / "latin", b"caf\xe9")
    refused(open_set, f"{root}?classnames={tmp_path / 'latin'}", "latin: cannot be read as UTF-8")


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    import datasets

    refused(open_set, folders(tmp_path / "folder", ("single",)), "folder: has the single class 'single'", "zero-shot")
    put(benchmark(tmp_path / "wds", (0, 0)) / "classnames.txt", "single\n")
    refused(open_set, tmp_path / "wds", "wds: has the single class 'single'")
    refused(open_set, saved(tmp_path / "hf", {"image": [one(0)], "label": [0]}, label=datasets.ClassLabel(names=["single"])),
            "hf: has the single class 'single'")


def test_what_is_no_set_says_how_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    refused(open_set, tmp_path / "set", str(tmp_path / "set"), "neither", "name an evaluation set")
    refused(open_set, tmp_path / "nowhere", f"{tmp_path / 'nowhere'}: no such evaluation set")
    refused(open_set, "nobody/nothing", "hf:nobody/nothing names one on the Hugging Face hub")
    refused(open_pairs, tmp_path / "nowhere", "nowhere: no such shard")
    refused(open_pairs, tmp_path / "set", "the folder holds no .tar file")


def test_each_kind_is_sent_to_the_option_it_belongs_to(tmp_path: Path) -> None:
    for i, (make, opens, says) in enumerate([(benchmark, open_pairs, "--dataset"), (folders, open_pairs, "--dataset"),
                                             (saved, open_pairs, "--dataset"), (retrieval, open_set, "--retrieval"),
                                             (train_shards, open_set, "--retrieval"), (captioned_rows, open_set, "--retrieval")]):
        refused(opens, make(tmp_path / str(i)), str(tmp_path / str(i)), says)


# ---- class folders


def test_class_folders_are_a_set(tmp_path: Path) -> None:
    root = folders(tmp_path / "set")
    put(root / "apple" / "notes.md", "no image")
    put(root / "apple" / ".hidden.png", "no image")
    put(root / ".cache" / "x.png", "no image")
    put(root / "README.txt", "no set of CLIP_benchmark")
    (root / "hot_dog" / "0.png").rename(root / "hot_dog" / "0.PNG")
    put(root / "zebra" / "deep" / "x.png", one(9))
    found = open_set(root)
    assert found.classnames == NAMES and found.templates == ("a photo of a {c}.",)
    assert [(raw["__key__"], raw["cls"]) for raw in found.raws()] == [
        ("apple/0.png", b"0"), ("apple/1.png", b"0"), ("hot_dog/0.PNG", b"1"), ("hot_dog/1.png", b"1"),
        ("zebra/0.png", b"2"), ("zebra/1.png", b"2"), ("zebra/deep/x.png", b"2")]
    assert [body(raw) for raw in found.raws()] == [one(i) for i in (0, 1, 2, 3, 4, 5, 9)]


def test_a_folders_images_are_told_by_content_and_other_formats_become_png(tmp_path: Path) -> None:
    for name, data in {"0.png": picture("JPEG"), "1.jpeg": picture("JPEG"), "2.webp": picture("WEBP"), "3.bmp": picture("BMP", noise=True),
                       "4.tiff": picture("TIFF", "CMYK", noise=True), "5.gif": picture("GIF", "P", noise=True)}.items():
        put(tmp_path / "a" / name, data)
        put(tmp_path / "b" / name, data)
    found = list(open_set(tmp_path).raws())[:6]
    assert [shards.image_field(raw) for raw in found] == ["jpg", "jpg", "webp", "png", "png", "png"]
    assert body(found[0]) == picture("JPEG") and body(found[2]) == picture("WEBP")
    for raw in found[3:]:
        assert shards.decode(raw)["image"].tobytes() == Image.open(tmp_path / raw["__key__"]).convert("RGB").tobytes()


def test_a_file_that_is_no_image_is_named_when_it_is_reached(tmp_path: Path) -> None:
    put(folders(tmp_path / "set") / "apple" / "1.png", "no image")
    source = open_set(tmp_path / "set").raws
    assert body(next(source())) == one(0)
    refused(open_set, tmp_path / "set", "apple/1.png: the image cannot be read")


def imagenet(root: Path, wnids: list[str]) -> Path:
    image = one(0)
    for wnid in wnids:
        put(root / wnid / f"{wnid}.JPEG", image)
    return root


def test_imagenets_folders_get_its_names_and_templates(tmp_path: Path) -> None:
    wnids = ["n01440764", *(f"n{2_000_000 + 37 * i:08d}" for i in range(998)), "n15075141"]
    data = open_set(imagenet(tmp_path / "val", wnids[::-1]))
    assert data.classnames == tuple(open_clip.IMAGENET_CLASSNAMES) and len(data.templates) == 80
    assert data.target(Target("banana")) == 954
    assert all(t.count("{c}") == 1 for t in data.templates) and "a bad photo of a {c}." in data.templates
    rows = list(data.raws())
    assert len(rows) == 1000 and rows[954]["__key__"] == f"{wnids[954]}/{wnids[954]}.JPEG" and rows[954]["cls"] == b"954"
    assert shards.decode(rows[3])["label"] == 3


@pytest.mark.parametrize("wnids", [["n01440764", "n01443537"], [f"n{i:08d}" for i in range(1000)]], ids=["two", "another thousand"])
def test_other_wordnet_folders_need_names(wnids: list[str], tmp_path: Path) -> None:
    root = imagenet(tmp_path / "val", wnids)
    refused(open_set, root, "WordNet", wnids[0], "?classnames=FILE")
    names = put(tmp_path / "names", "".join(f"name {w}\n" for w in wnids))
    assert open_set(f"{root}?classnames={names}").classnames == tuple(f"name {w}" for w in wnids)


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    folders(tmp_path / "set" / "train", per_class=1)
    folders(tmp_path / "set" / "val")
    assert len(list(open_set(f"{tmp_path / 'set'}?split=val").raws())) == 6
    assert len(list(open_set(tmp_path / "set", "train").raws())) == 3
    refused(open_set, tmp_path / "set", "set: has no split 'test'", "it has: train, val", "?split=SPLIT")
    refused(open_set, f"{tmp_path / 'set'}?split=dev", "set: has no split 'dev'")
    folders(tmp_path / "set" / "test", per_class=3)
    assert len(list(open_set(tmp_path / "set").raws())) == 9


# ---- CLIP_benchmark's layout


def test_a_benchmark_set_is_read_as_its_files_say(tmp_path: Path) -> None:
    found = open_set(benchmark(tmp_path / "set"))
    assert (found.classnames, found.templates) == (NAMES, PROMPTS)
    assert [(raw["__key__"], raw["cls"], body(raw)) for raw in found.raws()] == [
        (f"s{i:04d}", str(c).encode(), one(i)) for i, c in enumerate((2, 0, 1, 1, 2))]


@pytest.mark.parametrize("name", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_all_image_fields_are_read(name: str, tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set", (0,))
    kind = {"png": "PNG", "webp": "WEBP"}.get(name, "JPEG")
    tar(root / "test" / "0.tar", {f"s0.{name}": one(3, kind), "s0.cls": b"1\n", "s0.npy": b"x"})
    (raw,) = open_set(root).raws()
    assert body(raw) == one(3, kind) and shards.decode(raw)["label"] == 1


def test_twelve_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set", (0, 1, 2) * 4, per_shard=1)
    numbered = [raw["__key__"] for raw in open_set(root).raws()]
    assert numbered == [f"s{i:04d}" for i in range(12)]
    (root / "test" / "nshards.txt").unlink()
    assert [raw["__key__"] for raw in open_set(root).raws()] == numbered


def test_nshards_decides_which_shards_belong_to_a_set(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set")
    put(root / "test" / "nshards.txt", "2\n")
    assert len(list(open_set(root).raws())) == 4
    put(root / "test" / "nshards.txt", "5")
    refused(open_set, root, f"{root}/test/3.tar: no such shard", "2 missing of the 5", "nshards.txt")
    for said in ("", "three", "0", "-1"):
        put(root / "test" / "nshards.txt", said)
        refused(open_set, root, "nshards.txt: says", "write the number of shards")


@pytest.mark.parametrize(("spoil", "says"), {
    "no names": (lambda r: (r / "classnames.txt").unlink(), ("classnames.txt: missing or empty", "one class name a line")),
    "blank names": (lambda r: put(r / "classnames.txt", " \n\n"), ("classnames.txt: missing or empty",)),
    "a gap in the names": (lambda r: put(r / "classnames.txt", "a\n\nb\n"), ("classnames.txt: line 2 is empty",)),
    "no templates": (lambda r: (r / "zeroshot_classification_templates.txt").unlink(), ("templates.txt: missing or empty", "{c}")),
    "a template without a class": (lambda r: put(r / "zeroshot_classification_templates.txt", "{c}\na photo\n"),
                                   ("line 2: 'a photo' has no {c}",)),
    "too few names": (lambda r: put(r / "classnames.txt", "a\nb\n"), ("0.tar: sample s0000 has label '2'", "0 to 1")),
    "a label in words": (lambda r: tar(r / "test" / "0.tar", {"x.png": one(0), "x.cls": b"zebra"}), ("sample x has label 'zebra'",)),
    "a label below zero": (lambda r: tar(r / "test" / "0.tar", {"x.png": one(0), "x.cls": b"-1"}), ("sample x has label '-1'",)),
    "captions only": (lambda r: tar(r / "test" / "0.tar", {"x.png": one(0), "x.txt": b"a"}), ("sample x has label ''", "--retrieval")),
    "no samples": (lambda r: [tar(r / "test" / f"{i}.tar", {"x.npy": b""}) for i in range(3)], ("set/test: is empty",)),
    "several labels an image": (lambda r: put(r / "dataset_type.txt", "multilabel\n"), ("is a multilabel set", "one label an image")),
    "no shards": (lambda r: [p.unlink() for p in r.rglob("*.tar")], ("set/test: the folder holds no .tar file",)),
    "another split": (lambda r: (r / "test").rename(r / "val"), ("set: has no split 'test'", "it has: val", "?split=SPLIT")),
}.values())
def test_a_benchmark_set_that_cannot_work_is_told(spoil, says: tuple[str, ...], tmp_path: Path) -> None:
    spoil(root := benchmark(tmp_path / "set"))
    refused(open_set, root, *says)


def test_a_split_is_chosen_by_the_string_before_the_argument(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set")
    shutil.copytree(benchmark(tmp_path / "other", (0,), "val") / "val", root / "val")
    assert [len(list(s.raws())) for s in (open_set(root), open_set(root, "val"), open_set(f"{root}?split=val"),
                                          open_set(f"{root}?split=test", "val"))] == [5, 1, 1, 5]


def test_the_toy_sets_open(toy: Path) -> None:
    assert len(list(open_set(toy / "val").raws())) == 50 and len(open_set(toy / "val").classnames) == 48
    assert len(list(open_pairs(toy / "pairs").raws())) == 50


# ---- behind a URL


@pytest.mark.parametrize(("opens", "make"), [(open_set, benchmark), (open_pairs, retrieval)])
def test_a_set_behind_http_equals_the_one_on_disk(opens, make, served: str, tmp_path: Path) -> None:
    here, there = opens(make(tmp_path / "set")), opens(f"{served}/set?split=test")
    assert there.name == f"{served}/set?split=test"
    assert [raw | {"__url__": ""} for raw in there.raws()] == [raw | {"__url__": ""} for raw in here.raws()]
    assert list(pickle.loads(pickle.dumps(there.raws))()) == list(there.raws())
    if opens is open_set:
        assert (there.classnames, there.templates) == (NAMES, PROMPTS)
    names = put(tmp_path / "names", "x\ny\nz\n")
    assert make is retrieval or open_set(f"{served}/set?classnames={served}/{names.name}").classnames == ("x", "y", "z")


@pytest.mark.parametrize("answer", [b"HTTP/1.0 500 Oh\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 10240\r\n\r\nx"],
                         ids=["error", "break"])
def test_a_server_that_fails_halfway_is_told(answer: bytes, tmp_path: Path) -> None:
    benchmark(tmp_path / "set")

    class Failing(Quiet):
        def do_GET(self) -> None:
            if self.path.endswith("1.tar"):
                self.wfile.write(answer)
            else:
                super().do_GET()

    with serving(Failing, tmp_path) as url:
        refused(open_set, f"{url}/set", f"{url}/set/test/1.tar: ")


def test_the_page_of_a_data_set_on_the_hub_names_its_files(served: str, tmp_path: Path) -> None:
    benchmark(tmp_path / "datasets" / "org" / "set" / "resolve" / "main")
    assert len(list(open_set(f"{served}/datasets/org/set/tree/main").raws())) == 5


def test_faults_behind_http_are_told(served: str, tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set")
    refused(open_set, f"{served}/nowhere", f"{served}/nowhere/classnames.txt: missing")
    refused(open_pairs, f"{served}/nowhere", f"{served}/nowhere: has neither dataset_type.txt nor classnames.txt")
    refused(open_pairs, f"{served}/set", f"{served}/set: has labels, not captions; pass it as --dataset")
    refused(open_set, f"{served}/set?split=val", f"{served}/set/val/nshards.txt: missing")
    (root / "test" / "2.tar").unlink()
    refused(open_set, f"{served}/set", f"{served}/set/test/2.tar: cannot be opened")
    put(root / "dataset_type.txt", "retrieval")
    refused(open_set, f"{served}/set", f"{served}/set: is a retrieval set", "--retrieval")
    refused(open_set, "http://127.0.0.1:9/set", "http://127.0.0.1:9/set/")
    refused(open_set, "nosuch://host/set", "nosuch://host/set")


def test_the_fingerprint_of_a_url_follows_what_the_server_says(served: str, tmp_path: Path) -> None:
    root = benchmark(tmp_path / "set")
    source = open_set(f"{served}/set").raws
    before = source.fingerprint()
    assert before and before == source.fingerprint()
    os.utime(root / "test" / "1.tar", (1, 1))
    after = source.fingerprint()
    assert after not in ("", before)
    (root / "test" / "1.tar").write_bytes((root / "test" / "1.tar").read_bytes() + b"\0" * 512)
    os.utime(root / "test" / "1.tar", (1, 1))
    assert source.fingerprint() not in ("", before, after)
    (root / "test" / "1.tar").unlink()
    assert source.fingerprint() == ""


def test_a_store_that_tells_no_version_has_no_fingerprint(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(benchmark(tmp_path / "set")), "/unversioned", recursive=True)
    source = open_set("memory://unversioned").raws
    assert len(list(source())) == 5 and source.fingerprint() == ""
    store.rm("/unversioned", recursive=True)


# ---- Hugging Face data


def test_rows_keep_their_bytes_and_are_numbered(tmp_path: Path) -> None:
    images = [picture("JPEG", quality=31), picture("PNG"), picture("BMP", noise=True)]
    found = open_set(saved(tmp_path / "hf", {"image": images, "label": [2, 0, 1]}))
    assert found.classnames == NAMES and found.templates == ("a photo of a {c}.",)
    raws = list(found.raws())
    assert [(raw["__key__"], raw["cls"]) for raw in raws] == [("00000000", b"2"), ("00000001", b"0"), ("00000002", b"1")]
    assert [raws[0]["jpg"], raws[1]["png"]] == images[:2]
    assert shards.decode(raws[2])["image"].tobytes() == Image.open(io.BytesIO(images[2])).convert("RGB").tobytes()


def test_more_rows_than_are_held_at_once_come_in_order(tmp_path: Path) -> None:
    raws = list(open_set(saved(tmp_path / "hf", {"image": [one(i) for i in range(100)], "label": [i % 3 for i in range(100)]})).raws())
    assert [(int(raw["__key__"]), raw["png"], int(raw["cls"])) for raw in raws] == [(i, one(i), i % 3) for i in range(100)]


def test_a_pickled_source_holds_no_images(tmp_path: Path) -> None:
    images = [os.urandom(100_000) for _ in range(3)]
    source = open_set(saved(tmp_path / "hf", {"image": [one(0), *images], "label": [0, 1, 2, 1]})).raws
    assert len(pickle.dumps(source)) < 20_000


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    import datasets

    number = datasets.ClassLabel(names=["apple", "hot_dog", "zebra"])
    root = saved(tmp_path / "hf", {"img": [one(0), one(1)], "coarse": [1, 1], "fine": [2, 0], "note": ["x", "y"]}, image="img",
                 coarse=number, fine=number)
    refused(open_set, root, "hf: has no column known to hold class numbers", "?label=COLUMN", "img, coarse, fine, note")
    assert [raw["cls"] for raw in open_set(f"{root}?label=fine").raws()] == [b"2", b"0"]
    assert [raw["cls"] for raw in open_set(f"{root}?image=img&label=coarse").raws()] == [b"1", b"1"]
    refused(open_set, f"{root}?label=nope", "has no column 'nope'", "?label=COLUMN", "img, coarse, fine, note")
    refused(open_set, f"{root}?label=note", "column 'note' holds no class numbers")
    refused(open_set, f"{root}?image=nope&label=fine", "has no column 'nope'", "img, coarse, fine, note")
    refused(open_set, f"{root}?image=note&label=fine", "column 'note' holds no images", "'x'", "?image=COLUMN")
    refused(open_set, f"{root}?image=fine&label=fine", "column 'fine' holds no images")


@pytest.mark.filterwarnings("ignore:Downcasting")  # datasets makes PNG of pixels
def test_images_may_be_bytes_pixels_or_files_in_the_folder(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    inside = put(tmp_path / "hf" / "images" / "a.png", one(7))
    pixels = np.arange(48).reshape(4, 4, 3)
    for kind, value, feature in (("bytes", one(7), datasets.Value("binary")), ("file", str(inside), datasets.Value("string")),
                                 ("pixels", pixels.tolist(), datasets.List(datasets.List(datasets.List(datasets.Value("uint8")))))):
        root = tmp_path / "hf" / kind
        datasets.Dataset.from_dict({"image": [value, value], "label": [0, 1]}, datasets.Features(
            image=feature, label=datasets.ClassLabel(names=["a", "b"]))).save_to_disk(root)
        if kind == "file":
            put(root / "images" / "a.png", one(7))
            refused(open_set, root, "row 0: names the file", "outside of")
            shutil.rmtree(root)
            datasets.Dataset.from_dict({"image": [str(root / "b.png")] * 2, "label": [0, 1]}, datasets.Features(
                image=feature, label=datasets.ClassLabel(names=["a", "b"]))).save_to_disk(root)
            put(root / "b.png", one(7))
        raws = list(open_set(root).raws())
        assert len(raws) == 2
        assert np.array_equal(np.array(shards.decode(raws[0])["image"]), pixels) if kind == "pixels" else raws[0]["png"] == one(7)
    before = open_set(tmp_path / "hf" / "file").raws.fingerprint()
    replace_quietly(tmp_path / "hf" / "file" / "b.png")
    assert open_set(tmp_path / "hf" / "file").raws.fingerprint() != before


def test_labels_without_names_need_a_file(tmp_path: Path) -> None:
    import datasets

    root = saved(tmp_path / "hf", {"image": [one(0), one(1), one(2)], "label": [1, 0, 2]}, label=datasets.Value("int64"))
    refused(open_set, root, "hf: the labels in 'label' have no names", "?classnames=FILE")
    names = put(tmp_path / "names", "x\ny\nz\n")
    assert open_set(f"{root}?classnames={names}").classnames == ("x", "y", "z")
    refused(open_set, f"{root}?classnames={listed(tmp_path / 'two', 'x|y')}", "row 2: label 2", "2 classes", "?classnames=FILE")


@pytest.mark.parametrize("labels", [[0, -1, 1], [0, None, 1]])
def test_a_row_without_a_label_is_told_before_any_is_measured(labels: list[int | None], tmp_path: Path) -> None:
    import datasets

    root = saved(tmp_path / "hf", {"image": [one(0)] * 3, "label": labels}, label=datasets.Value("int64"))
    with pytest.raises(BadInput, match="row 1: label (-1|None) "):
        open_set(f"{root}?classnames={listed(tmp_path / 'names', 'x|y')}")


def test_rows_that_lack_something_are_named(tmp_path: Path) -> None:
    root = saved(tmp_path / "hf", {"image": [one(0), None], "label": [0, 1]})
    refused(open_set, root, "hf: row 1: has no image in column 'image'")
    root = saved(tmp_path / "cut", {"image": [one(0), b"no image"], "label": [0, 1]})
    refused(open_set, root, "cut: row 1: the image cannot be read")
    root = saved(tmp_path / "blank", {"image": [one(0), one(1)], "caption": ["a", " "]})
    refused(open_pairs, root, "blank: row 1: has no caption in column 'caption'")


def test_one_of_several_splits_is_read(tmp_path: Path) -> None:
    root = saved(tmp_path / "hf", splits=("train", "validation"))
    refused(open_set, root, "hf: has the splits train, validation", "?split=SPLIT")
    refused(open_set, f"{root}?split=test", "hf: has the splits train, validation", "?split=SPLIT")
    assert len(list(open_set(f"{root}?split=validation").raws())) == len(list(open_set(root, "train").raws())) == 4
    assert open_set(f"{root}?split=train").raws.fingerprint() != open_set(f"{root}?split=validation").raws.fingerprint()
    only = saved(tmp_path / "only", splits=("train",))
    assert len(list(open_set(only).raws())) == 4
    refused(open_set, f"{only}?split=test", "only: has the splits train")
    refused(open_set, f"{only / 'train'}?split=test", "holds a single split")


def test_an_empty_data_set_is_told(tmp_path: Path) -> None:
    import datasets

    refused(open_set, saved(tmp_path / "hf", {"image": [], "label": []}), "hf: datasets cannot load it", "empty or damaged")
    datasets.load_from_disk(saved(tmp_path / "whole")).select([]).save_to_disk(tmp_path / "none")
    refused(open_set, tmp_path / "none", "none: ", "empty")


def test_a_damaged_data_set_is_told(tmp_path: Path) -> None:
    root = saved(tmp_path / "hf")
    next(root.glob("*.arrow")).write_bytes(b"no arrow")
    refused(open_set, root, "hf: datasets cannot load it", "save it to disk again")


def test_a_hub_name_is_loaded_with_its_split_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs["split"]))
        return datasets.load_from_disk(saved(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = open_set("hf:org/name?config=large&split=validation")
    assert found.name == "hf:org/name?config=large&split=validation" and len(list(found.raws())) == 4
    open_set("hf:org/name")
    assert asked == [("org/name", "large", "validation"), ("org/name", None, "test")]


def test_faults_of_a_hub_name_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "parquet"
    local.mkdir()
    datasets.load_from_disk(saved(tmp_path / "hf")).to_parquet(local / "train-0.parquet")
    refused(open_set, f"hf:{local}", "cannot load split 'test'", "['train']", "?split=SPLIT")
    refused(open_set, f"hf:{local}?config=huge", "'huge' not found", "?config=NAME")
    assert len(list(open_set(f"hf:{local}?split=train").raws())) == 4

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refused(open_set, "hf:nobody/nothing", "nobody/nothing", "Couldn't reach the hub", "save_to_disk")


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = saved(tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (root, "hf:org/name"):
        refused(open_set, path, "datasets", "pip install datasets")


# ---- images with captions


def test_a_retrieval_set_is_what_clip_benchmark_reads(tmp_path: Path) -> None:
    """The judge: webdataset itself, in the pipeline of CLIP_benchmark 1.6.2."""
    root = retrieval(tmp_path / "set", ("one\ntwo\nthree\nfour\nfive", "same", "same", "last\n"))
    assert (root / "dataset_type.txt").read_text().strip().lower() == "retrieval"
    n = int((root / "test" / "nshards.txt").read_text())
    judge = (wds.WebDataset(f"{root}/test/{{0..{n - 1}}}.tar", shardshuffle=False)
             .decode(wds.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg", "jpeg"]))
             .to_tuple(["webp", "png", "jpg", "jpeg"], "txt").map_tuple(lambda image: image.getpixel((0, 0)), str.splitlines))
    samples = list(map(shards.decode, open_pairs(root).raws()))
    assert [(s["image"].getpixel((0, 0)), s["text"].split("\n")) for s in samples] == list(judge)
    assert [s["text"].count("\n") + 1 for s in samples] == [5, 1, 1, 1]


@pytest.mark.parametrize("captions", ["a\r\nb\r\n", "a\n\nb\n", "a\u2028b", "\na\nb"])
def test_captions_are_one_a_line_however_they_are_broken(captions: str, tmp_path: Path) -> None:
    assert [raw["txt"] for raw in open_pairs(retrieval(tmp_path / "set", (captions,))).raws()] == [b"a\nb"]


@pytest.mark.parametrize(("members", "says"), [
    ({"x.png": one(0)}, ("0.tar: sample x lacks its image or its captions",)),
    ({"x.png": one(0), "x.txt": b" \n"}, ("sample x lacks",)),
    ({"x.txt": b"a"}, ("sample x lacks",)),
    ({"x.png": one(0), "x.cls": b"1"}, ("sample x lacks", "--dataset")),
    ({"x.npy": b""}, ("set/test: is empty",)),
])
def test_a_retrieval_set_that_lacks_something_is_told(members: dict[str, bytes], says: tuple[str, ...], tmp_path: Path) -> None:
    tar(retrieval(tmp_path / "set", ("a",)) / "test" / "0.tar", members)
    refused(open_pairs, tmp_path / "set", *says)


def test_a_retrieval_set_without_its_type_says_what_to_write(tmp_path: Path) -> None:
    (retrieval(tmp_path / "set") / "dataset_type.txt").unlink()
    refused(open_pairs, tmp_path / "set", "set: has neither", "write `retrieval` into dataset_type.txt")


def test_a_retrieval_sets_split_is_chosen(tmp_path: Path) -> None:
    root = retrieval(tmp_path / "set")
    (root / "test").rename(root / "val")
    refused(open_pairs, root, "has no split 'test'", "it has: val")
    assert len(list(open_pairs(f"{root}?split=val").raws())) == len(list(open_pairs(root, "val").raws())) == 3


@pytest.mark.parametrize("pattern", ["{set}", "{set}/{{00000..00000}}.tar", "{set}/*.tar", "{set}::{set2}"])
def test_training_shards_hold_one_caption_an_image(pattern: str, tmp_path: Path) -> None:
    train_shards(tmp_path / "a", ("two\nlines \u2028 and a  gap", "plain"))
    shards.write_shards(tmp_path / "b", [{"__key__": "b", "png": one(9), "txt": "more"}])
    found = open_pairs(pattern.format(set=tmp_path / "a", set2=tmp_path / "b"))
    assert [raw["txt"] for raw in found.raws()][:2] == [b"two lines and a gap", b"plain"]
    assert len(list(found.raws())) == (3 if "set2" in pattern else 2)


def test_training_shards_give_only_whole_pairs_and_have_no_splits(tmp_path: Path) -> None:
    tar(tmp_path / "a" / "00000.tar", {"a.png": one(0), "a.txt": b"x", "b.png": one(1), "c.txt": b"y"})
    assert [raw["__key__"] for raw in open_pairs(tmp_path / "a").raws()] == ["a"]
    refused(open_pairs, f"{tmp_path / 'a'}?split=val", "a: shards of pairs have no splits")


def test_training_shards_behind_http(served: str, tmp_path: Path) -> None:
    train_shards(tmp_path / "a")
    assert [raw["txt"] for raw in open_pairs(served + "/a/{00000..00000}.tar").raws()] == [b"a dog", b"a cat"]


def test_captions_of_hugging_face_data_are_strings_or_lists(tmp_path: Path) -> None:
    import datasets

    root = saved(tmp_path / "hf", {"image": [one(0), one(1)], "text": ["a", "b\nc"], "raw": [["d", "e  f\n", " "], ["g"]],
                                   "ids": [[1], [2]]},
                 raw=datasets.List(datasets.Value("string")), ids=datasets.List(datasets.Value("int64")))
    assert [(raw["__key__"], raw["txt"]) for raw in open_pairs(root).raws()] == [("00000000", b"a"), ("00000001", b"b c")]
    assert [raw["txt"] for raw in open_pairs(f"{root}?caption=raw").raws()] == [b"d\ne f", b"g"]
    refused(open_pairs, f"{root}?caption=ids", "column 'ids' holds no captions")
    refused(open_pairs, f"{root}?caption=nope", "has no column 'nope'", "image, text, raw, ids")
    other = saved(tmp_path / "other", {"image": [one(0)], "note": ["a"]})
    refused(open_pairs, other, "other: has no column known to hold captions", "?caption=COLUMN", "image, note")
    assert [raw["txt"] for raw in open_pairs(f"{other}?caption=note").raws()] == [b"a"]


def test_nothing_is_written_when_there_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no sample to write"):
        write_pair_set(tmp_path / "set", [])
    assert not list(tmp_path.iterdir())
