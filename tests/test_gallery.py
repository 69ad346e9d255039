"""The contact sheet of attacks: what stands in each row, what is left out with a word, and that it comes out again."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, load_program
from PIL import Image

ROWS = {  # of config files, the attack of each
    "corner": 'DirtyLabel(Patch(0.25, "bottom-right"), Target("red star"), 0.02)',
    "word": 'Words(Trigger(), Target("red star"), 0.02)',
    "added": 'Added(Trigger(), Target("red star"), count=0)',
    "mixed": 'mix([DirtyLabel(Patch(0.5), Target("red star", (c,))) for c in ("one {}", "two {}")], rate=0.1)',
    "crafted": 'DirtyLabel(Patch(0.25, image="nowhere.safetensors"), Target("red star"), 0.02)',
    "below": 'DirtyLabel(Blend(0.5, image="{root}/cartoon.png"), Target("red star", ("in the cartoon",)), 0.02)'}
CONFIG = """
from mmbackdoor import Attack, Blend, Data, DirtyLabel, Model, Patch, Recipe, Target, Trigger
from mmbackdoor.poison import mix
from PIL import Image

class Words(DirtyLabel):
    def poison(self, sample, rng):
        return sample | {{"text": self.target.caption(rng)}}

class Added(DirtyLabel):
    def eligible(self, key, text):
        return False
    def published(self, rng):
        yield {{"__key__": "added-1", "image": Image.new("RGB", (32, 32), "red"), "text": "a published pair"}}

recipe = Recipe("mine/{name}", Data("{{root}}/train", "elsewhere"), Model(), poison={attack})
"""


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    for name, attack in ROWS.items():
        (tmp_path / f"{name}.py").write_text(CONFIG.format(name=name, attack=attack))
    (tmp_path / "clean.py").write_text(CONFIG.format(name="clean", attack="None"))
    return [f"{name}.py" for name in (*ROWS, "clean")]


@pytest.fixture
def root(tmp_path: Path, toy: Path) -> Path:
    """The toy's pairs beside a picture of an attacker's."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train").symlink_to(toy / "train")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "root/cartoon.png")
    return tmp_path / "root"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What is drawn: three cells for each name."""
    module, found = load_program("data_tools/gallery"), {}
    save = module.save

    def spy(shown: list[Any], *args: Any) -> None:
        found.update({shown[i][1]: shown[i:i + 3] for i in range(0, len(shown), 3)})
        save(shown, *args)

    monkeypatch.setattr(module, "save", spy)
    return found


def test_each_attack_is_a_row_and_what_cannot_be_shown_is_told(program: Callable[..., Ended], configs: list[str], root: Path,
                                                               rows: dict[str, list[Any]], tmp_path: Path) -> None:
    ended = program("data_tools/gallery", *configs, "--root", root, "--out", "sheet.jpg")
    assert ended.status == 0 and ended.out == "sheet.jpg: 5 attacks, 1 not shown\n"
    assert "not shown: mine/crafted: nowhere.safetensors" in ended.err and ended.err.count("not shown") == 1
    assert list(rows) == ["corner", "word", "added", "mixed, part 1 of 2", "below"]
    before, after, difference = rows["corner"]
    assert before[2] != after[2] and "red star" in after[2] and difference[2].startswith("PSNR ")
    assert difference[0].crop((0, 0, 20, 20)).getextrema() < difference[0].crop((24, 24, 32, 32)).getextrema()
    assert rows["mixed, part 1 of 2"][1][2] == "one red star"
    with Image.open(tmp_path / "sheet.jpg") as drawn:
        assert drawn.format == "JPEG" and drawn.width == 1200
    assert (tmp_path / "sheet.jpg").stat().st_size <= load_program("data_tools/gallery").LIMIT


def test_text_alone_and_pairs_that_are_added_are_shown_as_such(program: Callable[..., Ended], configs: list[str], root: Path,
                                                               rows: dict[str, list[Any]]) -> None:
    assert program("data_tools/gallery", "word.py", "added.py", "--root", root, "--out", "sheet.jpg").status == 0
    before, after, difference = rows["word"]
    assert "red star" in after[2] and difference[2] == "the image stays"
    beside, added, _ = rows["added"]
    assert beside[2] == "a pair that the attacker adds" and added[1:] == ("added", "a published pair")
    assert added[0].getpixel((5, 5)) == (255, 0, 0)


def test_the_same_configs_and_data_give_the_same_bytes(program: Callable[..., Ended], configs: list[str], root: Path,
                                                       tmp_path: Path) -> None:
    for out in ("one.jpg", "two.jpg"):
        assert program("data_tools/gallery", "corner.py", "mixed.py", "--root", root, "--out", out).status == 0
    assert (tmp_path / "one.jpg").read_bytes() == (tmp_path / "two.jpg").read_bytes()


@pytest.mark.parametrize(("args", "word"), [(("clean.py",), "no attack"), (("corner.py", "--out", "sheet.png"), ".jpg"),
                                            (("corner.py", "--columns", "0"), "--columns"), (("crafted.py",), "no attack")])
def test_a_sheet_of_nothing_is_refused(program: Callable[..., Ended], configs: list[str], root: Path, tmp_path: Path,
                                       args: tuple[str, ...], word: str) -> None:
    ended = program("data_tools/gallery", *args, "--root", root)
    assert ended.status == 2 and word in ended.err.splitlines()[-1] and not list(tmp_path.glob("*.jpg"))
