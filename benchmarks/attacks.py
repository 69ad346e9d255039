"""The tables of attacks in docs/attacks.md, from the recorded results.

    python benchmarks/attacks.py

Of each suite those runs that are recorded, all seeds of them; nothing of a suite none of whose attacks is.
"""
import json
from pathlib import Path
from typing import Any

from mmbackdoor import report
from mmbackdoor.recipe import command, load_suite

SUITES = ("configs/toy/all_attacks.py", "configs/emoji/all_attacks.py")


def recorded(suite: str, results: str = "results") -> list[dict[str, Any]]:
    """The results of a suite's runs, in its order."""
    names = [r.name for r in load_suite(suite).recipes]
    return [json.loads(path.read_text()) for name in names for path in sorted(Path(results).glob(f"{name}-seed*.json"))]


def main(results: str = "results") -> None:
    """Prints the tables.

    Args:
        results: Folder of the recorded results.
    """
    tables = [found for suite in SUITES if (found := recorded(suite, results))]
    print("\n".join(report.attacks(found) for found in tables if any("/attacks/" in r["name"] for r in found)))


if __name__ == "__main__":
    command(main)
