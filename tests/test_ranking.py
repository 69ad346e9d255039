"""The ranking of defenses: the area under a front, seconds only against those of the same machine, and what counts as holding."""
from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, load_program
from hypothesis import given
from hypothesis import strategies as st

from mmbackdoor.fit import Schedule
from mmbackdoor.recipe import Data, Recipe
from mmbackdoor.stores import write_json

fractions = st.floats(0, 1)


@pytest.fixture(scope="module")
def page() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return load_program("benchmarks/defenses")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def result(accuracy: float = 0.9, asr: float | None = 0.1, seconds: float = 10.0, seed: int = 0, threads: int = 1) -> dict[str, Any]:
    return {"name": "x", "seed": seed, "metrics": {"zero_shot": {"accuracy": accuracy, "asr": asr}}, "cost": {"train_seconds": seconds},
            "environment": {"torch": "2", "device": "cpu", "threads": threads, "world_size": 1}}


@given(points=st.lists(st.tuples(fractions, fractions), max_size=6))
def test_the_area_is_that_of_what_some_setting_is_better_than(page: ModuleType, points: list[tuple[float, float]]) -> None:
    """Counted on a grid: a point of the unit square belongs if a setting has more accuracy and less attack success."""
    middles = (np.arange(200) + 0.5) / 200
    accuracy, asr = np.meshgrid(middles, middles)
    covered = np.zeros_like(accuracy, dtype=bool)
    for a, s in points:
        covered |= (accuracy <= a) & (asr >= s)
    assert page.area(points) == pytest.approx(covered.mean(), abs=0.02)


def test_a_model_that_never_errs_has_the_whole_square_and_a_dominated_setting_adds_nothing(page: ModuleType) -> None:
    assert page.area([(1.0, 0.0)]) == 1 and page.area([]) == 0
    assert page.area([(0.9, 0.1), (0.8, 0.2)]) == page.area([(0.9, 0.1)]) == pytest.approx(0.81)
    assert page.area([(0.9, 0.1), (0.5, 0.0)]) == pytest.approx(0.81 + 0.5 * 0.1)


def test_seconds_are_compared_within_one_machine(page: ModuleType) -> None:
    plain = [result(seconds=10), result(seconds=14), result(seconds=1000), result(seconds=1, threads=2)]
    assert page.slowdown([result(seconds=28)], [], plain, "") == "2.00"
    assert page.slowdown([result(seconds=21)], [result(seconds=7)], plain, "") == "2.00", "what a donor takes is part of it"
    assert page.slowdown([result(seconds=28, threads=2)], [], plain, " of training") == "28.00 of training"
    assert page.slowdown([result(threads=4)], [], plain, "") == "–"


def test_what_holds_leaves_a_tenth_and_costs_three_points_of_the_same_seeds(page: ModuleType) -> None:
    before = [result(0.95, 1.0, seed=0), result(0.55, 1.0, seed=1)]
    assert page.holds([result(0.93, 0.09)], before) == "yes"
    assert page.holds([result(0.93, 0.09), result(0.53, 0.11, seed=1)], before) == "yes"
    for worse in (result(0.93, 0.11), result(0.91, 0.09), result(0.93, None), result(0.93, 0.09, seed=1) | {"seed": 2}):
        assert page.holds([worse], before) == ""


def test_a_sweep_compares_its_settings_on_the_seeds_that_all_of_them_have(page: ModuleType, tmp_path: Path) -> None:
    """The chosen one has three seeds and the others one, so the chosen one's mean would be of other victims."""
    chosen, other = Recipe("par", Data("x")), Recipe("sweep/par-lr0.5", Data("x"), schedule=Schedule(lr=0.5))
    for recipe, seed, accuracy in ((chosen, 0, 0.9), (chosen, 1, 0.1), (chosen, 2, 0.2), (other, 0, 0.8)):
        of_it = result(accuracy, 0.1, seed=seed)
        of_it["metrics"]["validation"] = {"accuracy": accuracy}
        write_json(tmp_path / f"{recipe.name}-seed{seed}.json", of_it)
    rvpt, victim = Recipe("rvpt", Data("x")), Recipe("badnets", Data("x"))
    suite = SimpleNamespace(PRETRAINING=(), CLEANING=(chosen,), OTHERS=(), rvpt=rvpt, badnets=victim, sweeps=[chosen, other],
                            against=lambda recipe, victim, name: recipe)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in page.sweep(suite, str(tmp_path)).splitlines()[2:]]
    assert [(row[0], row[2], row[3], row[5]) for row in rows] == [("par", "yes", "1", "90.0"), ("par-lr0.5", "", "1", "80.0")]


def test_the_picture_has_a_panel_for_each_attack_and_a_mark_for_each_setting(page: ModuleType) -> None:
    drawn = {"badnets": {"none": [(0.9, 1.0)], "par": [(0.9, 0.1), (0.8, 0.0)]}, "wanet": {"none": [(0.9, 0.8)]}}
    svg = page.picture(drawn)
    root = ET.fromstring(svg)
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"badnets", "wanet", "none", "par"} <= set(texts) and texts.count("none") == 1
    groups = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").startswith("axes_")]
    assert len(groups) == 2
    assert svg == page.picture(drawn), "the same numbers give the same file"
