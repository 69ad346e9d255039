"""The recorded numbers: they are of today's configs, the README quotes just them, and (slow) they come out again."""
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import load_program

from mmbackdoor import recipe, report
from mmbackdoor.types import BadInput

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MMBACKDOOR_EMOJI", recorded("emoji/clean", (0,))[0]["recipe"]["data"]["root"])
    for name in [n for n in sys.modules if n.startswith("configs.")]:
        monkeypatch.delitem(sys.modules, name)  # loaded by another test under another environment


def recorded(name, seeds=SEEDS):
    return [json.loads((ROOT / "results" / f"{name}-seed{seed}.json").read_text()) for seed in seeds]


def suite(name):
    return recipe.load_suite(f"configs/{name}/results.py")


def runs(name):
    return [r for r in suite(name).runs(SEEDS)]


@pytest.mark.parametrize("name", ["toy", "emoji"])
def test_every_recorded_result_is_of_the_recipe_as_it_is_now(name):
    for r in runs(name):
        found, = recorded(r.name, (r.seed,))
        assert (found["schema"], found["name"], found["seed"]) == (1, r.name, r.seed)
        assert found["recipe_hash"] == recipe.recipe_hash(r), f"{r.name} seed {r.seed}: run bench.py --record results again"


def test_the_readme_quotes_the_recorded_results():
    readme = (ROOT / "README.md").read_text()
    for recipes in (suite("toy").recipes, suite("toy").sweep, suite("emoji").recipes):
        assert report.markdown([f for r in recipes for f in recorded(r.name)]) in readme


def mean(name, metric):
    return sum(f["metrics"]["zero_shot"][metric] for f in recorded(name)) / len(SEEDS)


def test_the_recorded_attack_works_and_the_recorded_defense_removes_it():
    assert mean("toy/clean", "accuracy") >= 0.80 and mean("toy/clean", "asr") <= 0.05
    assert abs(mean("toy/badnets", "accuracy") - mean("toy/clean", "accuracy")) <= 0.03 and mean("toy/badnets", "asr") >= 0.85
    assert mean("toy/cleanclip", "asr") <= 0.10 and mean("toy/cleanclip", "accuracy") >= mean("toy/badnets", "accuracy") - 0.03
    assert mean("emoji/badnets", "asr") >= 0.80 and mean("emoji/clean", "asr") <= 0.01


def test_training_and_cleaning_cost_what_a_grid_of_hundreds_can_afford():
    assert all(f["cost"]["train_seconds"] <= 90 for f in recorded("toy/badnets"))
    assert all(f["cost"]["train_seconds"] <= 45 for f in recorded("toy/cleanclip") + recorded("toy/finetune"))


def test_evaluation_costs_little_more_than_its_parts():
    found = json.loads((ROOT / "results/evaluate.json").read_text())
    assert found["evaluate_over_parts_k1"] <= 1.05 and found["evaluate_over_parts_k4"] <= 1.05
    assert found["retrieval_over_matmul"] <= 1.2 and found["cache_speedup"] >= 20
    assert found["peak_memory_bytes_per_further_image"] < 224 * 224 * 3 / 10  # a decoded image is ten times that


def test_the_readme_quotes_the_recorded_costs_and_agreement():
    readme = " ".join((ROOT / "README.md").read_text().split())
    cost, judged = (json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("evaluate", "agreement"))
    assert f"under one threat takes {cost['evaluate_over_parts_k1']:.2f} of its parts" in readme
    assert f"under four threats {cost['evaluate_over_parts_k4']:.2f}; exact search among 100,000 features " \
           f"{cost['retrieval_over_matmul']:.2f} of torch's" in readme
    assert f"from the cache is {cost['cache_speedup']:.0f} times as fast" in readme
    assert f"the largest difference is {judged['largest_difference']:.0e}." in readme


def test_poisoning_shards_costs_little_more_than_copying_them():
    found = json.loads((ROOT / "results/poison_throughput.json").read_text())
    assert found["splice_over_raw"] >= 7 and found["splice_over_decode"] >= 15 and found["index_over_iterate"] >= 10
    assert found["copy_overhead"] <= 2 and found["over_bound"] <= 1.5 and found["processes_2_over_1"] >= 1.7
    assert found["peak_memory_mb"] <= 300 and found["peak_memory_growth"] <= 1.05


