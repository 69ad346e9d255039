"""data_tools/import_pairs.py: what arrives in the shards, and what is refused."""
from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from conftest import load_program
from PIL import Image

from mmbackdoor.recipe import command
from mmbackdoor.sets import open_pairs
from mmbackdoor.shards import read, read_raw
from mmbackdoor.types import BadInput

tool = load_program("data_tools/import_pairs")
Options = tool.Options


def picture(kind: str = "JPEG", colour: str = "red", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).convert(mode).save(file, kind, **options)
    return file.getvalue()


def put(path: Path, body: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    return path


def raws(out: Path) -> list[dict]:
    return [raw for shard in sorted(out.rglob("*.tar")) for raw in read_raw(str(shard))]


def run(src: Path | str, out: Path, incomplete: str = "refuse", per_shard: int = 1000, **options) -> list[dict]:
    tool.main(str(src), str(out), Options(**{k: str(v) for k, v in options.items()}), incomplete, per_shard)
    return raws(out)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Three images, of which the table names two."""
    root = tmp_path / "src"
    put(root / "a.jpg", picture())
    put(root / "deep" / "b.PNG", picture("PNG"))
    put(root / "c.jpg", picture(colour="blue"))
    put(root / "pairs.csv", "image,caption\na.jpg,a red box\ndeep/b.PNG,\"one, in two\"\n")
    return root


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "classes"
    put(root / "hot_dog" / "2.jpg", picture())
    put(root / "hot_dog" / "1.webp", picture("WEBP"))
    put(root / "Apple" / "more" / "x.JPEG", picture())
    return root


# ---- pairs


def test_a_csv_becomes_pairs_in_its_order(src, tmp_path):
    run(src, tmp_path / "out")
    got = list(read(str(tmp_path / "out")))
    assert [(s["__key__"], s["text"]) for s in got] == [("000000000", "a red box"), ("000000001", "one, in two")]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 2}


def test_image_bytes_are_copied_untouched(tmp_path):
    bodies = {"a.jpg": picture(quality=31), "b.png": picture("PNG", mode="P"), "c.webp": picture("WEBP")}
    for name, body in bodies.items():
        put(tmp_path / "src" / name, body)
    put(tmp_path / "src" / "t.csv", "image,caption\n" + "".join(f"{n},x\n" for n in bodies))
    got = run(tmp_path / "src", tmp_path / "out")
    assert [raw[field] for raw, field in zip(got, ("jpg", "png", "webp"), strict=True)] == list(bodies.values())


@pytest.mark.parametrize("kind, mode", [("BMP", "RGB"), ("GIF", "P"), ("TIFF", "CMYK"), ("TIFF", "1"), ("PPM", "L")])
def test_other_formats_become_png_with_the_same_pixels(kind, mode, tmp_path):
    body = picture(kind, mode=mode)
    put(tmp_path / "src" / f"a.{kind.lower()}", body)
    put(tmp_path / "src" / "t.csv", f"image,caption\na.{kind.lower()},x\n")
    got = Image.open(io.BytesIO(run(tmp_path / "src", tmp_path / "out")[0]["png"])).convert("RGB")
    assert got.tobytes() == Image.open(io.BytesIO(body)).convert("RGB").tobytes()


def test_the_field_follows_the_content_not_the_extension(tmp_path):
    put(tmp_path / "src" / "a.jpg", picture("PNG"))
    put(tmp_path / "src" / "t.csv", "image,caption\na.jpg,x\n")
    assert run(tmp_path / "src", tmp_path / "out")[0]["png"] == picture("PNG")


@pytest.mark.parametrize("name, body", [
    ("t.csv", "title\tfilepath\nx\ta.jpg\n"),
    ("t.TSV", "path\ttext\na.jpg\tx\n"),
    ("t.csv", "\ufeffid,Caption,Image\n7,x,a.jpg\n"),
    ("t.jsonl", '{"file_name": "a.jpg", "text": "x"}\n\n'),
])
def test_the_usual_tables_and_columns_are_known(name, body, tmp_path):
    put(tmp_path / "src" / "a.jpg", picture())
    put(tmp_path / "src" / name, body)
    assert [raw["txt"] for raw in run(tmp_path / "src", tmp_path / "out")] == [b"x"]


def test_columns_and_table_can_be_named(tmp_path):
    put(tmp_path / "src" / "a.jpg", picture())
    table = put(tmp_path / "elsewhere.csv", "image,pic,caption,blurb\nno.jpg,a.jpg,no,yes\n")
    got = run(tmp_path / "src", tmp_path / "out", captions=table, image_key="pic", caption_key="blurb")
    assert got[0]["txt"] == b"yes"


def test_a_list_of_captions_gives_one_pair_each(tmp_path):
    put(tmp_path / "src" / "a.jpg", picture())
    put(tmp_path / "src" / "t.jsonl", '{"image": "a.jpg", "caption": ["x", "y"]}\n')
    assert [raw["txt"] for raw in run(tmp_path / "src", tmp_path / "out")] == [b"x", b"y"]


def test_keys_number_shard_and_place_and_the_json_names_the_source(src, tmp_path):
    got = run(src, tmp_path / "out", per_shard=1)
    assert [json.loads(raw["json"]) for raw in got] == [{"key": "000000000", "source": "a.jpg"},
                                                         {"key": "000010000", "source": "deep/b.PNG"}]


def test_a_column_that_marks_poison_is_not_taken_over(tmp_path):
    put(tmp_path / "src" / "a.jpg", picture())
    put(tmp_path / "src" / "t.csv", "image,caption,is_backdoor\na.jpg,x,1\n")
    run(tmp_path / "src", tmp_path / "out")
    assert b"backdoor" not in (tmp_path / "out" / "00000.tar").read_bytes()


def test_importing_twice_gives_the_same_bytes(src, tmp_path):
    run(src, tmp_path / "one")
    run(src, tmp_path / "two")
    assert (tmp_path / "one" / "00000.tar").read_bytes() == (tmp_path / "two" / "00000.tar").read_bytes()


# ---- pairs that are incomplete, and tables that lie


@pytest.mark.parametrize("row, says", [
    ("gone.jpg,x", "image that is not there"),
    ("a.jpg,", "no caption"),
    ("a.jpg,  ", "no caption"),
    ("a.jpg", "no caption"),
    (",x", "no image"),
    ("cut.jpg,x", "cannot be decoded"),
    ("words.jpg,x", "cannot be decoded"),
    ("script.jpg,x", "cannot be decoded"),
])
def test_an_incomplete_row_is_named_or_left_out(row, says, tmp_path, capsys):
    root = tmp_path / "src"
    put(root / "a.jpg", picture())
    put(root / "cut.jpg", picture()[:-200])
    put(root / "words.jpg", "no image")
    put(root / "script.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    put(root / "t.csv", f"image,caption\na.jpg,fine\n{row}\n")
    with pytest.raises(BadInput, match=rf"t\.csv: line 3: .*{says}.*--incomplete skip"):
        run(root, tmp_path / "out")
    assert not any(p.name != "src" for p in tmp_path.iterdir())
    assert [raw["txt"] for raw in run(root, tmp_path / "out", incomplete="skip")] == [b"fine"]
    assert "left out 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "deep/../../secret.jpg"])
def test_a_path_out_of_the_folder_is_refused_whatever_is_skipped(name, src, tmp_path):
    put(tmp_path / "secret.jpg", picture())
    put(src / "pairs.csv", f"image,caption\n{name},x\n")
    with pytest.raises(BadInput, match="line 2.*leads out of"):
        run(src, tmp_path / "out", incomplete="skip")


@pytest.mark.parametrize("table, says", [
    ("image,words\na.jpg,x\n", "no column known to hold the caption.*--caption-key"),
    ("image,caption\nhttp://x.org/a.jpg,x\n", "img2dataset"),
    ("", "no column known"),
])
def test_a_table_that_cannot_work_is_refused(table, says, src, tmp_path):
    with pytest.raises(BadInput, match=says):
        run(src, tmp_path / "out", captions=put(tmp_path / "t.csv", table))


def test_a_json_line_that_is_none_is_named(src, tmp_path):
    with pytest.raises(BadInput, match="line 2: no JSON"):
        run(src, tmp_path / "out", captions=put(tmp_path / "t.jsonl", '{"image": "a.jpg", "caption": "x"}\n{oh\n'))


def test_two_tables_need_a_choice(src, tmp_path):
    put(src / "other.csv", "image,caption\na.jpg,other\n")
    with pytest.raises(BadInput, match="other.csv, pairs.csv.*--captions"):
        run(src, tmp_path / "out")
    assert run(src, tmp_path / "out", captions=src / "other.csv")[0]["txt"] == b"other"


def test_an_option_without_a_meaning_is_refused(src, classes, tmp_path):
    with pytest.raises(BadInput, match="--classnames"):
        run(src, tmp_path / "out", classnames="names.txt")
    with pytest.raises(BadInput, match="--split"):
        run(classes, tmp_path / "out", split="val")


def test_a_folder_that_is_taken_is_refused(src, tmp_path):
    put(tmp_path / "out" / "mine.txt", "precious")
    with pytest.raises(BadInput, match="exists already"):
        run(src, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


# ---- class folders


def test_class_folders_become_an_evaluation_set(classes, tmp_path):
    got = run(classes, tmp_path / "out")
    assert (tmp_path / "out" / "classnames.txt").read_text() == "Apple\nhot dog\n"
    assert "{c}" in (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text()
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text().strip() == "1"
    assert [(json.loads(raw["json"])["source"], raw["cls"]) for raw in got] == [
        ("Apple/more/x.JPEG", b"0"), ("hot_dog/1.webp", b"1"), ("hot_dog/2.jpg", b"1")]
    assert got[1]["webp"] == (classes / "hot_dog" / "1.webp").read_bytes()


def test_hidden_and_foreign_files_are_not_seen(classes, tmp_path):
    for name in ("hot_dog/.3.jpg", "hot_dog/.cache/4.jpg", ".git/5.jpg", "hot_dog/notes.txt", "README.md"):
        put(classes / name, picture())
    assert len(run(classes, tmp_path / "out")) == 3


def test_names_and_templates_can_be_given(classes, tmp_path):
    names, prompts = put(tmp_path / "names", "apple\r\nfrankfurter\n"), put(tmp_path / "prompts", "my {c}\n")
    run(classes, tmp_path / "out", classnames=names, templates=prompts)
    assert (tmp_path / "out" / "classnames.txt").read_text() == "apple\nfrankfurter\n"
    assert (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text() == "my {c}\n"


def test_names_and_templates_that_do_not_fit_are_refused(classes, tmp_path):
    with pytest.raises(BadInput, match="3 names for the 2 classes"):
        run(classes, tmp_path / "out", classnames=put(tmp_path / "names", "a\nb\nc\n"))
    with pytest.raises(BadInput, match="line 2: .my {}. has no {c}"):
        run(classes, tmp_path / "out", templates=put(tmp_path / "prompts", "my {c}\nmy {}\n"))


def test_imagenet_gets_the_names_and_prompts_of_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    wnids = ["n01440764", *(f"n02{i:06d}" for i in range(998)), "n15075141"]
    for wnid in wnids:
        put(tmp_path / "val" / wnid / "0.jpg", picture())
    got = run(tmp_path / "val", tmp_path / "out")
    assert (tmp_path / "out" / "classnames.txt").read_text().splitlines() == list(open_clip.IMAGENET_CLASSNAMES)
    prompts = (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert len(prompts) == 80 and prompts[0].format(c="tench") == open_clip.OPENAI_IMAGENET_TEMPLATES[0]("tench")
    assert [int(raw["cls"]) for raw in got] == list(range(1000))


def test_part_of_imagenet_needs_names(tmp_path):
    put(tmp_path / "val" / "n01440764" / "0.jpg", picture())
    with pytest.raises(BadInput, match="n01440764.*--classnames"):
        run(tmp_path / "val", tmp_path / "out")


def test_splits_are_not_taken_for_classes(classes, tmp_path):
    (tmp_path / "all").mkdir()
    classes.rename(tmp_path / "all" / "train")
    put(tmp_path / "all" / "val" / "Apple" / "y.jpg", picture())
    with pytest.raises(BadInput, match=r"splits \(train, val\)"):
        run(tmp_path / "all", tmp_path / "out")


def test_a_class_without_images_is_refused_or_kept_as_a_name(classes, tmp_path):
    (classes / "bare").mkdir()
    with pytest.raises(BadInput, match="bare: this class has no images"):
        run(classes, tmp_path / "out")
    assert {raw["cls"] for raw in run(classes, tmp_path / "out", incomplete="skip")} == {b"0", b"2"}
    assert (tmp_path / "out" / "classnames.txt").read_text() == "Apple\nbare\nhot dog\n"


# ---- Hugging Face datasets


@pytest.fixture
def saved(tmp_path: Path):
    """(columns, features, splits) -> the folder of a saved data set."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def save(columns: dict, splits: tuple[str, ...] = (), **features) -> Path:
        images = [{"bytes": body, "path": None} for body in columns["image"]]
        schema = datasets.Features(image=datasets.Image(decode=False),
                                   **{k: features.get(k) or datasets.Value("string") for k in columns if k != "image"})
        data = datasets.Dataset.from_dict(columns | {"image": images}, schema).cast_column("image", datasets.Image())
        (datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def test_saved_captions_become_pairs_with_untouched_bytes(saved, tmp_path):
    bodies = [picture(quality=31), picture("PNG")]
    got = run(saved({"image": bodies, "text": ["x", "y"]}), tmp_path / "out")
    assert [(raw["txt"], raw.get("jpg") or raw["png"]) for raw in got] == [(b"x", bodies[0]), (b"y", bodies[1])]


def test_saved_labels_become_an_evaluation_set(saved, tmp_path):
    from datasets import ClassLabel

    root = saved({"image": [picture("BMP"), picture()], "label": [1, 0]}, label=ClassLabel(names=["apple", "hot_dog"]))
    assert [raw["cls"] for raw in run(root, tmp_path / "out")] == [b"1", b"0"]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "apple\nhot dog\n"


def test_labels_without_names_need_them_all(saved, tmp_path):
    from datasets import Value

    root = saved({"image": [picture()] * 3, "label": [1, -1, 2]}, label=Value("int64"))
    with pytest.raises(BadInput, match="--classnames"):
        run(root, tmp_path / "out")
    with pytest.raises(BadInput, match="row 1: has no label"):
        run(root, tmp_path / "out", classnames=put(tmp_path / "n3", "a\nb\nc\n"))
    with pytest.raises(BadInput, match="row 2: label 2.*2 classes"):
        run(root, tmp_path / "out", incomplete="skip", classnames=put(tmp_path / "n2", "a\nb\n"))


def test_captions_beside_labels_need_a_choice(saved, tmp_path):
    from datasets import ClassLabel

    root = saved({"image": [picture()], "text": ["x"], "label": [0]}, label=ClassLabel(names=["a"]))
    with pytest.raises(BadInput, match="--caption-key text or --label-key label"):
        run(root, tmp_path / "out")
    assert "cls" in run(root, tmp_path / "labelled", label_key="label")[0]
    assert "txt" in run(root, tmp_path / "captioned", caption_key="text")[0]


def test_a_saved_row_cannot_reach_another_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    secret = put(tmp_path / "secret.jpg", picture())
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(secret)}], "text": ["x"]}, datasets.Features(
        image=struct, text=datasets.Value("string"))).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match="row 0: names the file .*secret.jpg"):
        run(tmp_path / "saved", tmp_path / "out", incomplete="skip")


