"""data_tools/make_emoji.py on small checkouts that are made here."""
from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import load_program
from PIL import Image

from mmbackdoor.recipe import command
from mmbackdoor.shards import read, read_raw
from mmbackdoor.types import BadInput

try:
    import cairosvg  # noqa: F401
except (ImportError, OSError) as e:
    pytest.skip(f"cairosvg cannot be used: {e}", allow_module_level=True)


tool = load_program("data_tools/make_emoji")
REAL = Path(__file__).parents[2] / "shared" / "real"


def square(colour: str) -> str:
    path = f'<path fill="{colour}" d="M9 9h18v18H9z"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{path}</svg>'


def write_svg(root: Path, artist: str, hexcode: str, svg: str) -> None:
    folder = root / "packages" / f"svgmoji__{artist}" / "svg"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{hexcode}.svg").write_text(svg)


def emoji(name: str, hexcode: str, **changes) -> dict:
    return {"annotation": name, "hexcode": hexcode, "type": 1, "group": 4, "tags": ["cheese", "slice"]} | changes


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """40 foods by three artists, and entries that are no concepts."""
    root = tmp_path / "svgmoji"
    table = [emoji(f"food {i}", f"1F{i:03X}") for i in range(40)]
    table += [emoji("text heart", "2764", type=0), emoji("regional indicator A", "1F1E6"),
              emoji("hand: dark skin tone", "1F44B-1F3FF", group=1)]
    del table[-2]["group"]
    for i, entry in enumerate(table):
        for artist, colour in (("noto", "#f00"), ("blob", "#00f"), ("twemoji", f"#0{i % 10}0")):
            write_svg(root, artist, entry["hexcode"], square(colour))
    (root / "packages" / "svgmoji").mkdir()
    (root / "packages" / "svgmoji" / "emoji.json").write_text(json.dumps(table))
    return root


def change(checkout: Path, *entries: dict) -> None:
    path = checkout / "packages" / "svgmoji" / "emoji.json"
    path.write_text(json.dumps(json.loads(path.read_text()) + list(entries)))


def train(out: Path) -> list[dict]:
    return [raw for shard in sorted((out / "train").glob("*.tar")) for raw in read_raw(str(shard))]


def labelled(out: Path, task: str = "concepts") -> list[dict]:
    return list(read_raw(str(out / task / "test" / "0.tar")))


