"""Agreement with a judge that we did not write: what benchmarks/agreement.py compares, refuses and has recorded."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Ended, load_program, picture

from mmbackdoor import clip, sets, shards

RECORD = ROOT / "results" / "agreement.json"
ZERO_SHOT = ("accuracy", "top5", "mean_per_class_recall")
RETRIEVAL = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
SETS = {"toy": ZERO_SHOT, "toy_captions": RETRIEVAL, "emoji_concepts": ZERO_SHOT, "emoji_groups": ZERO_SHOT,
        "emoji_captions": RETRIEVAL, "emoji_groups_resized": ZERO_SHOT}
agreement = load_program("benchmarks/agreement")


def test_the_recorded_numbers_of_both_sides_agree_on_every_set_and_measure() -> None:
    if not RECORD.is_file():
        pytest.skip("nothing is recorded yet: python benchmarks/agreement.py --record results/agreement.json")
    found = json.loads(RECORD.read_text())
    for name, measures in SETS.items():
        assert found[f"{name}_n"] >= 200 and "clip_benchmark eval" in found[f"{name}_command_judge"]
        for measure in measures:
            ours, judge = found[f"{name}_{measure}_ours"], found[f"{name}_{measure}_judge"]
            assert 0 < ours <= 1 and abs(ours - judge) <= 1e-4, f"{name} {measure}"
    assert found["largest_difference"] <= 1e-4 and found["tolerance"] == 1e-4
    assert found["clip_benchmark"] == "1.6.2" and found["version_open_clip_torch_ours"] == found["version_open_clip_torch_judge"]
    assert not any(isinstance(value, (dict, list)) for value in found.values())


@pytest.mark.slow
def test_both_sides_agree_when_they_run(tmp_path: Path) -> None:
    """Makes the judge's environment when build/judge is missing, which needs pip and gigabytes."""
    emoji = os.environ.get("MMBACKDOOR_EMOJI") or "../shared/real"
    for needed in ("runs/toy/badnets", "runs/emoji/badnets", "data/toy/test", f"{emoji}/concepts"):
        if not (ROOT / needed).is_dir():
            pytest.skip(f"{needed} is not there: make bench trains the runs")
    done = subprocess.run([sys.executable, "benchmarks/agreement.py", "--json", "--record", str(tmp_path / "agreement.json")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "agreement.json").read_text()) and found["largest_difference"] <= 1e-4
    if RECORD.is_file():
        before = json.loads(RECORD.read_text())
        assert found.keys() == before.keys()
        for name in SETS:
            assert found[f"{name}_n"] == before[f"{name}_n"]


# ---- the sets with captions


def test_a_toy_image_has_five_captions_of_its_shape_and_ground_that_no_other_image_has(toy: Path) -> None:
    names = sets.open_set(toy / "test").classnames
    raws = list(agreement.toy_captions(str(toy / "pairs"), names))
    own = {raw["__key__"]: raw["txt"].decode() for raw in shards.read_pairs(str(toy / "pairs" / "00000.tar"))}
    assert 5 <= len(raws) <= len(own)
    for raw in raws:
        shape, = [c for c in names if c in own[raw["__key__"]]]
        ground, = [g for g in agreement.GROUNDS if g in own[raw["__key__"]].split()]
        captions = raw["txt"].splitlines()
        assert len(captions) == 5 and all(shape in c and ground in c.split() for c in captions)
    every = [caption for raw in raws for caption in raw["txt"].splitlines()]
    assert len(set(every)) == len(every) == 5 * len(raws)


def test_a_concept_has_one_image_and_five_captions(tmp_path: Path) -> None:
    labels = [1, 0, 1, 2]
    shards.write_eval_set(tmp_path / "concepts", ({"__key__": str(i), "jpg": picture(), "cls": str(c)} for i, c in enumerate(labels)),
                          ["cat", "dog", "Dog"], ["{c}"])
    sets.write_pair_set(tmp_path / "captions", agreement.emoji_captions(str(tmp_path / "concepts")))
    raws = list(sets.open_pairs(tmp_path / "captions").raws())
    assert [raw["__key__"] for raw in raws] == ["0", "1"]  # a text encoder cannot tell Dog from dog
    assert [len(set(raw["txt"].decode().splitlines())) for raw in raws] == [5, 5]
    assert all("dog" in c for c in raws[0]["txt"].decode().splitlines())
    assert (tmp_path / "captions" / "dataset_type.txt").read_text().strip() == "retrieval"


# ---- the verdict


def test_the_difference_is_of_every_measure_and_a_missing_one_is_infinite() -> None:
    record = {"version_torch_ours": "2", "version_torch_judge": "1", "a_command_ours": "x", "a_command_judge": "y", "a_n": 3,
              "a_top5_ours": 0.5, "a_top5_judge": 0.25, "b_r1_ours": 1, "b_r1_judge": 1.0,
              "c_top5_ours": 0.5, "c_top5_judge": math.nan, "d_top5_ours": None, "d_top5_judge": 0.5}
    assert agreement.differences(record) == {"a_top5": 0.25, "b_r1": 0.0, "c_top5": math.inf, "d_top5": math.inf}


