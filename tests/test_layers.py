"""Imports point one way, papers stand alone, and nothing of ours executes what it reads. Checked on the source itself."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmbackdoor"
PAPERS = ("attacks", "defenses")
ORDER = (  # a module imports from lines above its own only
    {"types", "keyed"},
    {"stores", "spread", "triggers", "stealth", "search", "augment"},
    {"tars", "huggingface", "layout", "sheet", "prompts"},
    {"samples", "clip"},
    {"shards"},
    {"index", "files"},
    {"poison", "craft", "hub", "losses", "stream", "features"},
    {"forms", "sets"},
    {"evaluate", "victims"},
    {"retrieval", "probe", "doctor"},
    {"fit"},
    {"recipe"},
    {"run", "report"},
)
LAYER = {module: i for i, modules in enumerate(ORDER) for module in modules}
FOR_PAPERS = {"types", "keyed", "augment", "triggers", "stores", "spread", "shards", "index", "clip", "poison", "craft", "losses", "stream",
              "search", "layout", "victims", "prompts"}
MODULES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted([*ROOT.glob("*.py"), *(p for folder in ("data_tools", "scripts", "configs", "benchmarks")
                                         for p in ROOT.glob(f"{folder}/**/*.py"))])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return tree(path.read_text(encoding="utf-8"), str(path))


@cache
def tree(source: str, path: str) -> ast.Module:
    return ast.parse(source, path)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports, inside functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            dotted = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                yield node.lineno, f"{dotted}.{alias.name}"


def ours(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module below mmbackdoor) of the imports from this package: "types", "attacks.badnets", "" for the root."""
    for line, dotted in imports(path):
        parts = dotted.split(".")
        if parts[0] != "mmbackdoor":
            continue
        deep = 3 if len(parts) > 2 and parts[1] in PAPERS else 2
        module = ".".join(parts[1:deep])
        is_module = (PACKAGE / f"{module.replace('.', '/')}.py").is_file() or module in PAPERS
        yield line, module if is_module else ""


def test_the_walk_finds_the_package_and_its_programs() -> None:
    assert {"mmbackdoor/types.py", "mmbackdoor/attacks/badnets.py", "mmbackdoor/defenses/cleanclip.py"} <= set(map(name, MODULES))
    assert {"train.py", "eval.py", "data_tools/make_toy.py", "configs/toy/badnets.py"} <= set(map(name, PROGRAMS))
    assert ("types" in {module for _, module in ours(PACKAGE / "poison.py")}) and dict(ours(PACKAGE / "attacks/badnets.py"))


def test_every_module_has_a_place_in_the_order() -> None:
    flat = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert flat == set(LAYER), "place the new module in ORDER, as low as its imports let it"
    assert flat >= FOR_PAPERS
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(PAPERS)


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent == PACKAGE and p.stem != "__init__"], ids=name)
def test_imports_point_one_way(path: Path) -> None:
    for line, module in ours(path):
        assert module in LAYER, f"{name(path)}:{line}: a module of the package imports neither its root nor a paper"
        assert LAYER[module] < LAYER[path.stem], f"{name(path)}:{line}: {path.stem} may not import {module}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name in PAPERS and p.stem != "__init__"], ids=name)
def test_a_paper_imports_seams_only_never_a_paper(path: Path) -> None:
    for line, module in ours(path):
        assert module in FOR_PAPERS, f"{name(path)}:{line}: a paper may not import {module or 'the root'}; move the shared lines down"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_the_package_imports_no_program_and_no_config(path: Path) -> None:
    programs = {p.stem for p in ROOT.glob("*.py")} | {"data_tools", "configs", "scripts", "tests", "benchmarks"}
    for line, dotted in imports(path):
        assert dotted.split(".")[0] not in programs, f"{name(path)}:{line}: imports {dotted}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem == "__init__"], ids=name)
def test_only_the_root_re_exports(path: Path) -> None:
    body = parse(path).body
    if path.parent != PACKAGE:
        assert not body, f"{name(path)} must be empty: a paper is found by importing its file"
        return
    for node in body:
        allowed = isinstance(node, ast.ImportFrom) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        allowed |= isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]
        assert allowed, f"{name(path)}:{node.lineno}: the root re-exports, and does nothing else"


