"""The tables of defenses in docs/defenses.md, and a picture of them, from the recorded results.

    python benchmarks/defenses.py --page docs/defenses.md --picture-to docs/defenses.svg

Defenses stand in order of the area under their front: of the settings of a defense that are recorded for an attack, each covers the
rectangle of lower accuracy and higher attack success, and the area is that of all of them together. 1 is a model that errs nowhere and is
never misled.
"""
import io
import statistics
from collections.abc import Sequence
from typing import Any

from pages import cost, recorded, show

from mmbackdoor import report, stores
from mmbackdoor.recipe import Recipe, command, load_module

CONFIG, REVERSALS = "configs/toy/all_defenses.py", "configs/toy/reversals.py"
HEADERS = "defense", "seeds", "area", "accuracy %", "ASR %", "lift (points)", "time", "holds"
LEFT, LOST = 0.10, 0.03
"""Attack success that a defense which holds may leave, and accuracy that it may cost, on average."""
Result = dict[str, Any]


def last(name: str) -> str:
    return name.split("/")[-1]


def mean(results: Sequence[Result], *path: str) -> float | None:
    """Over the seeds that have the number."""
    known = [value for r in results if (value := report.number(r, *path)) is not None]
    return statistics.fmean(known) if known else None


def point(results: Sequence[Result]) -> tuple[float, float] | None:
    """Accuracy and attack success, means over the seeds."""
    accuracy, asr = (mean(results, "metrics", "zero_shot", key) for key in ("accuracy", "asr"))
    return None if accuracy is None or asr is None else (accuracy, asr)


def area(points: Sequence[tuple[float, float]]) -> float:
    """Of what is worse in both than some point, (accuracy, ASR) each, in the unit square."""
    total, best = 0.0, 0.0
    for accuracy, asr in sorted(points, key=lambda p: (p[1], -p[0])):  # from the lowest attack success on
        if accuracy > best:
            total += (accuracy - best) * (1 - asr)
            best = accuracy
    return total


def settings(suite: Any, defense: Recipe, victim: Recipe, called: str) -> list[Recipe]:
    """The runs of a defense against a victim: the one of the table, and of its sweep, where that victim was swept."""
    own = suite.against(defense, victim, called)
    name = last(defense.name)
    varied = tuple(f"{name}-{field}" for field in ("lr", "scale", "share", "epochs", "alpha"))
    swept = [r for r in suite.sweeps if last(r.name).startswith(varied)]
    return [own, *(swept if own is defense else [])]


def machine(result: Result) -> tuple[Any, ...]:
    """What the seconds of two runs must share to be compared."""
    return tuple(result["environment"].get(key) for key in ("torch", "device", "threads", "world_size"))


def slowdown(results: Sequence[Result], donors: Sequence[Result], plain: Sequence[Result], what: str) -> str:
    """Training seconds, with those of each seed's donor, over the median of the plain runs on the same machine; a dash where there are
    none."""
    beside = {r["seed"]: r["cost"]["train_seconds"] for r in donors}
    ratios = [(r["cost"]["train_seconds"] + beside.get(r["seed"], 0)) / statistics.median(same) for r in results
              if (same := [p["cost"]["train_seconds"] for p in plain if machine(p) == machine(r)])]
    return f"{statistics.median(ratios):.2f}{what}" if ratios else report.DASH


def holds(results: Sequence[Result], before: Sequence[Result]) -> str:
    """Against the victim of the same seeds."""
    seeds = {r["seed"] for r in results}
    then, now = point([r for r in before if r["seed"] in seeds]), point(results)
    return "yes" if then and now and now[1] <= LEFT and now[0] >= then[0] - LOST else ""


def told(name: str, results: Sequence[Result], points: Sequence[tuple[float, float]], time: str, held: str) -> list[str]:
    """A row of HEADERS."""
    entry = report.summary(results)[0]
    known = (report.ranged(entry, key) for key in ("accuracy", "asr", "lift"))
    return [name, str(entry["seeds"]), f"{area(points):.3f}", *known, time, held]


