"""An experiment as a value: written in configs/*.py, changed by flags that its own fields generate."""
from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import platform
import pprint
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from .clip import Augment, Model
from .fit import Schedule
from .losses import Clip
from .shards import Codec, Incomplete
from .types import Attack, BadInput, Edit, Objective, Threat

T = TypeVar("T")
Precision = Literal["fp32", "amp", "amp_bf16", "fp16", "bf16"]
MIXED = {"fp32": "no", "amp": "fp16", "fp16": "fp16", "amp_bf16": "bf16", "bf16": "bf16"}


@dataclass(frozen=True)
class Data:
    """Where the data lie. `{root}` in a path stands for `root`; shards may be folders, brace patterns and URLs."""

    train: str
    """Shards of image-text pairs."""
    root: str = ""
    zero_shot: str = ""
    """Labelled set of the final numbers: a CLIP_benchmark directory or class folders."""
    validation: str = ""
    """Labelled set of the curves and of every choice of hyper-parameters; never the one above."""
    retrieval: str = ""
    """Shards of pairs for retrieval."""
    share: float = 1.0
    """Of the training pairs that are used, before any is poisoned: those whose keys' hashes are smallest, so that a small share is part of
    a larger one."""
    patch: str = ""
    """Patch set to lay over the training shards, as data_tools/poison.py --form patch writes it."""
    index: str = ""
    """Folder of the training shards' index, where it is not beside them."""
    incomplete: Incomplete = "refuse"
    """What to do with samples that lack a half, and with images that cannot be decoded."""

    def path(self, name: Literal["train", "zero_shot", "validation", "retrieval", "patch", "index"]) -> str:
        return getattr(self, name).replace("{root}", self.root)


RunArgument: Any = PrimitiveConstructorSpec(
    nargs=1, metavar="RUN|CHECKPOINT", instance_from_str=lambda args: None if args[0] == "None" else args[0],
    is_instance=lambda value: True, str_from_instance=lambda value: [str(getattr(value, "directory", value))])
"""On the command line a recipe that another refers to is its run's directory."""


@dataclass(frozen=True)
class Recipe:
    """One run: what is trained on which data, what evaluation fires at it, and under which numbers.

    `poison` is what reaches this run's data; `threat` is what evaluation fires, by default that of `poison`. They are
    two fields because cleaning a victim fires its trigger and sees clean data. `init` is the run or checkpoint to start
    from; `reference` the clean run whose attack success is subtracted.
    """

    name: str
    data: Data
    model: Model = field(default_factory=Model)
    init: Annotated[Recipe | str | None, RunArgument] = None
    """Run or checkpoint whose weights this run starts from."""
    poison: Attack | None = None
    plan: str = ""
    """A plan.parquet that says which pairs are poisoned, those of its keys that the data hold; else the seed decides."""
    codec: Codec = "original"
    """How poisoned images are written: as the files that they replace, or as PNG or JPEG, which may tell who was touched."""
    threat: Threat | None = None
    surrogate: Annotated[Recipe | str | None, RunArgument] = None
    """Run or checkpoint that the attacker has, on which the file of a crafted trigger is made if it is not there."""
    edit: Edit | None = None
    """What is done to the weights of `init` before training, or, with 0 epochs, in its place."""
    donor: Annotated[Recipe | str | None, RunArgument] = None
    """Run or checkpoint whose weights the edit takes for a second model."""
    reference: Annotated[Recipe | str | None, RunArgument] = None
    """Clean run whose attack success is the baseline of `lift`."""
    objective: Objective = field(default_factory=Clip)
    keep: str | None = None
    """A text file of keys that may be seen, one a line."""
    aug: Augment = field(default_factory=Augment)
    schedule: tyro.conf.OmitArgPrefixes[Schedule] = field(default_factory=Schedule)
    batch_size: int = 64
    """Per process."""
    precision: Precision = "fp32"
    seed: int = 0
    shuffle: int = 4000
    """Pairs held in memory for shuffling, all lanes together."""
    lanes: int = 8
    """Stretches the data are read in. Batches are the same for every number of processes x workers that divides it."""
    workers: int = 1
    """Loader processes per process."""
    eval_frequency: int = 1
    """Epochs between measurements on the validation set; 0 for none."""
    save_frequency: int = 0
    """Epochs between checkpoints that are kept; the latest always is."""
    save_steps: int = 0
    """Steps between saves of the latest checkpoint within an epoch; 0 for none."""
    resume: Literal["", "latest"] = ""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    expect_world_size: int = 0
    """Refuse to run on another number of processes; 0 takes any."""
    out: str = "runs"

    @property
    def directory(self) -> Path:
        return Path(self.out) / (f"{self.name}-seed{self.seed}" if self.seed else self.name)

    @property
    def others(self) -> list[Recipe]:
        """The runs that this one starts from, edits with, is compared to, or crafts on."""
        return [other for other in (self.init, self.donor, self.reference, self.surrogate) if isinstance(other, Recipe)]

    @property
    def attack(self) -> Attack | None:
        """The poison, with `{root}` in the paths that it names standing for the data's, as in theirs."""
        return mapped(self.poison, lambda text: text.replace("{root}", self.data.root) if "{root}" in text else text)

    @property
    def fires(self) -> Threat | Mapping[str, Threat] | None:
        """What evaluation fires."""
        if self.threat or not self.poison:
            return self.threat
        return several if len(several := self.poison.threats) > 1 else self.poison.threat