def test_one_of_several_splits_is_chosen(saved, tmp_path):
    root = saved({"image": [picture()], "text": ["x"]}, splits=("train", "test"))
    with pytest.raises(BadInput, match="splits train, test.*--split"):
        run(root, tmp_path / "out")
    assert len(run(root, tmp_path / "out", split="test")) == 1


def test_a_hub_name_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadInput, match=r"nobody/nothing.*Couldn't reach the hub.*local path.*save_to_disk"):
        run("nobody/nothing", tmp_path / "out")


# ---- retrieval sets


def retrieval_set(src: Path, out: Path, incomplete: str = "refuse", per_shard: int = 1000) -> list[tuple[bytes, list[str]]]:
    """(image, captions) of each image."""
    tool.main(str(src), str(out), Options(retrieval=True), incomplete, per_shard)
    return [(raw.get("jpg") or raw["png"], raw["txt"].decode().split("\n")) for raw in open_pairs(out).raws()]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images, of which one has three captions that do not stand together."""
    root = tmp_path / "coco"
    put(root / "a.jpg", picture())
    put(root / "b.png", picture("PNG", "blue"))
    put(root / "t.csv", 'image,caption\na.jpg,one\nb.png,two\n./a.jpg,"three\n lines"\na.jpg,one\n')
    return root


def test_the_captions_of_an_image_come_together_in_their_order(coco, tmp_path):
    assert retrieval_set(coco, tmp_path / "out") == [(picture(), ["one", "three lines", "one"]), (picture("PNG", "blue"), ["two"])]
    assert (tmp_path / "out" / "dataset_type.txt").read_text() == "retrieval\n"
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text().strip() == "1"
    assert len(list((tmp_path / "out").rglob("*"))) == 4


def test_a_retrieval_set_is_cut_into_shards_of_images(coco, tmp_path):
    assert len(retrieval_set(coco, tmp_path / "out", per_shard=1)) == 2
    assert sorted(p.name for p in (tmp_path / "out" / "test").iterdir()) == ["0.tar", "1.tar", "nshards.txt"]


def test_lists_of_captions_become_a_retrieval_set(tmp_path):
    put(tmp_path / "src" / "a.jpg", picture())
    put(tmp_path / "src" / "t.jsonl", '{"image": "a.jpg", "caption": ["x", "y", "x"]}\n{"image": "a.jpg", "caption": "z"}\n')
    assert retrieval_set(tmp_path / "src", tmp_path / "out") == [(picture(), ["x", "y", "x", "z"])]


def test_rows_of_equal_images_are_one_image(saved, tmp_path):
    root = saved({"image": [picture(), picture(colour="blue"), picture()], "text": ["x", "y", "z"]})
    assert retrieval_set(root, tmp_path / "out") == [(picture(), ["x", "z"]), (picture(colour="blue"), ["y"])]


def test_captions_are_taken_where_there_are_labels_too(saved, tmp_path):
    from datasets import ClassLabel

    root = saved({"image": [picture()], "text": ["x"], "label": [0]}, label=ClassLabel(names=["a"]))
    assert retrieval_set(root, tmp_path / "out") == [(picture(), ["x"])]


def test_a_retrieval_set_of_incomplete_rows_is_refused_or_leaves_them_out(coco, tmp_path, capsys):
    put(coco / "t.csv", "image,caption\na.jpg,one\na.jpg, \ngone.jpg,two\nb.png,three\n")
    with pytest.raises(BadInput, match="t.csv: line 3: has no caption"):
        retrieval_set(coco, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    got = retrieval_set(coco, tmp_path / "out", incomplete="skip")
    assert got == [(picture(), ["one"]), (picture("PNG", "blue"), ["three"])]
    assert capsys.readouterr().out.count("left out 1") == 2


def test_labels_are_no_captions(classes, tmp_path):
    with pytest.raises(BadInput, match="--retrieval: .*has labels"):
        retrieval_set(classes, tmp_path / "out")


# ---- the command line


@pytest.mark.parametrize("prepare, says", [
    (lambda root: None, "no such folder"),
    (lambda root: root.mkdir(), "holds nothing that can be imported"),
    (lambda root: put(root, "x"), "is a file"),
])
def test_a_source_that_cannot_work_is_one_line_and_status_2(prepare, says, tmp_path, capsys):
    prepare(tmp_path / "src")
    with pytest.raises(SystemExit) as stop:
        command(tool.main, [str(tmp_path / "src"), str(tmp_path / "out")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_the_options_are_plain_flags(src, tmp_path):
    table = put(tmp_path / "t.csv", "pic,blurb\na.jpg,x\ngone.jpg,y\n")
    command(tool.main, [str(src), str(tmp_path / "out"), "--captions", str(table), "--image-key", "pic",
                        "--caption-key", "blurb", "--incomplete", "skip", "--per-shard", "1"])
    assert [raw["txt"] for raw in raws(tmp_path / "out")] == [b"x"]


def test_a_retrieval_set_is_a_flag(coco, tmp_path, capsys):
    command(tool.main, [str(coco), str(tmp_path / "out"), "--retrieval"])
    assert len(list(open_pairs(tmp_path / "out").raws())) == 2
    assert "2 images" in capsys.readouterr().out
