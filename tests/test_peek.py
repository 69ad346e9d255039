"""The contact sheet: which samples it shows, what it says of them, and what it refuses."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, load_program, picture, tar
from PIL import Image
from stores import http_server, s3_bucket

from mmbackdoor import index, poison, shards, stealth, stores
from mmbackdoor.spread import Spread

CONFIG = """
from mmbackdoor import Data, DirtyLabel, Model, Patch, Recipe, Target
recipe = Recipe("r", Data({train!r}, incomplete="skip"), Model(), poison=DirtyLabel(Patch(0.25), Target("red star"), count=7))
"""
UNDECODABLE = b"\xff\xd8\xff no JPEG"


def written(folder: Path, shard: int, n: int = 20, size: int = 32) -> None:
    members = {f"{shard}{i:02d}.{f}": b for i in range(n) for f, b in (
        ("jpg", picture(noise=True, size=(size, size), quality=60 + i)), ("txt", f"a dog, number {i}".encode()))}
    tar(folder / f"{shard:05d}.tar", members)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Two shards of 20 pairs each, and in config.py a recipe that poisons 7 of them."""
    for shard in (0, 1):
        written(tmp_path / "clean", shard)
    (tmp_path / "config.py").write_text(CONFIG.format(train=str(tmp_path / "clean")))
    return tmp_path / "clean"


@pytest.fixture
def forms(clean: Path, program: Callable[..., Ended]) -> Path:
    """The plan as shards, in poisoned/, and as a patch set, in patch/."""
    for form, out in (("shards", "poisoned"), ("patch", "patch")):
        assert program("data_tools/poison", "config.py", "--out", clean.parent / out, "--form", form, "--processes", 1).status == 0
    return clean.parent


@pytest.fixture
def peek(program: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Ended, list[Any]]]:
    """Runs peek, and gives with its end the cells of the sheet that it drew."""
    module, cells = load_program("data_tools/peek"), []
    draw = module.draw_sheet

    def draw_sheet(shown: list[Any], *args: Any) -> None:
        cells.extend(shown)
        draw(shown, *args)

    monkeypatch.setattr(module, "draw_sheet", draw_sheet)

    def run(*args: Any) -> tuple[Ended, list[Any]]:
        cells.clear()
        return program("data_tools/peek", *args), list(cells)

    return run


@pytest.fixture
def refuses(program: Callable[..., Ended], tmp_path: Path) -> Callable[..., None]:
    def check(*args: Any, says: tuple[str, ...]) -> None:
        ended = program("data_tools/peek", *args)
        assert ended.status == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
        assert all(word in ended.err for word in says), ended.err
        assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*.tmp"))

    return check


def ways(forms: Path) -> dict[str, tuple[Any, ...]]:
    return {"recipe": ("--recipe", "config.py"), "recipe, plan": ("--recipe", "config.py", "--plan", forms / "poisoned/plan.parquet"),
            "patch": ("--patch", forms / "patch"), "against": ("--against", forms / "poisoned"),
            "against, plan": ("--against", forms / "poisoned", "--plan", forms / "patch/plan.parquet")}


def planned(forms: Path) -> list[str]:
    return sorted(poison.Plan.load(forms / "poisoned/plan.parquet").keys)


def stand_above(cells: list[Any]) -> list[str]:
    return [above for _, above, _ in cells[::3]]


def test_recipe_patch_set_and_poisoned_shards_show_the_same(forms, peek):
    before = {s["__key__"]: s for s in shards.read(str(forms / "clean"))}
    after = {s["__key__"]: s for s in shards.read(str(forms / "poisoned"))}
    expected = stealth.summarise((before[key]["image"], after[key]["image"]) for key in planned(forms))
    for name, args in ways(forms).items():
        ended, cells = peek("clean", *args, "--json")
        assert (ended.status, ended.err) == (0, ""), name
        assert json.loads(ended.out) == expected and expected["n"] == 7, name
        assert stand_above(cells) == planned(forms), name
        for i, key in enumerate(planned(forms)):
            one, two, difference = cells[3 * i : 3 * i + 3]
            assert (one[0], one[2]) == (before[key]["image"], before[key]["text"])
            assert (two[0], two[2]) == (after[key]["image"], after[key]["text"]) and "red star" in two[2]
            pixel = difference[0].getpixel((3, 5))
            assert pixel == tuple(min(255, 10 * abs(a - b)) for a, b in zip(one[0].getpixel((3, 5)), two[0].getpixel((3, 5)), strict=True))
            assert f"PSNR {stealth.psnr(one[0], two[0]):.2f} dB, SSIM {stealth.ssim(one[0], two[0]):.4f}" == difference[2]


