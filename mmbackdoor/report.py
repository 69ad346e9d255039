"""Results for people: text, CSV, LaTeX and Markdown tables, and one HTML page that needs no network.

A run directory may lack any of its files: the page then says so in place. Fractions come in, per cent goes out.
"""

from __future__ import annotations

import base64
import csv as csv_writer
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from .fit import logged
from .stores import replacing
from .types import BadInput

Result = dict[str, Any]

DASH, MINUS = "–", "−"  # en dash, U+2212
HEADERS = ("run", "seed", "accuracy % [95 %]", "ASR % [95 %]", "reference ASR %", "lift (points)", "train (s)")
PERCENT = {"accuracy": "accuracy %", "asr": "ASR %"}
MEASURES = ("accuracy", "asr", "lift", "train_seconds", "validation")
UNITS = {"train_seconds": (1.0, 1), "psnr": (1.0, 1), "ssim": (1.0, 4), "poisoned": (100.0, 2)}
"""Factor and decimals of what is not shown as per cent with one."""
ATTACKS = {"poisoned": "poisoned %", "psnr": "PSNR (dB)", "ssim": "SSIM", "accuracy": "accuracy %", "asr": "ASR %",
           "asr_reference": "reference ASR %", "lift": "lift (points)",
           "asr_image_to_text_hit1": "image→text hit@1 %", "asr_image_to_text_hit1_reference": "reference hit@1 %",
           "asr_text_to_image_hit10": "text→image hit@10 %", "asr_text_to_image_hit10_reference": "reference hit@10 %"}
"""Columns of the table of attacks."""
MORE: dict[str, tuple[str, ...]] = {
    "top5": ("zero_shot", "top5"), "mean_per_class_recall": ("zero_shot", "mean_per_class_recall"),
    "asr_including_target": ("zero_shot", "asr_including_target"), "robust_accuracy": ("zero_shot", "robust_accuracy"),
    "image_to_text_r1": ("retrieval", "image_to_text_r1"), "text_to_image_r1": ("retrieval", "text_to_image_r1"),
    "asr_image_to_text_hit1": ("retrieval", "asr_image_to_text_hit1"),
    "asr_text_to_image_hit1": ("retrieval", "asr_text_to_image_hit1"),
    "linear_probe_accuracy": ("linear_probe", "accuracy"), "linear_probe_asr": ("linear_probe", "asr")}
"""What a spreadsheet gets beside the columns of the table."""
COLOURS = ("#2f7fd0", "#e0731d", "#1f9e77", "#c9499a", "#8b6fd8", "#b58a12", "#d2483f", "#4b9fb3")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (6, 1.6, 1.2, 1.6), (2.6, 1.3))
STYLES = [(COLOURS[i % 8], DASHES[i % 5]) for i in range(40)]  # 8 and 5 share no factor, so all 40 differ


def _get(value: Any, *path: str) -> Any:
    """The entry of nested dicts at `path`, or None where any step is missing."""
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def number(value: Any, *path: str) -> float | None:
    """The finite number at `path`, or None: a null, text and the NaN of a diverged run all count as missing."""
    found = _get(value, *path)
    usable = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if usable else None


def per_cent(value: Any, scale: float = 100, digits: int = 1) -> str:
    """Per cent, or with scale 1 the value: one decimal, a true minus (never before zero), a dash for the missing."""
    found = number(value)
    return DASH if found is None else f"{round(scale * found, digits) + 0.0:.{digits}f}".replace("-", MINUS)


def _row(result: Result) -> dict[str, Any]:
    """One run as flat columns: fractions, seconds, None for what was not measured."""
    zero_shot = _get(result, "metrics", "zero_shot")
    row: dict[str, Any] = {"run": str(_get(result, "name") or DASH), "seed": _get(result, "seed")}
    for key in ("accuracy", "asr"):
        pair = _get(zero_shot, f"{key}_ci95")
        low, high = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        row |= {key: number(zero_shot, key), f"{key}_low": number(low), f"{key}_high": number(high)}
    row |= {key: number(zero_shot, key) for key in ("asr_reference", "lift")}
    checked, seconds = number(result, "metrics", "validation", "accuracy"), number(result, "cost", "train_seconds")
    return row | {"validation": checked, "train_seconds": seconds}


