"""Run a suite: train and evaluate each recipe once, print a table, write a report.

    python bench.py configs/toy/demo.py
    python bench.py configs/toy/results.py --seeds 0 1 2 --record results

A run whose results exist for the same recipe is skipped, in the folder of records too, unless another run starts from its weights; one
that was interrupted goes on where it stopped.
1 load the suite   2 train what is missing, record it   3 table and report
"""
import shutil
from dataclasses import replace
from pathlib import Path

import tyro

from eval import main as measure
from mmbackdoor import recipe, report, run, stores
from train import train


def main(config: tyro.conf.Positional[str], seeds: tuple[int, ...] = (0,), record: str = "", overwrite: bool = False,
         again: bool = False) -> None:
    """Runs a suite.

    Args:
        config: Python file that defines a `suite`.
        seeds: Each recipe is run under each of them.
        record: Folder to copy each result to when it is there, as NAME-seedN.json. What it holds already is not run again.
        again: Measure finished runs again, without training them.
        overwrite: Remove runs of the same name that were made by another recipe.
    """
    suite = recipe.load_suite(config)  # 1
    runs = suite.runs(seeds)
    started_from = {other.directory for r in runs for other in (r.init, r.reference, r.surrogate) if isinstance(other, recipe.Recipe)}
    first = run.processes().is_main_process
    for i, r in enumerate(runs, 1):  # 2
        kept = Path(record) / f"{r.name}-seed{r.seed}.json"
        if record and not run.done(r) and r.directory not in started_from and not again:
            run.take(kept, r)
        if run.done(r):
            print(f"[{i}/{len(runs)}] {r.directory}: done already", flush=True)
            if again:
                measure(str(r.directory))
        else:
            print(f"[{i}/{len(runs)}] {r.directory}", flush=True)
            if overwrite and not run.begun(r) and first:
                shutil.rmtree(r.directory, ignore_errors=True)
            train(replace(r, resume="latest"))
        if record and first:
            stores.write_json(kept, run.read_results(r.directory))
    if not first:
        return
    found = {r.directory: run.read_results(r.directory) for r in runs}  # 3
    out = Path(runs[0].out) / suite.name / "report.html"
    of = lambda recipes: [recipe.seeded(r, seed).directory for seed in seeds for r in recipes]  # noqa: E731
    report.html(suite.name, of(suite.recipes), out, sweep=of(suite.sweep))
    if suite.table == "attacks":
        print("\n" + report.attacks([found[d] for d in of(suite.recipes)]), end="")
    else:
        print("\n" + report.table([found[d] for d in of(suite.recipes)]))
    if len(seeds) > 1 and suite.table == "runs":
        print("\n" + "\n".join(report.markdown([found[d] for d in of(part)]) for part in (suite.recipes, suite.sweep) if part))
    print(f"\nreport: {out}")
    for objective, lr in report.chosen([found[d] for d in of(suite.sweep)]).items():
        print(f"{objective}: of the sweep, learning rate {lr:g} has the highest clean validation accuracy")


if __name__ == "__main__":
    recipe.command(main)