@pytest.fixture
def run_of(tiny_model: str, tmp_path: Path) -> Path:
    clip.load(clip.Model(tiny_model)).save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], list[list[str]]]:
    """Puts numbers in the place of both programs; gives the command lines they were called with."""

    def install(off: dict[str, float]) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(arguments: list[str], out: Path, what: str) -> dict[str, Any]:
            calls.append(arguments)
            here = {ours: 0.5 for ours in (*ZERO_SHOT, *RETRIEVAL)} | {"n": 7}
            there = {judge: 0.5 + off.get(judge, 0) for judge in (*agreement.CLASSIFICATION.values(), *agreement.RETRIEVAL.values())}
            return there if "judge" in out.name else {"zero_shot": here, "retrieval": here}

        monkeypatch.setattr(agreement, "run", run)
        monkeypatch.setattr(agreement, "environment", lambda _: dict.fromkeys((*agreement.LIBRARIES, "clip_benchmark"), "1"))
        return calls

    return install


@pytest.mark.parametrize(("off", "status"), [({}, 0), ({"acc1": 9e-5}, 0), ({"acc5": 2e-4}, 1), ({"text_retrieval_recall@5": -0.1}, 1)],
                         ids=["equal", "within", "top5", "recall"])
def test_the_exit_status_says_whether_all_measures_agree(
        off: dict[str, float], status: int, run_of: Path, toy: Path, sides: Any, program: Callable[..., Ended], tmp_path: Path) -> None:
    calls = sides(off)
    ended = program("benchmarks/agreement", "--checkpoint", run_of, "--data", toy, "--sets", "toy", "--json", "--record", "r.json")
    assert ended.status == status
    found = json.loads(ended.out)
    assert found == json.loads((tmp_path / "r.json").read_text())
    assert math.isclose(found["largest_difference"], max([0, *map(abs, off.values())]), abs_tol=1e-12)
    assert (found["toy_n"], found["toy_run"], found["toy_captions_image_to_text_r1_ours"]) == (7, str(run_of), 0.5)
    assert [("--dataset" in call, "--retrieval" in call) for call in calls[::2]] == [(True, False), (False, True)]
    assert all(call[call.index("--model") + 1].startswith("local-dir:") and "--no_amp" in call for call in calls[1::2])
    assert str(tmp_path) not in found["toy_captions_command_ours"].replace(str(toy), "").replace(str(run_of), "")
    if status:
        name = {"acc5": "toy_top5", "text_retrieval_recall@5": "toy_captions_image_to_text_r5"}[next(iter(off))]
        assert name in ended.err.splitlines()[-1] and "differ by more than 0.0001" in ended.err


def test_what_both_sides_read_can_be_kept(run_of: Path, toy: Path, sides: Any, program: Callable[..., Ended], tmp_path: Path) -> None:
    sides({})
    ended = program("benchmarks/agreement", "--checkpoint", run_of, "--data", toy, "--sets", "toy", "--keep", "kept")
    assert ended.status == 0 and "toy_mean_per_class_recall" in ended.out
    assert (tmp_path / "kept" / "toy_captions" / "test" / "nshards.txt").read_text() == "1\n"


@pytest.mark.parametrize("fault", ["run", "set", "judge", "keep"])
def test_what_cannot_be_compared_is_told_in_one_line(
        fault: str, run_of: Path, toy: Path, program: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    options = {"--checkpoint": run_of, "--data": toy, "--judge": tmp_path / "full"}
    options |= {"run": {"--checkpoint": tmp_path / "no_run"}, "set": {"--data": tmp_path / "no_data"}, "judge": {},
                "keep": {"--keep": tmp_path / "full"}}[fault]
    ended = program("benchmarks/agreement", "--sets", "toy", *(part for option in options.items() for part in option))
    line, = ended.err.splitlines()
    words = {"run": "no_run: lacks", "set": "no_data/test: no such set", "judge": "is no environment with clip_benchmark 1.6.2",
             "keep": "exists already"}
    assert ended.status == 2 and words[fault] in line and not ended.out


def test_a_side_that_fails_is_told_with_its_own_words_and_its_command(tmp_path: Path) -> None:
    script = "import sys; sys.exit('first\\nno such set')"
    with pytest.raises(agreement.BadInput, match="the judge failed .*no such set.*--keep.*-c"):
        agreement.run([sys.executable, "-c", script], tmp_path / "out.json", "the judge")
    with pytest.raises(agreement.BadInput, match="failed"):
        agreement.run([sys.executable, "-c", ""], tmp_path / "out.json", "one that writes nothing")