def _cells(result: Result) -> list[str]:
    """The row as text, in the order of HEADERS."""
    row = _row(result)
    texts = {key: per_cent(row[key]) for key in ("accuracy", "asr", "asr_reference", "lift")}
    for key in ("accuracy", "asr"):
        if None not in (row[key], row[f"{key}_low"], row[f"{key}_high"]):
            texts[key] += f" [{per_cent(row[f'{key}_low'])}, {per_cent(row[f'{key}_high'])}]"
    seed = DASH if row["seed"] is None else str(row["seed"])
    return [row["run"], seed, *texts.values(), per_cent(row["train_seconds"], 1)]


def table(results: Sequence[Result]) -> str:
    """Aligned columns for the terminal: the run's name to the left, numbers to the right."""
    rows = [list(HEADERS), *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def csv(results: Sequence[Result]) -> str:
    """One line per run for a spreadsheet: measures in per cent, bounds in columns of their own, unknown left empty."""
    out = io.StringIO()
    writer = csv_writer.writer(out, lineterminator="\n")
    run, seed, *measures, seconds = _row({})
    writer.writerow([run, seed, *(f"{key}_percent" for key in measures), seconds, *(f"{key}_percent" for key in MORE)])
    for result in results:
        row = _row(result)
        more = (per_cent(_get(result, "metrics", *path)) for path in MORE.values())
        texts = [*(per_cent(row[key]) for key in measures), per_cent(row[seconds], 1), *more]
        writer.writerow([row[run], row[seed], *(t.replace(MINUS, "-").replace(DASH, "") for t in texts)])
    return out.getvalue()


_TEX: Any = {c: "\\" + c for c in "&%$#_{}"} | {DASH: "--", MINUS: "$-$", "<": r"\textless{}", ">": r"\textgreater{}"}
_TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}