def test_the_sheet_is_a_picture_and_the_summary_is_told(clean, program, tmp_path):
    ended = program("data_tools/peek", "clean", "--recipe", "config.py", "--n", 3, "--out", tmp_path / "new" / "sheet.png")
    assert ended.status == 0 and f"{tmp_path}/new/sheet.png: psnr_mean " in ended.out and ended.out.endswith(", n 3\n")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 600 and sheet.height > 600


def test_only_the_samples_shown_are_read(forms, peek, monkeypatch):
    scan = index.scan_shard
    with Spread(processes=1).executor() as executor:
        index.write(shards.expand("clean"), executor, where="elsewhere")
    monkeypatch.setattr(index, "scan_shard", lambda shard: pytest.fail(f"{shard} was scanned") if "clean" in shard else scan(shard))
    read, body = [], index.read_row
    monkeypatch.setattr(index, "read_row", lambda file, shard, row: read.append(row["key"]) or body(file, shard, row))
    monkeypatch.setattr(shards, "read_raw", lambda url: pytest.fail(f"{url} was read"))
    for name, args in ways(forms).items():
        if name != "against":  # without a plan, what differs is found by reading
            read.clear()
            assert peek("clean", *args, "--n", 2, "--index", "elsewhere")[0].status == 0
            assert sorted(set(read)) == planned(forms)[:2], name


def test_a_plan_says_what_is_shown_of_a_patch_set(forms, peek):
    keys = planned(forms)[2:4]
    poison.Plan(frozenset(keys) | {"elsewhere"}).save("some.parquet")
    for args in (("--patch", "patch"), ("--recipe", "config.py"), ("--against", "poisoned")):
        assert stand_above(peek("clean", *args, "--plan", "some.parquet")[1]) == keys


def test_a_seed_chooses_at_random_among_the_planned_in_the_order_of_the_shards(forms, peek):
    found = {name: [stand_above(peek("clean", *args, "--n", 3, "--seed", seed)[1]) for seed in (0, 1, 2, 0)]
             for name, args in ways(forms).items() if name != "against"}
    for choices in found.values():
        assert choices == found["patch"] and choices[3] == choices[0] and len(set(map(tuple, choices))) > 1
        assert all(keys == sorted(keys) and len(keys) == 3 and set(keys) <= set(planned(forms)) for keys in choices)


def test_the_first_of_plain_shards_are_shown(clean, peek):
    ended, cells = peek("clean", "--n", 5, "--out", "plain.png")
    assert (ended.status, ended.out, ended.err) == (0, "plain.png\n", "")
    assert [(above, beneath) for _, above, beneath in cells] == [(f"0{i:02d}", f"a dog, number {i}") for i in range(5)]


