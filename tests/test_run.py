"""What a run's directory promises beyond its training: a lift is only over the same threat on the same images."""
from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from planted import CLASSES, CORNER, LABELS, labelled, planted

from mmbackdoor import run, shards
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.index import find
from mmbackdoor.poison import plan, poison
from mmbackdoor.recipe import Data, Recipe, environment, recipe_hash, told
from mmbackdoor.triggers import Word
from mmbackdoor.types import BadInput, Target

OTHER = replace(CORNER, target=Target("class 5"))


def measured(dataset: str = "set", **asr: float) -> dict[str, Any]:
    each = {name: {"asr": value, "asr_reference": None, "lift": None} for name, value in asr.items()}
    return {"zero_shot": {"dataset": dataset, "accuracy": 0.5} | next(iter(each.values())) | ({"threats": each} if len(each) > 1 else {})}


def reference(folder: Path, threats: Any, metrics: dict[str, Any]) -> str:
    (folder / "results.json").write_text(json.dumps({"schema": 1, **run.shown(threats), "metrics": metrics}))
    return str(folder)


def test_the_lift_is_over_the_reference_under_the_same_threat(tmp_path: Path) -> None:
    clean = reference(tmp_path, CORNER, measured(a=0.25))
    found = run.compare(measured(a=1.0), clean, CORNER)["zero_shot"]
    assert (found["asr_reference"], found["lift"]) == (0.25, 0.75)


@pytest.mark.parametrize("metrics, threat", [(measured("elsewhere", a=0.25), CORNER), (measured(a=0.25), OTHER),
                                             (measured(a=0.25), replace(CORNER, at="input"))])
def test_another_set_threat_or_stage_is_no_reference(metrics: dict[str, Any], threat: Any, tmp_path: Path) -> None:
    found = run.compare(measured(a=1.0), reference(tmp_path, threat, metrics), CORNER)["zero_shot"]
    assert (found["asr_reference"], found["lift"]) == (None, None)


def test_of_several_threats_each_finds_its_own_reference_whatever_its_name_there(tmp_path: Path) -> None:
    clean = reference(tmp_path, {"x": OTHER, "y": CORNER}, measured(x=0.5, y=0.25))
    found = run.compare(measured(corner=1.0, other=1.0), clean, {"corner": CORNER, "other": OTHER})["zero_shot"]
    assert (found["lift"], found["threats"]["corner"]["lift"], found["threats"]["other"]["lift"]) == (0.75, 0.75, 0.5)
    found = run.compare(measured(corner=1.0), clean, CORNER)["zero_shot"]
    assert found["lift"] == 0.75
    only = reference(tmp_path, OTHER, measured(x=0.5))
    found = run.compare(measured(corner=1.0, other=1.0), only, {"corner": CORNER, "other": OTHER})["zero_shot"]
    assert (found["lift"], found["threats"]["corner"]["lift"], found["threats"]["other"]["lift"]) == (None, None, 0.5)


def test_a_probe_is_measured_under_triggers_of_images_alone(tmp_path: Path) -> None:
    sets = run.Sets(zero_shot=labelled(tmp_path / "test", LABELS), train=labelled(tmp_path / "train", LABELS * 3))
    threats = {"corner": CORNER, "word": replace(CORNER, trigger=Word("3")), "source": replace(CORNER, source=CLASSES[:1])}
    found = run.measure(planted(), sets, threats)
    assert found["zero_shot"]["threats"].keys() == threats.keys() and "threats" not in found["linear_probe"]
    assert found["linear_probe"]["asr"] == 1


def test_a_reference_that_was_not_measured_yet_is_none(tmp_path: Path) -> None:
    assert run.compare(measured(a=1.0), str(tmp_path), CORNER) == measured(a=1.0)


def test_an_image_that_cannot_be_decoded_is_left_out_of_what_can_be_seen(toy: Path, tmp_path: Path) -> None:
    raws = list(shards.read_pairs(str(toy / "train/00000.tar")))
    shards.write_shards(tmp_path / "broken", [raw | {"jpg": raw["jpg"][:200]} if i == 3 else raw for i, raw in enumerate(raws)])
    index, attack = find(str(tmp_path / "broken")), badnets("red star", rate=0.2)
    truth = replace(plan(attack, index, 0), keys=frozenset(raw["__key__"] for raw in raws[:6]))
    whole = replace(truth, keys=truth.keys - {raws[3]["__key__"]})
    seen, without = (run.visible(index, [partial(poison, attack=attack, plan=t)], t) for t in (truth, whole))
    assert seen and seen == without


def test_a_start_of_another_recipe_than_the_one_that_is_named_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = Recipe("start", Data("x"), out=str(tmp_path))
    r = Recipe("next", Data("x"), init=named, reference=named, out=str(tmp_path))
    named.directory.mkdir()
    for digest, other in ((recipe_hash(named), {}), ("of another", {"init": "of another", "reference": "of another"})):
        (named.directory / "results.json").write_text(json.dumps({"schema": 1, "recipe_hash": digest}))
        assert run.weights(named) == str(named.directory) and run.otherwise(r) == other
        assert ("start is of another recipe than --init names" in capsys.readouterr().err) == bool(other)


def test_a_keep_list_has_a_key_on_each_line_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("dir/photo 1\r\n\n  café \n", encoding="utf-8")
    assert run.keep_list(str(tmp_path / "keep.txt")) == {"dir/photo 1", "café"}


def test_a_result_is_written_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment(1, "cpu")["git"] is None


@pytest.mark.parametrize("rank", ["0", "3"])
def test_an_error_of_any_process_is_told(rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher ends the others before they say the same."""
    def refuse() -> None:
        raise BadInput("00003.tar: is torn")

    waited: list[float] = []
    monkeypatch.setattr("mmbackdoor.recipe.time.sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        told(refuse)()
    assert capsys.readouterr().err == "error: 00003.tar: is torn\n" and bool(waited) == (rank != "0")
