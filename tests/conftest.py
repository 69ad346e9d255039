"""What several test files share: a tiny toy data set, a tiny model, and programs run inside this process."""
from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any of them is loaded: two pools of threads on two cores wait for each other

import numpy as np
import pytest
import torch
from PIL import Image

from mmbackdoor import clip, craft, index, recipe, shards, stores
from mmbackdoor.types import Attack

ROOT = Path(__file__).parents[1]
TINY = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}}

torch.set_num_threads(1)  # the models are too small for more, and workers are forked
stores.PAUSE = 0.01  # seconds before a store that failed is asked again
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds to wait for a worker that an error left behind; 5 otherwise


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (8, 6), noise: bool = False, **options: Any) -> bytes:
    """An image file: one colour, or noise."""
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels if noise else pixels[:1, :1].repeat(size[1], 0).repeat(size[0], 1))
    file = io.BytesIO()
    if mode != "RGBA":
        image = image.convert("RGB")
    (image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of just these members, in order, however odd."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, body in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
    return path


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


@pytest.fixture(scope="module")
def model(tiny_model: str) -> clip.CLIP:
    """The tiny model, untrained."""
    return clip.load(clip.Model(tiny_model))


@pytest.fixture(scope="module")
def pairs(toy: Path) -> index.Index:
    """The toy's training pairs."""
    return index.find(str(toy / "train"))


def crafted(attack: Attack, model: clip.CLIP, pairs: index.Index, seed: int = 0, part: str = "") -> Any:
    """What an attack crafts on these pairs, or a part of it."""
    with craft.frozen(model):
        found = attack.craft(model, craft.batches(model, pairs, 64, seed, attack.target), seed)
    return found[part] if part else found


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """program("train", "config.py", "--epochs", 1) runs it in this process, as from the command line, in tmp_path.

    Gives the exit status and what it wrote to stderr and stdout, loader workers included. An exception other than
    SystemExit comes through: a program that ends in a traceback fails its test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two configs of one size within a second would be taken for one

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: files are handed out in order, and the last to begin would keep one worker waiting."""
    items.sort(key=lambda item: item.path.name != "test_programs.py")
