"""What the report promises: nothing from a file is executed, nothing is fetched, nothing missing stops it."""

from __future__ import annotations

import base64
import csv as csv_reader
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmbackdoor import fit, report
from mmbackdoor.types import BadInput

HOSTILE = "<script>alert('x')</script>"


def result(
    name: str = "toy/badnets", seed: int | None = 0, accuracy: float | None = 0.85, **more: Any
) -> dict[str, Any]:
    """A record of schema 1; `more` may set asr, lift, lr, validation, objective and fields of the record itself."""
    zero_shot = {"n": 1000, "accuracy": accuracy, "accuracy_ci95": accuracy and [accuracy - 0.02, accuracy + 0.02]}
    zero_shot |= {"asr": more.pop("asr", None), "lift": more.pop("lift", None), "asr_reference": None}
    objective = {"class": more.pop("objective", "mmbackdoor.losses.Clip")} | more.pop("settings", {})
    recipe = {"schedule": {"lr": more.pop("lr", 1e-3)}, "objective": objective}
    recipe["threat"] = {"target": {"label": more.pop("target", "red star")}}
    validation = {"accuracy": more.pop("validation", None)}
    metrics = {"zero_shot": zero_shot, "validation": validation, "retrieval": more.pop("retrieval", {})}
    cost = {"train_seconds": more.pop("seconds", 60.0)}
    return {"schema": 1, "name": name, "seed": seed, "recipe": recipe, "cost": cost, "metrics": metrics} | more


def png(size: int = 8) -> str:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 30)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def example(**more: Any) -> dict[str, Any]:
    says = {
        "clean_says": [["blue cross", 0.9], ["green ring", 0.06]],
        "triggered_says": [["red star", 0.8], ["blue cross", 0.1]],
    }
    return {"key": "0001", "true": "blue cross", "clean": png(), "triggered": png()} | says | more


def write(
    folder: Path, record: dict[str, Any] | None = None, log: str = "", examples: Any = None, recipe: str = ""
) -> Path:
    folder.mkdir(parents=True)
    files = {"results.json": record and json.dumps(record), "log.jsonl": log, "recipe.py.txt": recipe}
    for name, text in (files | {"examples.json": examples and json.dumps(examples)}).items():
        if text:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def full_run(folder: Path, **more: Any) -> Path:
    log = [
        {"epoch": 0, "accuracy": 0.06, "asr": 0.05},
        {"epoch": 1, "loss": 3.2},
        {"epoch": 2, "loss": 1.9, "accuracy": 0.8, "asr": 0.9},
    ]
    record = (
        result(asr=0.9, lift=0.89, retrieval={"n": 100, "image_to_text_r1": 0.25, "image_to_text_r1_chance": 0.01})
        | more
    )
    return write(
        folder, record, "".join(json.dumps(row) + "\n" for row in log), [example()], "Recipe(name='toy/badnets')"
    )


def page(tmp_path: Path, *runs: Path, sweep: tuple[Path, ...] = (), title: str = "A title") -> str:
    report.html(title, runs, tmp_path / "out" / "report.html", sweep)
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def visible(html: str) -> str:
    """The page's words, one space apart."""
    words: list[str] = []
    parser = HTMLParser()
    parser.handle_data = words.append  # type: ignore[method-assign, assignment]
    parser.feed(re.sub(r"<style.*?</style>", "", html, flags=re.S))
    return " ".join(" ".join(words).split())


# ---- tables


def test_table_is_aligned_and_in_per_cent() -> None:
    lines = report.table([result(asr=0.902, lift=-0.031), result("a/much/longer/name", None)]).splitlines()
    assert "85.0 [83.0, 87.0]" in lines[2] and " 90.2 " in lines[2] and "−3.1" in lines[2] and lines[2].endswith("60.0")
    assert len({len(line) for line in lines}) == 1


def test_nulls_and_missing_metrics_are_dashes() -> None:
    assert report.table([result(accuracy=None)]).splitlines()[2].split() == [
        "toy/badnets",
        "0",
        "–",
        "–",
        "–",
        "–",
        "60.0",
    ]
    assert report.table([{}]).splitlines()[2].split() == ["–"] * 7
    assert report.table([result(accuracy=float("nan"), accuracy_ci95=None)]).splitlines()[2].split()[2] == "–"


