"""The tables of attacks in docs/attacks.md, from the recorded results.

    python benchmarks/attacks.py --page docs/attacks.md

Of each suite those runs that are recorded, all seeds of them; nothing of a suite none of whose own runs is.
"""
import json
import re
from pathlib import Path
from typing import Any

from mmbackdoor import report, stores
from mmbackdoor.recipe import command, load_suite
from mmbackdoor.types import BadInput

SUITES = {f"toy/{name}": f"configs/toy/{file}.py" for name, file in
          (("attacks", "all_attacks"), ("attack_sweeps", "attack_sweeps"), ("badclip", "badclip"), ("compat", "compat"))}
SUITES["emoji/attacks"] = "configs/emoji/all_attacks.py"


def recorded(name: str, results: str = "results") -> list[dict[str, Any]]:
    """The results of a suite's runs, in its order; none where all are of other suites."""
    recipes = load_suite(SUITES[name]).recipes
    found = [json.loads(file.read_text()) for r in recipes for file in sorted(Path(results).glob(f"{r.name}-seed*.json"))]
    return found if any(r["name"].startswith(f"{name}/") for r in found) else []


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table below its mark, <!-- NAME -->. BadInput where a mark is missing."""
    for name, table in tables.items():
        start, mark, rest = page.partition(f"<!-- {name} -->\n")
        if not mark:
            raise BadInput(f"the page has no line <!-- {name} -->; put one where its table is to be")
        page = start + mark + table + re.sub(r"\A(\|.*\n)*", "", rest)
    return page


def main(results: str = "results", page: str = "") -> None:
    """Prints the tables, or writes them into a page.

    Args:
        results: Folder of the recorded results.
        page: Markdown file with a line <!-- NAME --> for each suite.
    """
    tables = {name: report.attacks(found) for name in SUITES if (found := recorded(name, results))}
    if not page:
        print("\n".join(tables.values()))
        return
    text = filled(Path(page).read_text(encoding="utf-8"), tables)
    with stores.replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    command(main)