@dataclass(frozen=True)
class Suite:
    """Runs to compare. Of `sweep`, which varies one number, the reader is told the run of highest clean validation
    accuracy; a defender cannot see the attack success, so no choice may rest on it."""

    name: str
    recipes: tuple[Recipe, ...]
    sweep: tuple[Recipe, ...] = ()
    once: tuple[Recipe, ...] = ()
    """Runs under the first of the seeds alone."""
    table: Literal["runs", "attacks"] = "runs"
    """What bench.py prints: costs and intervals of the runs, or the poisons and what they achieve."""

    def under(self, seeds: Sequence[int]) -> list[tuple[Recipe, int]]:
        """Each recipe with each of its seeds."""
        return [(r, seed) for i, seed in enumerate(seeds) for r in self.recipes + self.sweep + (self.once if i == 0 else ())]

    def runs(self, seeds: Sequence[int]) -> list[Recipe]:
        """Every run once under every seed, or under the first alone, after the runs that it starts from or is compared to."""
        ordered: dict[Path, Recipe] = {}

        def add(r: Recipe) -> None:
            for other in r.others:
                add(other)
            if recipe_hash(ordered.setdefault(r.directory, r)) != recipe_hash(r):
                raise BadInput(f"{self.name}: two different recipes are named {r.name}; give each its own name")

        for r, seed in self.under(seeds):
            add(seeded(r, seed))
        return list(ordered.values())


HOW_NOT_WHAT = {"mmbackdoor.recipe.Recipe": frozenset(("workers", "eval_frequency", "save_frequency", "save_steps", "resume", "report_to",
                                                      "expect_world_size", "out")),
                "mmbackdoor.recipe.Data": frozenset(("index",))}
"""Fields that say how a run is run, not what it is; they are no part of its hash."""
LATER: dict[str, dict[str, Any]] = {
    "mmbackdoor.recipe.Recipe": {"plan": "", "codec": "original", "surrogate": None, "edit": None, "donor": None},
    "mmbackdoor.recipe.Data": {"patch": "", "share": 1.0}, "mmbackdoor.defenses.cleanclip.CleanCLIP": {"synonyms": False},
    "mmbackdoor.poison.DirtyLabel": {"source": []}, "mmbackdoor.triggers.Patch": {"image": None},
    "mmbackdoor.triggers.Blend": {"fresh": False},
    "mmbackdoor.types.Threat": {"source": [], "victims": [], "control": False}}
"""Fields that came after results were recorded, with what they were before there was a choice: so the hashes of old runs stand."""