def test_nothing_is_shown_as_minus_zero() -> None:
    assert "−" not in report.table([result(lift=-0.0004)])


def test_csv_has_numbers_and_empty_cells() -> None:
    (row,) = csv_reader.DictReader(io.StringIO(report.csv([result('with, "comma"', asr=0.5, lift=-0.1)])))
    assert row["run"] == 'with, "comma"' and row["asr_reference_percent"] == ""
    assert [float(row[key]) for key in ("accuracy_low_percent", "asr_percent", "lift_percent", "train_seconds")] == [
        83,
        50,
        -10,
        60,
    ]


def test_latex_escapes_every_special_character() -> None:
    rows = report.latex([result(r"50%_of & $x^2~{#}\end", lift=-0.5), result("[h]"), result("*")]).splitlines()[4:7]
    assert rows[0].startswith(r"50\%\_of \& \$x\textasciicircum{}2\textasciitilde{}\{\#\}\textbackslash{}end & 0 & ")
    assert "$-$50.0" in rows[0] and rows[0].count("&") == 7 and "–" not in rows[0]
    assert rows[1].startswith("{[}h]") and rows[2].startswith("{*}")


def test_summary_has_mean_range_and_sd_over_seeds() -> None:
    seeds = [result(seed=seed, accuracy=a, asr=s) for seed, a, s in ((0, 0.80, 0.9), (1, 0.84, None), (2, 0.88, 0.7))]
    first, second = report.summary([*seeds, result("other", asr=0.5)])
    assert (first["name"], first["seeds"], second["name"], second["seeds"]) == ("toy/badnets", 3, "other", 1)
    assert first["accuracy"] == pytest.approx({"n": 3, "mean": 0.84, "min": 0.80, "max": 0.88, "sd": 0.04})
    assert first["asr"]["n"] == 2 and first["asr"]["mean"] == pytest.approx(0.8) and first["lift"] is None
    assert second["asr"] == {"n": 1, "mean": 0.5, "min": 0.5, "max": 0.5, "sd": None}


def test_a_seed_run_twice_counts_once() -> None:
    (entry,) = report.summary(
        [result(seed=0, accuracy=0.2), result(seed=1, accuracy=0.6), result(seed=0, accuracy=0.8)]
    )
    assert entry["seeds"] == 2 and entry["accuracy"]["mean"] == pytest.approx(0.7)


def test_markdown_gives_mean_and_range() -> None:
    text = report.markdown([result("a|b", 0, 0.8, asr=0.5), result("a|b", 1, 0.9)])
    assert text.splitlines()[2] == r"| a\|b | 2 | 85.0 (80.0 to 90.0) | 50.0, n = 1 | – | 60.0 (60.0 to 60.0) |"


# ---- selection


def test_selection_is_by_clean_validation_accuracy_and_ignores_asr() -> None:
    sweep = [result(lr=1e-4, validation=0.7, asr=0.0), result(lr=1e-3, validation=0.9, asr=0.99, accuracy=0.1)]
    assert report.select(sweep) is sweep[1]
    for r in sweep:
        r["metrics"]["zero_shot"]["asr"] = 1 - r["metrics"]["zero_shot"]["asr"]
    assert report.select(sweep) is sweep[1]


def test_equal_accuracy_selects_the_lower_learning_rate() -> None:
    sweep = [result(lr=lr, validation=0.9) for lr in (1e-2, 1e-4, 1e-3)]
    assert report.select(sweep) is sweep[1]
    flat = [{"recipe": {"lr": lr}, "metrics": {"validation": {"accuracy": 0.9}}} for lr in (1e-2, 1e-4)]
    assert report.select(flat) is flat[1]


def test_selection_falls_back_to_test_accuracy_but_never_mixes_the_two() -> None:
    tested, better = result(accuracy=0.8), result(accuracy=0.9)
    assert report.select([tested, better]) is better
    validated = result(accuracy=0.1, validation=0.2)
    assert report.select([tested, better, validated]) is validated


@pytest.mark.parametrize("measure", ["asr", "asr_top5", "lift", "robust_accuracy"])
def test_selection_by_a_triggered_measure_is_refused(measure: str) -> None:
    with pytest.raises(BadInput, match=measure):
        report.select([result(asr=0.1)], by=("zero_shot", measure))