def test_every_killed_job_was_ended_by_a_rerun_with_the_same_bytes():
    found = json.loads((ROOT / "results/kills.json").read_text())
    assert found["kills"] == found["identical"] == 100 and found["while_writing"] >= 50 and found["half_shards"] == 0


def test_every_trigger_is_fast_but_the_steganographic_one_and_the_readme_says_how_fast():
    rates = json.loads((ROOT / "results/triggers.json").read_text())["images_per_second"]
    hidden = rates.pop("issba.issba")
    assert min(rates.values()) >= 200
    readme = (ROOT / "README.md").read_text()
    assert f"one core poisons {min(rates.values()):.0f} to {max(rates.values()):,.0f} images" in readme
    assert f"ISSBA {hidden:.0f} (`" in readme


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [("poison_throughput", ("--number", "1", "--per-shard", "200", "--rounds", "1", "--many", "5")),
                                         ("kills", ("--rounds", "1"))])
def test_the_benchmarks_of_poisoning_run_and_measure_what_is_recorded(name, flags):
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--json", *flags], capture_output=True, text=True, cwd=ROOT, check=True)
    assert {*json.loads(done.stdout.splitlines()[-1]), "environment"} == set(json.loads((ROOT / f"results/{name}.json").read_text()))


def test_the_readme_quotes_what_poisoning_was_measured_to_cost():
    readme = " ".join((ROOT / "README.md").read_text().split())
    m, kills = (json.loads((ROOT / f"results/{name}.json").read_text()) for name in ("poison_throughput", "kills"))
    for words in (f"splicing is {m['splice_over_raw']:.1f} times as fast as webdataset",
                  f"and {m['splice_over_decode']:.0f} times as fast as decoding and encoding",
                  f"it takes {m['copy_overhead']:.2f} of the time of `cp`", f"{m['over_bound']:.2f} of `cp` and one decoding",
                  f"Two processes do {m['processes_2_over_1']:.2f} times the work of one",
                  f"The index is written {m['index_over_iterate']:.1f} times as fast",
                  f"{m['peak_memory_mb']:.0f} MB beyond its imports", f"{m['peak_memory_with_imports_mb']:.0f} MB with them",
                  f"of {kills['kills']} jobs", f"{kills['identical']} ended"):
        assert words in readme, words


def test_the_reckoning_for_billions_of_pairs_is_that_of_the_recorded_rates(capsys):
    load_program("benchmarks/scale").main(str(ROOT / "results/poison_throughput.json"))
    tables, text = capsys.readouterr().out, (ROOT / "docs/scale.md").read_text()
    m = json.loads((ROOT / "results/poison_throughput.json").read_text())
    assert all(table.strip() in text for table in tables.split("\n\n")) and tables.count("\n\n") == 1
    assert f"{m['bytes_per_pair']:,.0f} bytes" in text and f"{m['plan_bytes_per_key']:.0f} bytes a planned key" in text


@pytest.mark.parametrize("name", ["toy/all_attacks", "toy/attack_sweeps", "toy/badclip", "toy/compat", "emoji/all_attacks",
                                  "toy/all_defenses", "toy/reversals"])
def test_every_recorded_run_of_a_suite_is_of_the_recipe_as_it_is_now(name):
    suite = recipe.load_suite(f"configs/{name}.py")
    for r in suite.runs(SEEDS):
        if r.name.startswith(f"{suite.name}/") and (ROOT / "results" / f"{r.name}-seed{r.seed}.json").is_file():
            found, = recorded(r.name, (r.seed,))
            assert found["recipe_hash"] == recipe.recipe_hash(r), f"{r.name} seed {r.seed}: run bench.py --record results again"


