"""What several test files share: a tiny toy data set, a tiny model, and programs run inside this process."""
from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from mmbackdoor import clip, recipe, shards

ROOT = Path(__file__).parents[1]
TINY = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}}

torch.set_num_threads(1)  # the models are too small for more, and workers are forked


def load_program(name: str) -> ModuleType:
    """A program of this repository as a module, by its path without .py: "train", "data_tools/poison"."""
    dotted = name.replace("/", ".")
    known = sys.modules.get(dotted)
    if known is not None and getattr(known, "__file__", None) == str(ROOT / f"{name}.py"):
        return known
    spec = importlib.util.spec_from_file_location(dotted, ROOT / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Ended(NamedTuple):
    status: int
    err: str
    out: str


def forget(folder: Path) -> None:
    """Drops the modules that were loaded from below a folder."""
    inside = str(folder) + "/"
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(inside):
            del sys.modules[name]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What data_tools/make_toy.py writes, in small: train/ (3 shards of 100 pairs), clean/ (200), pairs/ (50), and the
    labelled sets val/ (50) and test/ (100), 32 pixels wide. Shared by all tests, so not to be changed."""
    tool = load_program("data_tools/make_toy")
    folder = tmp_path_factory.mktemp("toy")
    for name, n in (("train", 300), ("clean", 200), ("pairs", 50)):
        shards.write_shards(folder / name, tool.samples(name, n, 32, 0, "jpg", labelled=False, per_shard=100), per_shard=100)
    for name, n in (("val", 50), ("test", 100)):
        shards.write_eval_set(folder / name, tool.samples(name, n, 32, 0, "jpg", labelled=True), tool.CLASSES, tool.TEMPLATES)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the JSON config of a ViT that trains in milliseconds: 32 pixels, width 32, one layer."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture(scope="session")
def front(tiny_model: str) -> clip.CLIP:
    """Preprocessing and tokenizer of the tiny model, without its network."""
    return clip.load(clip.Model(tiny_model)).front()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """program("train", "config.py", "--epochs", 1) runs it in this process, as from the command line, in tmp_path.

    Gives the exit status and what it wrote to stderr and stdout, loader workers included. An exception other than
    SystemExit comes through: a program that ends in a traceback fails its test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])

    def run(name: str, *args: Any) -> Ended:
        module = load_program(name)
        start = module.main if name == "train" else getattr(module, "cli", lambda: recipe.command(module.main))
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{name}.py"), *map(str, args)])
        forget(tmp_path)  # a config may have been rewritten since
        capfd.readouterr()
        status = 0
        try:
            start()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capfd.readouterr()
        return Ended(status, err, out)

    yield run
    forget(tmp_path)