def test_selection_from_nothing_is_refused() -> None:
    for sweep in ([], [result(accuracy=None)]):
        with pytest.raises(BadInput, match="nothing to select"):
            report.select(sweep)


# ---- the page


def test_strings_from_files_cannot_execute(tmp_path: Path) -> None:
    shot = example(key=f"k{HOSTILE}", true=HOSTILE, clean=f'"><img onerror=x>{HOSTILE}', clean_says=[[HOSTILE, 0.5]])
    environment = {f"device{HOSTILE}": HOSTILE}
    chances = {f"a_{HOSTILE}": 0.1}
    record = result(HOSTILE, asr=0.5, target=HOSTILE, environment=environment, recipe_hash=HOSTILE, retrieval=chances)
    hostile = write(tmp_path / "a", record, json.dumps({"epoch": 1, "loss": HOSTILE}), [shot], HOSTILE)
    sweep = write(tmp_path / "b", result(HOSTILE, objective=f"a.{HOSTILE}", settings={"x": HOSTILE}))
    html = page(tmp_path, hostile, sweep=(sweep,), title=HOSTILE)
    assert "<script" not in html and "<img onerror" not in html and html.count("&lt;script&gt;") > 10


def test_page_is_self_contained(tmp_path: Path) -> None:
    sweep = tuple(
        full_run(tmp_path / f"s{i}", **result(lr=lr, validation=0.8, asr=0.5)) for i, lr in enumerate((1e-3, 1e-2))
    )
    html = page(tmp_path, full_run(tmp_path / "a"), sweep=sweep)
    assert not re.search(r"https?://", html) and not re.search(r"<(script|link|iframe|object)|@import", html)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', html))
    assert all(
        target.startswith("#") for target in re.findall(r'href="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    )
    assert html.count("<svg") > 5 and "default-src 'none'" in html


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    sweep = tuple(
        full_run(tmp_path / f"s{i}", **result(lr=lr, validation=0.8, asr=0.5)) for i, lr in enumerate((1e-3, 1e-2))
    )
    html = page(tmp_path, full_run(tmp_path / "a"), full_run(tmp_path / "b"), sweep=sweep)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]*)"', html) + re.findall(r"url\(#([^)]*)\)", html)
    assert targets and set(targets) <= set(ids)


def test_two_renders_are_identical(tmp_path: Path) -> None:
    runs = [full_run(tmp_path / "a"), full_run(tmp_path / "b", seed=1)]
    assert page(tmp_path, *runs, sweep=tuple(runs)) == page(tmp_path, *runs, sweep=tuple(runs))


def test_missing_files_are_named_in_the_page(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    words = visible(page(tmp_path, full_run(tmp_path / "full"), tmp_path / "bare", sweep=(tmp_path / "bare",)))
    for name in ("results.json", "log.jsonl", "examples.json", "recipe.py.txt"):
        assert f"bare : {name} is absent." in words
    assert "toy/badnets : " not in words


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", "\udcff"])
def test_torn_files_are_named_in_the_page(tmp_path: Path, text: str) -> None:
    run = full_run(tmp_path / "run")
    for name in ("results.json", "log.jsonl", "examples.json"):
        (run / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    words = visible(page(tmp_path, run))
    assert all(f"run : {name} " in words for name in ("results.json", "log.jsonl", "examples.json"))


NO_METRICS = [None, {}, {"zero_shot": None, "retrieval": None}, {"zero_shot": {"accuracy_ci95": [None, None]}}]


@pytest.mark.parametrize("metrics", NO_METRICS)
def test_a_result_without_metrics_is_shown(tmp_path: Path, metrics: Any) -> None:
    run = write(tmp_path / "a", {"name": "eval/only", "recipe": None, "environment": None, "metrics": metrics})
    assert "eval/only – – – – – –" in visible(page(tmp_path, run, sweep=(run,)))


def test_a_path_that_is_no_directory_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        page(tmp_path, tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_only_the_page_is_left_behind(tmp_path: Path) -> None:
    page(tmp_path, full_run(tmp_path / "a"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]


def test_a_torn_log_line_costs_only_itself_and_a_repeated_epoch_replaces() -> None:
    log = '{"epoch": 1, "loss": 9}\n{"epoch": 2, "lo\n\n{"epoch": 2, "loss": 2}\n{"epoch": 1, "loss": 3}\n[]\n'
    assert fit.logged(log) == [{"epoch": 1, "loss": 3}, {"epoch": 2, "loss": 2}]


def test_examples_mark_the_target_and_the_truth(tmp_path: Path) -> None:
    shot = example(triggered_says=[["fish & chips", 0.8]])
    run = write(tmp_path / "a", result(asr=0.9, target="fish & chips"), examples=[shot])
    words = visible(page(tmp_path, run))
    assert "✓ blue cross 90.0" in words and "◎ fish & chips 80.0" in words and " green ring 6.0" in words


def test_an_example_that_is_to_be_taken_for_something_of_its_own_marks_that(tmp_path: Path) -> None:
    shot = example(triggered_says=[["red star", 0.8], ["blue ring", 0.1]], target="blue ring")
    words = visible(page(tmp_path, write(tmp_path / "a", result(asr=0.9, target="red star"), examples=[shot])))
    assert "◎ blue ring 10.0" in words and "◎ red star 80.0" not in words


def test_only_small_images_keep_square_pixels(tmp_path: Path) -> None:
    run = write(tmp_path / "a", result(), examples=[example(clean=png(32), triggered=png(224))])
    assert page(tmp_path, run).count('class="pixelated"') == 1


def test_an_example_without_a_trigger_has_one_column(tmp_path: Path) -> None:
    run = write(tmp_path / "a", result(), examples=[example(triggered=None, triggered_says=None)])
    html = page(tmp_path, run)
    assert html.count("<img") == 1 and "<th>triggered</th>" not in html


def test_sweep_shows_the_choice_by_validation_accuracy_of_the_seeds_mean(tmp_path: Path) -> None:
    # The best single run has learning rate 0.01; the mean over both seeds, and so the page, chooses 0.001.
    points = [(0, 1e-3, 0.80, 0.9), (1, 1e-3, 0.86, 0.8), (0, 1e-2, 0.90, 0.0), (1, 1e-2, 0.70, 0.0)]
    records = [result("s", seed, lr=lr, validation=validation, asr=asr) for seed, lr, validation, asr in points]
    words = visible(page(tmp_path, sweep=tuple(write(tmp_path / str(i), r) for i, r in enumerate(records))))
    assert "Clip 0.001 validation accuracy 83.0 % 2 85.0 85.0" in words and "never by ASR" in words


def test_sweep_tells_settings_of_one_objective_apart(tmp_path: Path) -> None:
    sweep = [write(tmp_path / f"{w}", result(settings={"weight": w}, validation=0.5 + w, asr=0.1)) for w in (0.0, 0.25)]
    words = visible(page(tmp_path, sweep=tuple(sweep)))
    assert "Clip {'weight': 0.0} 0.001 validation accuracy 50.0 %" in words and "Clip {'weight': 0.25}" in words


def test_retrieval_is_shown_beside_chance(tmp_path: Path) -> None:
    numbers = {"n": 100, "image_to_text_r1": 0.25, "image_to_text_r1_chance": 0.01, "text_to_image_median_rank": 1.0}
    words = visible(page(tmp_path, write(tmp_path / "a", result(retrieval=numbers))))
    assert "image → text R@1 25.0 chance 1.0" in words and "text → image median rank 1.0" in words
    assert "Retrieval" not in visible(page(tmp_path, write(tmp_path / "b", result())))


# ---- the table of attacks


def attacked(name: str = "toy/attacks/wanet", seed: int = 0, asr: float | None = 0.9, **more: Any) -> dict[str, Any]:
    """A result as train.py writes it; `more` may set psnr, poisoned, asr_reference, retrieval and threats {name: asr}."""
    found = result(name, seed, asr=asr, lift=None if asr is None else asr - 0.01, retrieval=more.get("retrieval", {}))
    found["metrics"]["zero_shot"] |= {"asr_reference": more.get("asr_reference", 0.01)}
    if threats := more.get("threats"):
        found["metrics"]["zero_shot"]["threats"] = {k: {"asr": v, "asr_reference": 0.0, "lift": v} for k, v in threats.items()}
    stealth = {"psnr_mean": more.get("psnr", 30.25), "ssim_mean": 0.98765, "n": 64}
    return found | {"data": {"pairs": 10_000, "poisoned": more.get("poisoned", 200), "stealth": stealth}}


def cells_of(table: str) -> list[dict[str, str]]:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert all(len(row) == len(head) == len(set(head)) for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_line_of_the_table_of_attacks_says_what_was_poisoned_how_visibly_and_what_it_did() -> None:
    ranks = {"asr_image_to_text_hit1": 0.85, "asr_image_to_text_hit1_reference": 0.021, "asr_text_to_image_hit10": 0.5,
             "asr_text_to_image_hit10_reference": 0.0}
    (row,) = cells_of(report.attacks([attacked(retrieval=ranks)]))
    assert row == {"run": "toy/attacks/wanet", "seeds": "1", "poisoned %": "2.00", "PSNR (dB)": "30.2", "SSIM": "0.9877",
                   "accuracy %": "85.0", "ASR %": "90.0", "reference ASR %": "1.0", "lift (points)": "89.0",
                   "image→text hit@1 %": "85.0", "reference hit@1 %": "2.1", "text→image hit@10 %": "50.0", "reference hit@10 %": "0.0"}


def test_seeds_of_an_attack_are_one_line_of_mean_and_range() -> None:
    seeds = [attacked(seed=seed, asr=asr, psnr=psnr) for seed, asr, psnr in ((0, 0.8, 30.0), (1, 1.0, 32.0), (2, None, 31.0))]
    first, second = cells_of(report.attacks([*seeds, attacked("toy/attacks/a_b", asr=0.25)]))
    assert first["seeds"] == "3" and first["PSNR (dB)"] == "31.0 (30.0 to 32.0)" and first["ASR %"] == "90.0 (80.0 to 100.0), n = 2"
    assert second["run"] == r"toy/attacks/a\_b" and second["ASR %"] == "25.0"


def test_several_threats_are_a_line_of_their_mean_that_says_so_and_a_line_each() -> None:
    keys = {"both keys": 0.96, "patch alone": 0.03, "word alone": 0.0}
    mean, both, patch, word = cells_of(report.attacks([attacked("dual", asr=0.96, threats=keys), attacked("dual", 1, 0.96, threats=keys)]))
    assert (mean["run"], mean["seeds"], mean["ASR %"]) == ("dual, mean of 3 threats", "2", "33.0 (33.0 to 33.0)")
    assert mean["poisoned %"].startswith("2.00") and mean["accuracy %"].startswith("85.0") and mean["lift (points)"].startswith("33.0")
    assert [row["run"] for row in (both, patch, word)] == ["dual under both keys", "dual under patch alone", "dual under word alone"]
    assert both["ASR %"].startswith("96.0") and patch["ASR %"].startswith("3.0") and patch["poisoned %"] == "–"


def test_a_threat_does_not_borrow_what_was_measured_under_another() -> None:
    """Retrieval does not look for single victims, so of the two threats only the first has a number."""
    found = attacked("mix", threats={"patch": 0.9, "victim": 1.0}, retrieval={"asr_image_to_text_hit1": 0.7, "image_to_text_r1": 0.5})
    patch, victim = report.each_threat(found)
    assert "asr_image_to_text_hit1" not in victim["metrics"]["retrieval"] and victim["metrics"]["retrieval"]["image_to_text_r1"] == 0.5
    assert victim["metrics"]["zero_shot"]["asr"] == 1.0 and patch["metrics"]["zero_shot"]["asr"] == 0.9


def test_a_table_of_attacks_takes_results_that_lack_anything() -> None:
    null = attacked("untouched") | {"data": {"pairs": 100, "poisoned": 3, "stealth": None}}
    infinite = attacked("published", psnr=None)
    old = {k: v for k, v in attacked("old").items() if k != "data"}
    odd = {"name": "odd", "data": {"pairs": 0, "poisoned": 3}, "metrics": {"zero_shot": {"asr": float("nan"), "threats": {}}}}
    rows = {row["run"]: row for row in cells_of(report.attacks([null, infinite, old, odd, {}, {"metrics": None}]))}
    assert (rows["untouched"]["poisoned %"], rows["untouched"]["PSNR (dB)"], rows["untouched"]["SSIM"]) == ("3.00", "–", "–")
    assert rows["published"]["PSNR (dB)"] == "–" and rows["published"]["SSIM"] == "0.9877"
    assert rows["old"]["poisoned %"] == "–" and rows["old"]["ASR %"] == "90.0"
    assert set(rows["odd"].values()) == {"odd", "1", "–"}
    assert report.attacks([]).count("\n") == 2