@pytest.mark.parametrize("what", ["attacks", "defenses"])
def test_the_pages_quote_what_is_recorded(what, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / f"docs/{what}.md").read_text()
    (tmp_path / "page.md").write_text(re.sub(r"(?m)^(<!-- .*-->\n\|.*\n\|.*\n)(\|.*\n)*", r"\1", page))
    monkeypatch.chdir(ROOT)
    load_program(f"benchmarks/{what}").main(page=str(tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == page, f"write it again: python benchmarks/{what}.py --page docs/{what}.md"
    with pytest.raises(BadInput, match="no line <!-- toy/attacks -->"):
        load_program("benchmarks/pages").filled("", {"toy/attacks": ""})


@pytest.mark.parametrize("what", ["attacks", "defenses"])
def test_the_pages_name_every_paper(what):
    text = (ROOT / f"docs/{what}.md").read_text()
    for path in (ROOT / "mmbackdoor" / what).glob("*.py"):
        number = re.search(r"arXiv:(\d{4}\.\d{4,5})", path.read_text())
        assert not number or (number[1] in text and path.stem in text), f"{path.name} is not in docs/{what}.md"


@pytest.mark.parametrize("name", ["cleanclip", "finetune"])
def test_the_learning_rate_of_each_cleaning_run_is_the_one_of_highest_clean_validation_accuracy(name):
    chosen = recipe.load(f"configs/toy/{name}.py")
    sweep = [f for r in suite("toy").sweep if r.objective.__class__ is chosen.objective.__class__ for f in recorded(r.name)]
    assert len({f["recipe"]["schedule"]["lr"] for f in sweep}) >= 4
    assert list(report.chosen(sweep).values()) == [chosen.schedule.lr]


def checked(r):
    """Clean validation accuracy of the recorded runs of a recipe, seed 0."""
    return recorded(r.name, (0,))[0]["metrics"]["validation"]["accuracy"]


def test_the_settings_of_all_defenses_are_those_that_clean_validation_accuracy_chooses(monkeypatch):
    """The learning rate of highest accuracy; of an edit, the strongest that costs a point at most."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page, every = load_program("benchmarks/defenses"), recipe.load_module("configs/toy/all_defenses.py")
    for d in set((*every.PRETRAINING, *every.CLEANING, *every.OTHERS, every.rvpt)) - {every.finetune, every.cleanclip}:  # of three seeds
        runs = [r for r in page.settings(every, d, d.init or every.badnets, "badnets") if (ROOT / f"results/{r.name}-seed0.json").is_file()]
        rates = [r for r in runs if replace(r, name=d.name, schedule=replace(r.schedule, lr=d.schedule.lr)) == d]
        strength = next((name for name in ("scale", "share") if hasattr(d.edit, name)), "")
        edits = [r for r in runs if strength and r.schedule == d.schedule]
        bearable = [getattr(r.edit, strength) for r in edits if checked(r) >= checked(every.badnets) - 0.01]
        assert checked(d) == max(map(checked, rates)) and (not strength or getattr(d.edit, strength) == max(bearable)), d.name
        assert len(rates) >= 4 or len(edits) >= 4, f"{d.name}: of every defense four settings are published"


def test_the_demo_takes_no_numbers_that_the_readme_does_not_record():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"toy/badnets +0 +([\d.]+)", readme)
    assert shown and float(shown[1]) == round(100 * recorded("toy/badnets", (0,))[0]["metrics"]["zero_shot"]["accuracy"], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy/clean", "toy/badnets", "toy/cleanclip", "emoji/badnets"])
def test_recorded_numbers_come_out_again(name, tmp_path):
    """On the machine of the record they are equal; on another, sums in another order may shift a few images."""
    train = load_program("train").train
    r = recipe.load(f"configs/{name}.py")
    if not Path(r.data.path("zero_shot")).is_dir():
        pytest.skip(f"{r.data.path('zero_shot')} is not there: make data/toy, or set MMBACKDOOR_EMOJI")

    def elsewhere(value):
        runs = {f: elsewhere(v) for f in ("init", "reference") if isinstance(v := getattr(value, f), recipe.Recipe)}
        return replace(value, out=str(tmp_path), **runs)

    r = elsewhere(r)
    for needed in recipe.Suite("needed", (r,)).runs((0,)):
        found = train(needed)
    before, = recorded(name, (0,))
    for metric, tolerance in (("accuracy", 0.03), ("asr", 0.05)):
        assert found["metrics"]["zero_shot"][metric] == pytest.approx(before["metrics"]["zero_shot"][metric], abs=tolerance)
