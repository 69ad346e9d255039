"""The tables of attacks in docs/attacks.md, from the recorded results.

    python benchmarks/attacks.py --page docs/attacks.md

Of each suite those runs that are recorded, all seeds of them; nothing of a suite none of whose own runs is.
"""
from pages import cost, recorded, show

from mmbackdoor import report
from mmbackdoor.recipe import command, load_suite

SUITES = {f"toy/{name}": f"configs/toy/{file}.py" for name, file in
          (("attacks", "all_attacks"), ("attack_sweeps", "attack_sweeps"), ("badclip", "badclip"), ("compat", "compat"))}
SUITES["emoji/attacks"] = "configs/emoji/all_attacks.py"


def main(results: str = "results", page: str = "") -> None:
    """Prints the tables, or writes them into a page.

    Args:
        results: Folder of the recorded results.
        page: Markdown file with a line <!-- NAME --> for each suite.
    """
    found = {name: recorded(load_suite(config).recipes, results) for name, config in SUITES.items()}
    tables = {name: report.attacks(rows) for name, rows in found.items() if any(r["name"].startswith(f"{name}/") for r in rows)}
    show({"attacks cost": cost(SUITES.values(), results)} | tables, page)


if __name__ == "__main__":
    command(main)
