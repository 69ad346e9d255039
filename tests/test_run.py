"""What a run's directory promises beyond its training: a lift is only over the same threat on the same images."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted import CLASSES, CORNER, LABELS, labelled, planted

from mmbackdoor import run
from mmbackdoor.triggers import Word
from mmbackdoor.types import Target

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