def everything(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_every_drawing_is_a_training_pair_or_a_test_image(checkout, tmp_path):
    tool.main(str(checkout), str(tmp_path / "out"))
    pairs, images = train(tmp_path / "out"), labelled(tmp_path / "out")
    assert len(pairs) + len(images) == 120
    assert 8 <= len(images) <= 28, "about 44 % of 40 concepts"
    assert json.loads((tmp_path / "out" / "train" / "sizes.json").read_text()) == {"00000.tar": len(pairs)}
    assert [raw["__key__"] for raw in pairs] == [f"{i:09d}" for i in range(len(pairs))]


def test_a_test_image_is_by_an_artist_who_is_not_in_the_training_pairs_of_its_concept(checkout, tmp_path):
    tool.main(str(checkout), str(tmp_path / "out"))
    classes = (tmp_path / "out" / "concepts" / "classnames.txt").read_text().splitlines()
    seen: dict[str, set[str]] = {}
    for raw in train(tmp_path / "out"):
        meta = json.loads(raw["json"])
        seen.setdefault(meta["concept"], set()).add(meta["set"])
    held = [classes[int(raw["cls"])] for raw in labelled(tmp_path / "out")]
    assert len(set(held)) == len(held), "one artist of a concept at most"
    assert all(len(seen[name]) == (2 if name in held else 3) for name in classes)


def test_the_two_test_sets_show_the_same_images(checkout, tmp_path):
    change(checkout, emoji("flag: Nowhere", "1F1E6-1F1E6", group=9))
    for artist in tool.ARTISTS:
        write_svg(checkout, artist, "1F1E6-1F1E6", square("#0ff"))
    tool.main(str(checkout), str(tmp_path / "out"), held_out=1.0)
    concepts, groups = labelled(tmp_path / "out"), labelled(tmp_path / "out", "groups")
    assert [raw["jpg"] for raw in concepts] == [raw["jpg"] for raw in groups]
    names = (tmp_path / "out" / "concepts" / "classnames.txt").read_text().splitlines()
    families = (tmp_path / "out" / "groups" / "classnames.txt").read_text().splitlines()
    assert len(families) == 10
    assert {(names[int(c["cls"])][:4], families[int(g["cls"])]) for c, g in zip(concepts, groups, strict=True)} == {
        ("food", "food and drink"), ("flag", "flags")}


def test_images_are_small_jpegs_on_plain_light_grounds(checkout, tmp_path):
    tool.main(str(checkout), str(tmp_path / "out"), size=48)
    for raw in train(tmp_path / "out"):
        image = Image.open(io.BytesIO(raw["jpg"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))
        corners: list[Any] = [image.getpixel(at) for at in ((0, 0), (47, 0), (0, 47), (47, 47))]
        assert min(min(c) for c in corners) > 180
        assert all(max(c) - min(c) <= 8 for c in zip(*corners, strict=True)), "JPEG may move a channel a little"
    grounds = {Image.open(io.BytesIO(raw["jpg"])).getpixel((0, 0)) for raw in train(tmp_path / "out")}
    assert len(grounds) > 50


def test_captions_are_made_of_the_name_and_the_keywords(checkout, tmp_path):
    tool.main(str(checkout), str(tmp_path / "out"))
    shapes = set()
    for sample, raw in zip(read(str(tmp_path / "out" / "train")), train(tmp_path / "out"), strict=True):
        name = json.loads(raw["json"])["concept"]
        assert name in sample["text"]
        shapes.add(sample["text"].replace(name, "{c}"))
    assert {"{c}", "an emoji of {c}", "a picture of {c}", "icon showing {c}"} < shapes
    assert shapes & {"cheese: {c}", "slice: {c}"} and shapes & {"{c}, cheese, slice", "{c}, slice, cheese"}


def test_text_style_emoji_skin_tones_and_bare_letters_are_no_concepts(checkout, tmp_path):
    tool.main(str(checkout), str(tmp_path / "out"))
    names = (tmp_path / "out" / "concepts" / "classnames.txt").read_text().splitlines()
    assert names == sorted(f"food {i}" for i in range(40))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(checkout, tmp_path):
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        tool.main(str(checkout), str(tmp_path / name), seed=seed)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert all(body != everything(tmp_path / "c")[name] for name, body in everything(tmp_path / "a").items()
               if name.endswith(".tar"))


def test_svg_files_that_cannot_be_drawn_are_counted_and_left_out(checkout, tmp_path, capsys):
    write_svg(checkout, "noto", "1F000", "<svg")
    write_svg(checkout, "blob", "1F001", '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"/>')
    tool.main(str(checkout), str(tmp_path / "out"))
    assert len(train(tmp_path / "out")) + len(labelled(tmp_path / "out")) == 118
    assert "left out 2 SVG files" in capsys.readouterr().out


def test_a_concept_that_one_artist_drew_is_for_training(checkout, tmp_path):
    change(checkout, emoji("rare", "1FFFF", tags=[]), emoji("undrawn", "1FFFE"))
    write_svg(checkout, "noto", "1FFFF", square("#0ff"))
    tool.main(str(checkout), str(tmp_path / "out"), held_out=1.0)
    names = (tmp_path / "out" / "concepts" / "classnames.txt").read_text().splitlines()
    assert "undrawn" not in names
    assert names.index("rare") not in [int(raw["cls"]) for raw in labelled(tmp_path / "out")]
    metas = [json.loads(raw["json"]) for raw in train(tmp_path / "out")]
    assert [meta["set"] for meta in metas if meta["concept"] == "rare"] == ["noto"]


def test_a_folder_that_is_taken_is_refused(checkout, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(BadInput, match="not empty"):
        tool.main(str(checkout), str(tmp_path / "out"))


def test_a_failure_while_writing_leaves_nothing(checkout, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(tool, "write_eval_set", full)
    with pytest.raises(OSError, match="disk full"):
        tool.main(str(checkout), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["svgmoji"]


def test_a_missing_cairosvg_names_the_extra(checkout, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(BadInput, match=r"pip install 'mmbackdoor\[emoji\]'"):
        tool.main(str(checkout), str(tmp_path / "out"))


@pytest.mark.parametrize("change, says", [({"size": 2}, "--size 2"), ({"held_out": 0.0}, "--held-out 0")])
def test_numbers_that_cannot_work_are_refused(change, says, checkout, tmp_path):
    with pytest.raises(BadInput, match=says):
        tool.main(str(checkout), str(tmp_path / "out"), **change)


def test_a_table_that_is_not_emojibase_is_named(checkout, tmp_path):
    for text in ('{"a": 1}', "[1]", "[{}]", "no json"):
        (checkout / "packages" / "svgmoji" / "emoji.json").write_text(text)
        with pytest.raises(BadInput, match="emoji.json: not emojibase's list"):
            tool.main(str(checkout), str(tmp_path / "out"))


def test_a_wrong_checkout_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(tool.main, [str(tmp_path), str(tmp_path / "out")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "packages/svgmoji/emoji.json" in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is not there")
def test_templates_groups_and_fields_are_those_of_the_real_set(checkout, tmp_path):
    tool.main(str(checkout), str(tmp_path / "out"))
    for name in ("concepts/zeroshot_classification_templates.txt", "groups/zeroshot_classification_templates.txt",
                 "groups/classnames.txt", "groups/test/nshards.txt"):
        assert (tmp_path / "out" / name).read_text() == (REAL / name).read_text()
    ours, theirs = train(tmp_path / "out")[0], next(read_raw(str(REAL / "train" / "00000.tar")))
    assert ours.keys() == theirs.keys()
    assert list(json.loads(ours["json"])) == list(json.loads(theirs["json"]))