@cache
def source_hash(kind: type) -> str:
    """Read once: the file may be edited while the run is under way."""
    return hashlib.blake2b(inspect.getsource(kind).encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON: a dataclass becomes {"class": …, field: …}. Methods of the user's own are told by their source."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        out = {"class": f"{kind.__module__}.{kind.__qualname__}"}
        if not kind.__module__.startswith("mmbackdoor."):
            out["source_hash"] = source_hash(kind)
        return out | {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return repr(value)


def mapped(value: T, change: Callable[[str], str]) -> T:
    """A value with every string in it changed; the same object where none is."""
    if isinstance(value, str):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        new = tuple(mapped(v, change) for v in value)
        return value if all(a is b for a, b in zip(value, new, strict=True)) else new  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        different = {name: new for name, v in fields.items() if (new := mapped(v, change)) is not v}
        return replace(value, **different) if different else value
    return value


def revive(value: Any) -> Any:
    """The inverse of `plain` for classes of this package; others are not imported on the word of a file."""
    if isinstance(value, dict) and "class" in value:
        module, _, name = value["class"].rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name, None) if module.startswith("mmbackdoor.") else None
        except ImportError:
            kind = None
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise BadInput(f"{value['class']}: is not of this package; name the config that defines it with --threat")
        return kind(**{k: revive(v) for k, v in value.items() if k != "class"})
    if isinstance(value, dict):
        return {k: revive(v) for k, v in value.items()}
    return tuple(revive(v) for v in value) if isinstance(value, list) else value


def strings(value: Any) -> Iterator[str]:
    """All that a plain value holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from strings(v)


def files(value: Any, but: frozenset[str] = frozenset()) -> list[str]:
    """Hashes of the files that a plain value names, but for some."""
    named = (s for s in strings(value) if s not in but and os.path.isfile(s))
    return [hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest() for path in named]


def crafted(recipe: Any) -> frozenset[str]:
    """Files that a plain recipe, or one that it starts from, crafts on its surrogate: told by what they are made from."""
    if not isinstance(recipe, dict):
        return frozenset()
    own = [s for s in strings(recipe["poison"]) if s.endswith(".safetensors")] if recipe.get("surrogate") else []
    return frozenset(own) | crafted(recipe["init"])


def identity(value: Any) -> Any:
    """Of a plain value, what decides an outcome."""
    if isinstance(value, dict):
        kind = value.get("class", "")
        skip = HOW_NOT_WHAT.get(kind, frozenset()) | {k for k, before in LATER.get(kind, {}).items() if value.get(k, before) == before}
        if kind == "mmbackdoor.recipe.Recipe" and (named := files([value[k] for k in ("poison", "threat", "keep", "plan")],
                                                                        crafted(value))):
            value = value | {"files": named}
        if kind == "mmbackdoor.recipe.Data" and (named := files(f"{value['patch']}/manifest.json")):
            value = value | {"files": named}
        if kind == "mmbackdoor.clip.Model" and (named := files(value["name"])):
            value = value | {"config": named[0]}
        return {k: identity(v) for k, v in value.items() if k not in skip}
    return [identity(v) for v in value] if isinstance(value, list) else value


def recipe_hash(recipe: Recipe) -> str:
    """Of all that decides the outcome, with the recipes that it starts from and is compared to."""
    return hashlib.blake2b(json.dumps(identity(plain(recipe)), sort_keys=True).encode(), digest_size=8).hexdigest()


def text(recipe: Recipe) -> str:
    """The resolved recipe, to read."""
    return pprint.pformat(recipe, width=120, sort_dicts=False) + "\n"


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The same experiment under another seed, together with the runs of its seed that it starts from, edits with and is compared to; one
    of another seed is a given model and stays."""
    change = {name: seeded(value, seed) for name in ("init", "donor", "reference")
              if isinstance(value := getattr(recipe, name), Recipe) and value.seed == recipe.seed}
    return replace(recipe, seed=seed, **change)  # type: ignore[arg-type]


def environment(world_size: int, device: str) -> dict[str, Any]:
    """The `environment` part of a result."""
    git = ""
    with suppress(OSError):  # no git is there
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    return {"mmbackdoor": version("mmbackdoor"), "torch": torch.__version__, "open_clip": version("open_clip_torch"),
            "python": platform.python_version(), "device": device, "threads": torch.get_num_threads(),
            "world_size": world_size, "git": git.strip() or None}


# ---- loading


def load_module(path: str) -> Any:
    """A config file as a real module (configs/mine.py is configs.mine), so that classes in it have source and pickle."""
    shown = path
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such config; name a Python file that ends in `recipe = …`, see configs/")
    root = os.getcwd()
    if root not in sys.path:  # configs import each other from where the command is run, as `python -m` would let them
        sys.path.insert(0, root)
    name, path = os.path.relpath(path).removesuffix(".py").replace(os.sep, ".").strip("."), os.path.abspath(path)
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == path:
        return known
    if known is not None:  # random.py of the user's is not Python's
        name = f"config:{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not spec or not spec.loader:
        raise BadInput(f"{shown}: not a Python file; name one that ends in `recipe = …`, see configs/")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BadInput:
        raise
    except Exception as error:
        del sys.modules[name]
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        line = next((f":{frame.lineno}" for frame in reversed(frames) if frame.filename == path), "")
        raise BadInput(f"{shown}{line}: {type(error).__name__}: {error}; correct the config") from error
    return module


def load(path: str, args: Sequence[str] = ()) -> Recipe:
    """The recipe of a config file, changed by flags: --epochs 1 --poison.rate 0.01 --data.train 'x/{00000..00331}.tar'."""
    module = load_module(path)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise BadInput(f"{path}: defines no `recipe`, a mmbackdoor.Recipe; end it with `recipe = Recipe(…)`"
                       + (", or run it with bench.py, as it defines a `suite`" if hasattr(module, "suite") else ""))
    return flags(recipe, args)


def load_suite(path: str) -> Suite:
    """The suite of a config file; a list of recipes, or one recipe, is a suite too."""
    module = load_module(path)
    found = getattr(module, "suite", getattr(module, "recipe", None))
    if isinstance(found, Recipe):
        found = [found]
    if isinstance(found, (list, tuple)):
        found = Suite(os.path.relpath(path).removesuffix(".py").removeprefix("configs/"), tuple(found))
    if not isinstance(found, Suite) or not all(isinstance(r, Recipe) for r in found.recipes + found.sweep):
        raise BadInput(f"{path}: defines no `suite`; end it with `suite = [recipe, …]` or `suite = Suite(name, recipes)`")
    if not found.recipes + found.sweep:
        raise BadInput(f"{path}: its suite is empty; put a recipe in it")
    return found


def flags(value: T, args: Sequence[str]) -> T:
    """Changes a recipe, or a value that holds one, by command-line flags; the fields of the values it holds are its flags."""
    return tyro.cli(tyro.conf.AvoidSubcommands[type(value)], default=value, args=list(args),  # type: ignore[misc]
                    console_outputs=os.environ.get("RANK", "0") == "0")


def from_command_line(usage: str, around: Callable[[Recipe], Any] = lambda recipe: recipe) -> Any:
    """The recipe that a program was called with, `program.py CONFIG --flags`, in what the program puts around it; without a
    config it tells its usage."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"{usage}\n{sys.argv[0]} CONFIG --help lists all flags.")
        sys.exit(0 if set(sys.argv) & {"-h", "--help"} else 2)
    return flags(around(load(sys.argv[1])), sys.argv[2:])


def command(main: Callable[..., T], args: Sequence[str] | None = None) -> T:
    """Runs a typed function as a command line. Bad input becomes one line on stderr and exit status 2."""
    return told(lambda: tyro.cli(main, args=args))()


ALONE = 3.0
"""Seconds after which a process tells its error by itself: that the first process has too, it tells, and the launcher ends the others."""


def told(main: Callable[..., T]) -> Callable[..., T]:
    """A program whose BadInput is told in one line, with exit status 2 and no traceback, on however many processes."""

    @wraps(main)
    def run(*args: Any, **kwargs: Any) -> T:
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            return result
        except BadInput as error:
            # from a loader worker the message arrives with a traceback before it
            line = " ".join(str(error).rpartition("mmbackdoor.types.BadInput: ")[2].split())
            if os.environ.get("RANK", "0") != "0":
                time.sleep(ALONE)
            print(f"error: {line}", file=sys.stderr)
            sys.stderr.flush()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                os._exit(2)  # the others may wait in a collective; torchrun ends them
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; what is done is kept: run it again, a training run with --resume latest", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader, `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            sys.exit(141)

    return run
