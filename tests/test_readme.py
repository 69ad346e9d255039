"""What the README tells the reader to write works as it stands there."""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, Ended


def test_the_attack_of_the_readme_is_one_short_file_that_trains(program: Callable[..., Ended], toy: Path, tiny_model: str,
                                                                tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## Your own attack\n")[2].partition("\n## ")[0]
    block, = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(block.splitlines()) <= 15
    (tmp_path / "mine.py").write_text(block)
    ended = program("train", "mine.py", "--data.root", toy, "--model.name", tiny_model, "--epochs", 1, "--warmup", 1, "--batch-size", 32,
                    "--reference", "None", "--out", tmp_path / "runs")
    assert ended.status == 0, ended.err
    found = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert found["data"]["poisoned"] == 6 and found["data"]["stealth"]["n"] == 6
    assert found["threat"]["trigger"]["class"].endswith(".RedForBlue") and 0 <= found["metrics"]["zero_shot"]["asr"] <= 1