def latex(results: Sequence[Result]) -> str:
    r"""A booktabs `tabular` of the runs; the document needs `\usepackage{booktabs}`."""
    rows = [[cell.translate(str.maketrans(_TEX)) for cell in row] for row in (HEADERS, *map(_cells, results))]
    # A row that begins with [ or * would be read as an argument of the line break before it.
    head, *body = (re.sub(r"^[\[*]", r"{\g<0>}", " & ".join(row)) + r" \\" for row in rows)
    start = rf"\begin{{tabular}}{{l{'r' * (len(HEADERS) - 1)}}}"
    return "\n".join([start, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def each_threat(result: Result) -> list[Result]:
    """A result under several threats as one result a threat. What was not measured under one of them is missing from its own."""
    metrics = result["metrics"]
    names = list(dict.fromkeys(name for m in metrics.values() for name in m.get("threats", ())))

    def under(name: str, m: Result) -> Result:
        fired = ("asr", "lift", "robust_accuracy", "clean_target_rate", "text_to_image_min_rank", "victims")
        return {k: v for k, v in m.items() if not k.startswith(fired)} | m.get("threats", {}).get(name, {})

    return [result | {"name": f"{result['name']} under {name}", "metrics": {kind: under(name, m) for kind, m in metrics.items()}}
            for name in names] or [result]


def writer(path: str) -> Callable[[Sequence[Result]], str]:
    """The function that makes a table of the file's kind, by its name."""
    kinds: dict[str, Callable[[Sequence[Result]], str]] = {".csv": csv, ".tex": latex, ".md": markdown}
    if (kind := Path(path).suffix.lower()) not in kinds:
        raise BadInput(f"{path}: a table is written as .csv, .tex or .md; name it so")
    return kinds[kind]


def write(path: str, results: Sequence[Result]) -> None:
    """A table of the kind that the file's name says. Whole or not at all."""
    _replace(Path(path), writer(path)(results))


def _replace(out: Path, text: str) -> None:
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _spread(values: Iterable[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    sd = statistics.stdev(known) if len(known) > 1 else None
    ends = {"min": min(known), "max": max(known), "sd": sd} if known else {}
    return {"n": len(known), "mean": statistics.fmean(known), **ends} if known else None


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The seeds of each name put together, in order of first appearance.

    An entry has `name`, `seeds` (how many) and, for each of MEASURES, a dict of n, mean, min, max and sample sd (None
    for one value), or None where no seed has it. A seed given twice counts once, with the later result.
    """
    return _put_together(map(_row, results), MEASURES)


def _put_together(rows: Iterable[dict[str, Any]], keys: Iterable[str]) -> list[dict[str, Any]]:
    """`summary` of these columns of rows, each of a `run` and `seed`."""
    groups: dict[str, dict[Any, dict[str, Any]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row["run"], {})[("none", place) if row["seed"] is None else row["seed"]] = row
    return [
        {"name": name, "seeds": len(rows)} | {key: _spread(row[key] for row in rows.values()) for key in keys}
        for name, rows in groups.items()
    ]


def ranged(entry: dict[str, Any], key: str) -> str:
    """Mean (lowest to highest) as text, and of how many values when some seeds lack one."""
    spread, (scale, digits) = entry[key] or {"n": 0}, UNITS.get(key, (100, 1))
    mean, low, high = (per_cent(spread.get(part), scale, digits) for part in ("mean", "min", "max"))
    text = f"{mean} ({low} to {high})" if spread["n"] > 1 else mean
    return text if spread["n"] in (0, entry["seeds"]) else f"{text}, n = {spread['n']}"


def _summary_rows(results: Sequence[Result]) -> list[list[str]]:
    head = ["run", "seeds", "accuracy %", "ASR %", "lift (points)", "train (s)"]
    return [head, *([e["name"], str(e["seeds"]), *(ranged(e, key) for key in MEASURES[:4])] for e in summary(results))]


def markdown(results: Sequence[Result]) -> str:
    """A Markdown table, one line per name: the mean over seeds and, in brackets, the lowest to the highest."""
    return marked_down(_summary_rows(results))


def marked_down(table: list[list[str]]) -> str:
    """A Markdown table of rows of text, the first of them its head."""
    rows = [[re.sub(r"([\\|`*_<\[])", r"\\\1", " ".join(c.split())) for c in row] for row in table]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _share(of: Any, whole: Any) -> float | None:
    part, all_of_it = number(of), number(whole)
    return part / all_of_it if part is not None and all_of_it else None


def _attack_row(result: Result) -> dict[str, Any]:
    """One run as the columns of ATTACKS: fractions, decibels, None for what was not measured."""
    data, zero_shot = _get(result, "data"), _get(result, "metrics", "zero_shot")
    row = {"run": str(_get(result, "name") or DASH), "seed": _get(result, "seed"),
           "poisoned": _share(_get(data, "poisoned"), _get(data, "pairs")),
           "psnr": number(data, "stealth", "psnr_mean"), "ssim": number(data, "stealth", "ssim_mean")}
    row |= {key: number(zero_shot, key) for key in ("accuracy", "asr", "asr_reference", "lift")}
    for key in ("asr_image_to_text_hit1", "asr_text_to_image_hit10"):
        row |= {name: number(result, "metrics", "retrieval", name) for name in (key, f"{key}_reference")}
    return row


def _attack_rows(result: Result) -> list[dict[str, Any]]:
    """A run under one threat as one row; under several their mean, and beneath it a row each with the name of the threat. The mean
    is over those that are no controls; of one that has controls beside it, the row is its own."""
    each = each_threat(result) if isinstance(_get(result, "metrics"), dict) else [result]
    if len(each) < 2:
        return [_attack_row(result)]
    rows, name = list(map(_attack_row, each)), _get(result, "name")
    controls = {f"{name} under {threat}" for threat, said in (_get(result, "threats") or {}).items() if _get(said, "control")}
    meant = [row for row in rows if row["run"] not in controls]
    means = {key: (_spread(row[key] for row in meant) or {}).get("mean") for key in rows[0] if key.startswith("asr") or key == "lift"}
    below = dict.fromkeys(("poisoned", "psnr", "ssim", "accuracy"))  # said in the row above
    head = f"{name}, mean of {len(meant)} threats" if len(meant) > 1 else name
    return [_attack_row(result) | means | {"run": head}, *(row | below for row in rows if len(meant) > 1 or row not in meant)]


def attacks(results: Sequence[Result]) -> str:
    """A Markdown table to compare attacks, one line per name: mean over the seeds and, in brackets, the lowest to the highest.

    What is poisoned (of all pairs, those that the attacker added included), how much of it is seen (means over poisoned
    images, a dash where none is changed), accuracy, attack success and that of the clean reference, and that of retrieval.
    Where a run fires several threats the line has the mean over them and says so; a line each, named, comes beneath.
    """
    rows = _put_together((row for result in results for row in _attack_rows(result)), ATTACKS)
    body = [[e["name"], str(e["seeds"]), *(ranged(e, key) for key in ATTACKS)] for e in rows]
    return marked_down([["run", "seeds", *ATTACKS.values()], *body])


def _rate(result: Result) -> float | None:
    """The learning rate, of the recipe itself or of its schedule."""
    return number(result, "recipe", "lr") or number(result, "recipe", "schedule", "lr")


def select(results: Sequence[Result], by: Sequence[str] = ("validation", "accuracy")) -> Result:
    """The result with the highest clean validation accuracy; of equals, the one with the lower learning rate.

    Where no result was validated, zero-shot accuracy decides; where only some were, the others cannot be chosen.
    Raises BadInput for an empty sweep, and for a measure that needs the trigger: a defender has no such number.
    """
    if by[-1].startswith("asr") or by[-1] in ("lift", "robust_accuracy"):
        raise BadInput(f"cannot select by {'.'.join(by)}: it is measured with the trigger; use a clean measure")
    for path in (by, ("zero_shot", "accuracy")):
        known = [(number(r, "metrics", *path), _rate(r) or math.inf, r) for r in results]
        if rated := [(value, -lr, result) for value, lr, result in known if value is not None]:
            return max(rated, key=lambda entry: entry[:2])[2]
    raise BadInput(f"nothing to select from: no result has metrics.{'.'.join(by)} or metrics.zero_shot.accuracy")


def _load(path: Path) -> dict[str, Any]:
    """What a run directory holds; under `missing`, what is wrong with a file. BadInput if there is no directory."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such run directory; give the folder that holds results.json")
    run: dict[str, Any] = {"missing": {}}
    files: dict[str, tuple[str, type, Callable[[str], Any]]] = {
        "results.json": ("result", dict, json.loads),
        "log.jsonl": ("log", list, logged),
        "examples.json": ("examples", list, json.loads),
        "recipe.py.txt": ("recipe", str, str),
    }
    for file, (part, kind, parse) in files.items():
        try:
            found = parse((path / file).read_text(encoding="utf-8", errors="replace"))
            problem = "" if found and isinstance(found, kind) else "is empty or of another form"
        except (OSError, ValueError) as error:
            problem = "is absent" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        run |= {part: kind(), "missing": run["missing"] | {file: problem}} if problem else {part: found}
    run["result"]["name"] = str(run["result"].get("name") or path.name)
    return run


def _plot(name: str, lines: Sequence[Sequence[tuple[float, ...]]], rings: Sequence[float | None] = ()) -> str:
    """Inline SVG in the page's own ink, the same bytes for the same lines of (x, y, lowest y, highest y).

    With `rings`, one x per line to be ringed, x is a learning rate and on a log scale; without, it is an epoch.
    """
    if not any(lines):
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    rc: Any = dict.fromkeys(inked, "gray") | {"svg.hashsalt": name, "svg.fonttype": "none", "savefig.transparent": True}
    with matplotlib.rc_context(rc):
        axes = (fig := Figure(figsize=(4.4, 3), layout="constrained")).add_subplot()
        for place, line in enumerate(lines):
            colour, dash = STYLES[place % len(STYLES)]
            x, y, low, high = zip(*line, strict=True) if line else ((), (), (), ())
            axes.plot(x, y, color=colour, linestyle=(0, dash or None), linewidth=1.8, marker="o", markersize=3.2)
            axes.vlines(x, low, high, color=colour, linewidth=4, alpha=0.3)
            for point in [point for point in line if rings and point[0] == rings[place]]:
                axes.plot(*point[:2], "o", color=colour, fillstyle="none", markersize=11)
        axes.set(xlabel="learning rate" if rings else "epoch", xscale="log" if rings else "linear")
        axes.set_ylim(None if name == "loss" else (-3, 103))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if rings:
            ticks = sorted({point[0] for line in lines for point in line})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        fig.savefig(out := io.StringIO(), format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", out.getvalue().partition("<svg")[2])
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # a page has several figures, ids must differ
    return "<svg" + text.replace("#808080", "currentColor")  # axes follow the page's theme


def _curves(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """SVG of loss, accuracy and ASR over the epochs, by title."""
    plots = {}
    for key, label, scale in (("loss", "loss", 1), *((key, label, 100) for key, label in PERCENT.items())):
        values = [[(float(row["epoch"]), number(row, key)) for row in run["log"]] for run in runs]
        plots[label] = _plot(key, [[(x, *[scale * y] * 3) for x, y in line if y is not None] for line in values])
    return plots


def _sweep(results: Sequence[Result]) -> dict[str, Any]:
    """Accuracy and ASR against learning rate as SVG by title, and per objective the point that `select` takes."""
    groups: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for result in results:
        fields = dict(_get(result, "recipe", "objective") or {})
        name = str(fields.pop("class", "unknown objective")).rpartition(".")[2]
        if (lr := _rate(result) or 0) > 0:
            groups.setdefault((name, str(fields)), {}).setdefault(lr, []).append(result | {"name": name})
    chosen: dict[str, Result] = {}
    lines: dict[str, list[Any]] = {key: [] for key in PERCENT}
    for (name, settings), by_lr in groups.items():
        label = name if [other for other, _ in groups].count(name) == 1 else f"{name} {settings}"
        means = [(lr, summary(by_lr[lr])[0]) for lr in sorted(by_lr)]
        for key, drawn in lines.items():
            drawn.append([(lr, *(100 * m[key][end] for end in ("mean", "min", "max"))) for lr, m in means if m[key]])
        tested = [(lr, mean, {"zero_shot": {"accuracy": _get(mean, "accuracy", "mean")}}) for lr, mean in means]
        points = [{"recipe": {"lr": lr}, "metrics": mean | test} for lr, mean, test in tested]
        measured = any(mean["validation"] or mean["accuracy"] for _, mean in means)
        chosen[label] = select(points, by=("validation", "mean")) if measured else {}
    rings = [_rate(point) for point in chosen.values()]
    plots = {label: _plot(f"sweep-{key}", lines[key], rings) for key, label in PERCENT.items()}
    return {"chosen": chosen, "plots": plots}


def chosen(results: Sequence[Result]) -> dict[str, float | None]:
    """For each objective of a sweep, the learning rate of highest mean clean validation accuracy."""
    return {label: _rate(point) for label, point in _sweep(results)["chosen"].items()}


def _small(png: Any) -> bool:
    """Whether a base64 PNG is so small that enlarging it should keep its pixels square."""
    with suppress(ValueError, TypeError):
        return int.from_bytes(base64.b64decode(png[:32])[16:20], "big") <= 96
    return False


def html(title: str, runs: Sequence[Path], out: Path, sweep: Sequence[Path] = ()) -> None:
    """Write one page about `runs`, and about the learning rates chosen from `sweep`, whose runs share one victim.

    `out` appears whole or not at all. What a run lacks is named in the page; a path that is no directory is BadInput.
    """
    found, swept = [_load(Path(path)) for path in runs], [_load(Path(path)) for path in sweep]
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = pages.get_template("report.html.j2").render(
        {"title": title, "runs": found, "swept": swept, "curves": _curves(found), "headers": HEADERS, "styles": STYLES},
        means=_summary_rows([run["result"] for run in found]),
        sweep=_sweep([run["result"] for run in swept]),
        **{"get": _get, "text": per_cent, "cells": _cells, "small": _small, "rate": _rate},
    )
    _replace(Path(out), page)
