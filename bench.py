"""Run a suite: train and evaluate each recipe once, print a table, write a report.

    python bench.py configs/toy/demo.py
    python bench.py configs/toy/results.py --seeds 0 1 2 --record results

A run whose results exist for the same recipe is skipped, in the folder of records too, unless a run that is missing needs its weights;
one that was interrupted goes on where it stopped.
1 load the suite   2 train what is missing, record it   3 table and report
"""
import shutil
from dataclasses import replace
from pathlib import Path

import tyro

from eval import main as measure
from mmbackdoor import recipe, report, run, stores
from mmbackdoor.clip import weights_in
from mmbackdoor.losses import gather_list
from train import train


def with_weights(waiting: list[recipe.Recipe]) -> set[Path]:
    """Directories of the runs whose weights must be there before these can run."""
    needed: set[Path] = set()
    while waiting:
        others = [o for o in waiting.pop().others if o.directory not in needed]
        needed |= {o.directory for o in others}
        waiting += [o for o in others if not weights_in(o.directory)]
    return needed


def main(config: tyro.conf.Positional[str], seeds: tuple[int, ...] = (0,), record: str = "", overwrite: bool = False,
         again: bool = False) -> None:
    """Runs a suite.

    Args:
        config: Python file that defines a `suite`.
        seeds: Each recipe is run under each of them.
        record: Folder to copy each result to when it is there, as NAME-seedN.json. What it holds already is not run again, but for its
            weights where another run needs them, and is written anew only with --again.
        again: Measure finished runs again, without training them.
        overwrite: Remove runs of the same name that were made by another recipe.
    """
    suite = recipe.load_suite(config)  # 1
    runs = suite.runs(seeds)
    kept = {r.directory: Path(record) / f"{r.name}-seed{r.seed}.json" for r in runs}
    state = run.processes()
    first = state.is_main_process
    of_first = lambda value: gather_list([value])[0]  # noqa: E731  what it finds on the disk, as it alone writes there
    needed = of_first(with_weights([r for r in runs if not (run.done(r) or record and not again and run.recorded(kept[r.directory], r))]))
    for i, r in enumerate(runs, 1):  # 2
        if record and not again and not run.done(r) and r.directory not in needed:
            run.take(kept[r.directory], r)
        ready = of_first(run.done(r) and (r.directory not in needed or weights_in(r.directory) is not None))
        state.print(f"[{i}/{len(runs)}] {r.directory}" + (": done already" if ready else ""), flush=True)
        if ready:
            if again:
                measure(str(r.directory))
        else:
            if overwrite and first and not run.begun(r):
                shutil.rmtree(r.directory, ignore_errors=True)
            state.wait_for_everyone()
            train(replace(r, resume="latest"))
        if record and first and (again or not run.recorded(kept[r.directory], r)):
            stores.write_json(kept[r.directory], run.read_results(r.directory))
    if not first:
        return
    found = {r.directory: run.read_results(r.directory) for r in runs}  # 3
    out = Path(runs[0].out) / suite.name / "report.html"
    of = lambda recipes: [recipe.seeded(r, seed).directory for seed in seeds for r in recipes]  # noqa: E731
    shown = list(dict.fromkeys([*of(suite.recipes), *(recipe.seeded(r, seeds[0]).directory for r in suite.once)]))
    report.html(suite.name, shown, out, sweep=of(suite.sweep))
    if suite.table == "attacks":
        print("\n" + report.attacks([found[d] for d in shown]), end="")
    else:
        print("\n" + report.table([found[d] for d in shown]))
    if len(seeds) > 1 and suite.table == "runs":
        print("\n" + "\n".join(report.markdown([found[d] for d in of(part)]) for part in (suite.recipes, suite.sweep) if part))
    print(f"\nreport: {out}")
    for objective, lr in report.chosen([found[d] for d in of(suite.sweep)]).items():
        print(f"{objective}: of the sweep, learning rate {lr:g} has the highest clean validation accuracy")


if __name__ == "__main__":
    recipe.command(main)