def test_the_root_exports_what_it_says() -> None:
    import mmbackdoor

    assert len(set(mmbackdoor.__all__)) == len(mmbackdoor.__all__)
    assert all(hasattr(mmbackdoor, exported) for exported in mmbackdoor.__all__)


# ---- what no file of ours does


def dotted_name(node: ast.AST) -> str:
    """a.b.c of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted_name(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


EXECUTES = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "dill.loads", "joblib.load",
            "cloudpickle.load", "cloudpickle.loads", "ForkingPickler.loads",
            "marshal.load", "marshal.loads", "runpy.run_path", "os.system", "os.popen",
            "yaml.load", "yaml.unsafe_load", "torch.hub.load"}

EXCEPT = {("recipe.py", "load_module"), ("spread.py", "Parcel")}
"""A config is the user's own program; what comes to a worker is from the program that started it."""


def offences(path: Path) -> Iterator[str]:
    tree = parse(path)
    free = {n for f in ast.walk(tree) for n in ast.walk(f) if (path.name, getattr(f, "name", "")) in EXCEPT}
    for node in ast.walk(tree):
        where = f"{name(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and dotted_name(node) == "sys.path" and node not in free:
            yield f"{where}: touches sys.path"
        if not isinstance(node, ast.Call) or node in free:
            continue
        called = dotted_name(node.func)
        if called in EXECUTES:
            yield f"{where}: {called} executes what it is given"
        if called == "torch.load" and not is_true(node, "weights_only"):
            yield f"{where}: torch.load without weights_only=True"
        if called.endswith(".load") and called.split(".")[0] in ("np", "numpy") and is_true(node, "allow_pickle"):
            yield f"{where}: allow_pickle=True"
        if is_true(node, "shell") or is_true(node, "trust_remote_code"):
            yield f"{where}: runs code that it does not know"
    for line, dotted in imports(path):
        where = f"{name(path)}:{line}"
        if dotted == "sys.path":
            yield f"{where}: touches sys.path"
        if dotted.split(".")[0] in ("open_clip_train", "wids", "dill", "joblib"):
            yield f"{where}: imports {dotted}"
        if dotted in ("pickle.load", "pickle.loads", "torch.load"):
            yield f"{where}: imports {dotted}, where the checks of this test cannot see it"


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=name)
def test_no_file_executes_what_it_reads_or_edits_the_import_path(path: Path) -> None:
    assert not list(offences(path))


def test_these_checks_see_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for source in ("import sys\nsys.path.insert(0, '.')", "from sys import path", "import torch\ntorch.load('x')",
                   "import torch\ntorch.load('x', weights_only=False)", "eval('1')", "import pickle\npickle.loads(b'')",
                   "from pickle import loads", "from open_clip_train.data import get_data",
                   "import numpy as np\nnp.load('x', allow_pickle=True)", "import subprocess\nsubprocess.run('ls', shell=True)"):
        (tmp_path / "x.py").write_text(source)
        assert list(offences(tmp_path / "x.py")), source
    (tmp_path / "x.py").write_text("import torch\ntorch.load('x', weights_only=True)\nmodel.eval()\nspec.loader.exec_module(m)")
    assert not list(offences(tmp_path / "x.py"))


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=name)
def test_a_module_says_what_it_is_for_and_does_no_work_when_imported(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), f"{name(path)} has no docstring"
    for node in tree.body:
        loop = isinstance(node, (ast.For, ast.While, ast.With))
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        assert not (loop or call), f"{name(path)}:{node.lineno}: work at import"


def test_train_py_is_short_enough_to_read_in_a_minute() -> None:
    """DESIGN section 2 allows 60 lines of numbered steps; blank lines and the docstring do not count."""
    tree = parse(ROOT / "train.py")
    lines = {line for node in tree.body[1:] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    source = (ROOT / "train.py").read_text().splitlines()
    assert sum(bool(source[line - 1].strip()) for line in lines) <= 65
    assert all(f"# {i}" in "\n".join(source) for i in range(1, 7))