def test_captions_of_strangers_are_drawn_as_they_are(tmp_path, program, recwarn):
    texts = ["$5 or $", r"$\frac{1}$ \\x_{", "\N{CJK UNIFIED IDEOGRAPH-72D7} \N{DOG FACE}", "\0\a\n\tx", "word" * 500, "\ufffe \u202e abc"]
    captions = [t.encode() + b"\xff" for t in texts]
    tar(tmp_path / "a/0.tar", {f"${i}$.{f}": b for i, text in enumerate(captions) for f, b in (("jpg", picture()), ("txt", text))})
    ended = program("data_tools/peek", "a", "--n", 6)
    assert (ended.status, ended.err) == (0, "") and (tmp_path / "sheet.png").is_file()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_images_that_changed_in_size_are_told_and_not_counted(tmp_path, peek):
    for folder, sizes in (("a", (32, 32, 16)), ("b", (32, 16, 32))):
        tar(tmp_path / folder / "0.tar", {f"{i}.{f}": b for i, s in enumerate(sizes) for f, b in (
            ("png", picture("PNG", size=(s, 32), noise=folder == "b")), ("txt", b"a dog"))})
    ended, cells = peek("a", "--against", "b", "--json")
    assert json.loads(ended.out)["n"] == 1
    assert [beneath for _, _, beneath in cells[5::3]] == ["another size: 32 x 32, then 16 x 32", "another size: 16 x 32, then 32 x 32"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_images_may_change_in_mode_and_format(mode, tmp_path, peek):
    tar(tmp_path / "a/0.tar", {"0.png": picture("PNG", size=(9, 9)), "0.txt": b"a dog"})
    tar(tmp_path / "b/0.tar", {"0.png": picture("PNG", mode, size=(9, 9)), "0.txt": b"a dog"})
    ended, cells = peek("a", "--against", "b", "--json")
    assert ended.status == 0 and json.loads(ended.out)["n"] == 1 and cells[1][0].mode == "RGB"


def test_a_pair_of_which_only_the_caption_changed_has_no_visible_difference(tmp_path, peek):
    for folder, text in (("a", b"a dog"), ("b", b"a cat")):
        tar(tmp_path / folder / "0.tar", {"0.jpg": picture(size=(9, 9)), "0.txt": text})
    ended, cells = peek("a", "--against", "b", "--json")
    found = json.loads(ended.out)
    assert (found["psnr_mean"], found["ssim_mean"], found["linf_mean"]) == (None, 1, 0)
    assert [beneath for _, _, beneath in cells] == ["a dog", "a cat", "PSNR ∞ dB, SSIM 1.0000"]


def test_what_cannot_be_decoded_is_told_and_the_others_are_shown(clean, peek):
    tar(clean / "00000.tar", {f"0{i:02d}.{f}": b for i in range(20) for f, b in (
        ("jpg", UNDECODABLE if i % 2 else picture(size=(32, 32))), ("txt", b"a dog"))})
    for args in ((), ("--recipe", "config.py")):
        ended, cells = peek("clean", *args, "--n", 40)
        keys = [above for _, above, _ in (cells[::3] if args else cells)]
        bad = ended.err.count("cannot be decoded")
        assert ended.status == 0 and bad and ended.err.count("\n") == bad and len(keys) + bad == (7 if args else 40)
        assert not any(key[0] == "0" and int(key) % 2 for key in keys)


def test_all_forms_work_behind_urls(forms, peek):
    local = peek("clean", *ways(forms)["patch"], "--json")[0].out
    with http_server(forms) as web, s3_bucket() as bucket:
        for path in [p for folder in ("poisoned", "patch") for p in (forms / folder).rglob("*") if p.is_file()]:
            with stores.replacing(f"{bucket}/{path.relative_to(forms)}") as temporary:
                shutil.copy(path, temporary)
        for args in (("--recipe", "config.py"), ("--patch", f"{bucket}/patch"), ("--against", f"{bucket}/poisoned"),
                     ("--against", f"{bucket}/poisoned", "--plan", f"{web}/patch/plan.parquet")):
            ended, cells = peek(f"{web}/clean/{{00000..00001}}.tar", *args, "--out", f"{bucket}/sheet.png", "--json")
            assert (ended.status, ended.err) == (0, "")
            assert ended.out == local and stand_above(cells) == planned(forms)
            assert stores.read_bytes(f"{bucket}/sheet.png")[:4] == b"\x89PNG"
            stores.remove(f"{bucket}/sheet.png")


# ---- what is refused


def test_sets_that_do_not_belong_together_are_told(forms, refuses, tmp_path):
    written(tmp_path / "fewer", 0)
    refuses("clean", "--against", "fewer", "--n", 40, says=("fewer: has no shard of the same name and keys as ", "00001.tar; name"))
    written(tmp_path / "smaller", 0, n=19)
    refuses("clean", "--against", "smaller", says=("smaller: has no shard of the same name and keys as ", "00000.tar"))
    written(tmp_path / "other", 2)
    for args in (("--recipe", "config.py", "--plan", "patch/plan.parquet"), ("--against", "other", "--plan", "patch/plan.parquet")):
        refuses("other", *args, says=("other: holds none of the 7 samples of the plan", "name the shards"))
    refuses("other", "--patch", "patch", says=("patch: ", "7 of its 7 samples"))


def test_flags_that_contradict_each_other_are_told(forms, refuses):
    for args in (("--patch", "patch", "--against", "poisoned"), ("--plan", "patch/plan.parquet"), ("--json",), ("--seed", 1),
                 ("--against", "poisoned", "--seed", 1)):
        refuses("clean", *args, says=("--recipe, --patch and --against", "--seed a plan"))


@pytest.mark.parametrize("n", [-1, 0, 101])
def test_a_sheet_of_no_pairs_or_of_too_many_is_refused(n, clean, refuses):
    refuses("clean", "--n", n, says=(f"--n {n}: ", "1 to 100"))


def test_a_sheet_of_nothing_is_refused(clean, refuses, tmp_path):
    refuses("clean", "--against", "clean", says=("clean: no pair differs",))
    tar(tmp_path / "images/0.tar", {"0.jpg": picture()})
    refuses("images", says=("images: no pair is whole",))
    refuses("clean", "--recipe", "config.py", "--plan", "config.py", says=("config.py: not a plan",))
    (tmp_path / "harmless.py").write_text("from mmbackdoor import Data, Model, Recipe\nrecipe = Recipe('r', Data(''), Model())\n")
    refuses("clean", "--recipe", "harmless.py", says=("harmless.py: its recipe poisons nothing",))