def ranking(suite: Any, victim: Recipe, called: str, results: str, plain: Sequence[Result],
            trained: Sequence[Result]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The table of an attack, and the points of its picture; seconds are compared to those of plain fine-tuning and of training."""
    before = recorded([victim], results)
    if not before:
        return "", {}
    defenses = [d for d in suite.PRETRAINING + suite.CLEANING + suite.OTHERS + suite.SECOND if suite.applies(d, victim)]
    taught = recorded([suite.FROM_SCRATCH[called]], results) if called in suite.FROM_SCRATCH else []
    bare = {name: found for name, found in (("none", before), ("none, from scratch", taught)) if found}
    alone = {name: [p] if (p := point(found)) else [] for name, found in bare.items()}
    first, rows = [told(name, found, alone[name], report.DASH, report.DASH) for name, found in bare.items()], []
    drawn = {"none": alone["none"]}
    for d in defenses:
        runs = settings(suite, d, victim, called)
        own, *swept = (recorded([r], results) for r in runs)
        points = [p for found in (own, *swept) if (p := point(found))]
        if not own or not points:
            continue
        drawn[last(d.name)] = points
        donors = recorded([runs[0].donor] if runs[0].donor else [], results)
        time = slowdown(own, donors, plain if runs[0].init else trained, "" if runs[0].init else " of training")
        rows.append((area(points), told(last(d.name), own, points, time, holds(own, before if runs[0].init else taught or before))))
    return report.marked_down([list(HEADERS), *first, *(row for _, row in sorted(rows, key=lambda r: -r[0]))]), drawn


def sweep(suite: Any, results: str) -> str:
    """Every setting of every sweep, over the seeds that all settings of a defense have."""
    rows = [["setting", "learning rate", "chosen", "seeds", "validation accuracy %", "accuracy %", "ASR %"]]
    for d in suite.PRETRAINING + suite.CLEANING + suite.OTHERS + (suite.rvpt,):
        victim = d.init or suite.badnets
        known = [(r, found) for r in settings(suite, d, victim, "badnets") if (found := recorded([r], results))]
        shared = set.intersection(*({f["seed"] for f in found} for _, found in known)) if known else set()
        for r, found in known:
            same = [f for f in found if f["seed"] in shared]
            checked, there = mean(same, "metrics", "validation", "accuracy"), point(same) or (None, None)
            rate = f"{r.schedule.lr:g}" if r.schedule.epochs else report.DASH
            numbers = (report.per_cent(v) for v in (checked, *there))
            rows.append([last(r.name), rate, "yes" if r is d else "", str(len(same)), *numbers])
    return report.marked_down(rows) if len(rows) > 1 else ""


def picture(drawn: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """SVG: for each attack the accuracy of each defense's settings against their attack success."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for points in drawn.values() for name in points))
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    with matplotlib.rc_context({"svg.hashsalt": "defenses", "svg.fonttype": "none", "font.size": 8}):
        fig = Figure(figsize=(10, 2.6 * ((len(drawn) + 3) // 4)), layout="constrained")
        panels = list(fig.subplots((len(drawn) + 3) // 4, 4, squeeze=False).flat)
        for (attack, points), axes in zip(drawn.items(), panels, strict=False):
            for name, found in points.items():
                place = names.index(name)
                x, y = ([100 * p[i] for p in sorted(found)] for i in (1, 0))
                axes.plot(x, y, linestyle="", marker="os^D"[place // 20], markersize=4, color=colours[place % 20], label=name)
            axes.set(title=attack, xlabel="ASR %", ylabel="accuracy %", xlim=(-3, 103), ylim=(-3, 103))
            axes.grid(alpha=0.25)
        for axes in panels[len(drawn) :]:
            axes.set_visible(False)
        handles = {label: h for axes in fig.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
        fig.savefig(out := io.StringIO(), format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def main(results: str = "results", page: str = "", picture_to: str = "") -> None:
    """Prints the tables, or writes them into a page.

    Args:
        results: Folder of the recorded results.
        page: Markdown file with a line <!-- NAME --> for each table.
        picture_to: SVG file of accuracy against attack success.
    """
    suite = load_module(CONFIG)
    plain = recorded([suite.against(suite.finetune, v, name) for name, v in suite.VICTIMS.items()], results)
    trained = recorded([v for v in suite.VICTIMS.values() if v.init is None], results)
    tables, drawn = {}, {}
    for name, victim in suite.VICTIMS.items():
        tables[f"toy/defenses {name}"], drawn[name] = ranking(suite, victim, name, results, plain, trained)
    tables["toy/defenses sweeps"] = sweep(suite, results)
    prompted = recorded([*suite.vits.values(), *(suite.against(suite.rvpt, v, name) for name, v in suite.vits.items())], results)
    tables["toy/defenses vit"] = report.markdown(prompted) if prompted else ""
    for part, recipes in load_module(REVERSALS).PARTS.items():
        found = recorded(recipes, results)
        tables[f"toy/reversals {part}"] = report.markdown(found) if found else ""
    tables["toy/defenses cost"] = cost((CONFIG, REVERSALS), results)
    show({name: table for name, table in tables.items() if table}, page)
    if picture_to:
        with stores.replacing(picture_to) as temporary:
            temporary.write_text(picture({name: points for name, points in drawn.items() if points}), encoding="utf-8")


if __name__ == "__main__":
    command(main)
