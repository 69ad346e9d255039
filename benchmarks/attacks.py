"""The tables of attacks in docs/attacks.md, from the recorded results.

    python benchmarks/attacks.py

Of each suite those runs that are recorded, all seeds of them; nothing of a suite none of whose own runs is.
"""
import json
from pathlib import Path
from typing import Any

from mmbackdoor import report
from mmbackdoor.recipe import command, load_suite

SUITES = tuple(f"configs/{name}.py" for name in ("toy/all_attacks", "emoji/all_attacks", "toy/attack_sweeps", "toy/badclip", "toy/compat"))


def recorded(path: str, results: str = "results") -> list[dict[str, Any]]:
    """The results of a suite's runs, in its order; none where all are of other suites."""
    suite = load_suite(path)
    found = [json.loads(file.read_text()) for r in suite.recipes for file in sorted(Path(results).glob(f"{r.name}-seed*.json"))]
    return found if any(r["name"].startswith(f"{suite.name}/") for r in found) else []


def main(results: str = "results") -> None:
    """Prints the tables.

    Args:
        results: Folder of the recorded results.
    """
    print("\n".join(report.attacks(found) for suite in SUITES if (found := recorded(suite, results))))


if __name__ == "__main__":
    command(main)
