"""Tables of recorded results, and the pages of docs/ that they stand in."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmbackdoor import report, stores
from mmbackdoor.recipe import Recipe, load_suite
from mmbackdoor.types import BadInput


def recorded(recipes: Iterable[Recipe], results: str) -> list[dict[str, Any]]:
    """The results of recipes that are recorded in a folder, all seeds of them, in order."""
    return [json.loads(file.read_text()) for r in recipes for file in sorted(Path(results).glob(f"{r.name}-seed*.json"))]


def cost(configs: Iterable[str], results: str) -> str:
    """A table of what the training of each suite's own runs took; those of other suites that it shares are not counted."""
    rows = [["suite", "runs", "core hours of training"]]
    for suite in map(load_suite, configs):
        found = recorded([r for r in suite.runs([0]) if r.name.startswith(f"{suite.name}/")], results)
        hours = sum(r["cost"]["train_seconds"] * r["environment"]["threads"] for r in found) / 3600
        rows.append([suite.name, str(len(found)), f"{hours:.1f}"])
    return report.marked_down(rows)


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table below its mark, <!-- NAME -->. BadInput where a mark is missing."""
    for name, table in tables.items():
        start, mark, rest = page.partition(f"<!-- {name} -->\n")
        if not mark:
            raise BadInput(f"the page has no line <!-- {name} -->; put one where its table is to be")
        page = start + mark + table + re.sub(r"\A(\|.*\n)*", "", rest)
    return page


def show(tables: dict[str, str], page: str) -> None:
    """Prints the tables, or writes them into a page."""
    if not page:
        print("\n".join(tables.values()))
        return
    text = filled(Path(page).read_text(encoding="utf-8"), tables)
    with stores.replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
