"""Our evaluation beside another's: on the same checkpoint and the same directories it must give what CLIP_benchmark gives.

    python benchmarks/agreement.py [--judge VENV] [--record results/agreement.json] [--json]

Accuracy, top-5, mean per-class recall, and recall both ways with five captions an image, on the toy and emoji sets. The
judge is `clip_benchmark eval` (PyPI), a subprocess in a virtual environment of its own, which is made when it is missing
(some 6 GB: it has its own torch): numpy 2.4 breaks it. Both sides run on the CPU in float32, where only another definition
or another preprocessing moves a number by 1e-4; the judge's default, mixed precision, moves it by more. Exit status 1 when
one is moved.

1 find the runs and the data, make the judge's environment   2 write the retrieval sets   3 run both on each set   4 compare, record
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmbackdoor import shards, stores
from mmbackdoor.clip import CARD, WEIGHTS
from mmbackdoor.recipe import command
from mmbackdoor.sets import open_set, write_pair_set
from mmbackdoor.shards import Raw
from mmbackdoor.types import BadInput

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-4
LIBRARIES = ("open_clip_torch", "torch", "torchvision", "pillow", "numpy", "webdataset")
REQUIREMENTS = ("clip_benchmark==1.6.2", "numpy<2.3", "webdataset>=1,<2", f"open_clip_torch=={version('open_clip_torch')}",
                "requests")  # clip_benchmark imports requests and does not ask for it
GROUNDS = ("grey", "brown", "pink", "teal", "olive", "sky")
KS = (1, 5, 10)
CLASSIFICATION = {"accuracy": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
RETRIEVAL = {f"{ours}_r{k}": f"{theirs}_retrieval_recall@{k}" for k in KS
             for ours, theirs in (("image_to_text", "text"), ("text_to_image", "image"))}
"""Our names of measures, and the judge's: what is retrieved is what it names."""
TOY_CAPTIONS = ("a {c} on a {g} background", "a photo of a {c} on {g} ground", "the {c}, with {g} behind it", "{c} on a {g} field",
                "a {c}, the ground is {g}")
EMOJI_CAPTIONS = ("{c}", "an emoji of {c}", "a picture of {c}", "icon showing {c}", "a drawing of {c}")


@dataclass(frozen=True)
class Trial:
    """One set that both sides are measured on."""

    name: str
    checkpoint: str
    folder: str
    kind: Literal["zero_shot", "retrieval"]

    @property
    def measures(self) -> dict[str, str]:
        return {"zero_shot": CLASSIFICATION, "retrieval": RETRIEVAL}[self.kind]


# ---- the retrieval sets


def toy_captions(pairs: str, classnames: Iterable[str]) -> Iterator[Raw]:
    """The first image of each shape on each ground that a caption names, with five captions that name both."""
    names, seen = "|".join(map(re.escape, classnames)), set()
    for raw in (raw for url in shards.expand(pairs) for raw in shards.read_pairs(url)):
        text = raw["txt"].decode()
        c, g = re.search(rf"\b({names})\b", text), re.search(rf"\b({'|'.join(GROUNDS)})\b", text)
        if c and g and (c[1], g[1]) not in seen:
            seen.add((c[1], g[1]))
            yield raw | {"txt": "\n".join(t.format(c=c[1], g=g[1]) for t in TOY_CAPTIONS)}


def emoji_captions(concepts: str) -> Iterator[Raw]:
    """The first image of each concept, with five captions that name it."""
    data, seen = open_set(concepts), set()
    for raw in data.raws():
        name = data.classnames[int(raw["cls"])]
        if name.lower() not in seen:
            seen.add(name.lower())
            yield {k: v for k, v in raw.items() if k != "cls"} | {"txt": "\n".join(t.format(c=name) for t in EMOJI_CAPTIONS)}


def trials(runs: dict[str, str], data: str, root: str, temporary: Path) -> Iterator[Trial]:
    """The sets of each run; those with captions are written into `temporary`. The last has images of twice the input's size."""
    if "toy" in runs:
        toy = runs["toy"]
        yield Trial("toy", toy, f"{data}/test", "zero_shot")
        write_pair_set(temporary / "toy_captions", toy_captions(f"{data}/pairs", open_set(f"{data}/test").classnames))
        yield Trial("toy_captions", toy, f"{temporary}/toy_captions", "retrieval")
    if "emoji" in runs:
        emoji = runs["emoji"]
        yield Trial("emoji_concepts", emoji, f"{root}/concepts", "zero_shot")
        yield Trial("emoji_groups", emoji, f"{root}/groups", "zero_shot")
        write_pair_set(temporary / "emoji_captions", emoji_captions(f"{root}/concepts"))
        yield Trial("emoji_captions", emoji, f"{temporary}/emoji_captions", "retrieval")
    if {"toy", "emoji"} <= runs.keys():
        yield Trial("emoji_groups_resized", toy, f"{root}/groups", "zero_shot")


# ---- the two sides


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def environment(judge: Path) -> dict[str, str]:
    """Makes the judge's environment if there is none; the versions in it."""
    python = judge / "bin" / "python"
    if not judge.exists():
        tell(f"making the judge's environment in {judge}: pip install {' '.join(REQUIREMENTS)}")
        try:
            venv.create(judge, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", *REQUIREMENTS], check=True, stdout=sys.stderr)
        except BaseException as error:
            shutil.rmtree(judge, ignore_errors=True)
            if isinstance(error, subprocess.CalledProcessError):
                raise BadInput(f"{judge}: the judge's environment cannot be made; pip's last lines above say why") from error
            raise
    wanted = dict(requirement.split("==") for requirement in REQUIREMENTS if "==" in requirement)
    ask = "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    said = subprocess.run([python, "-c", ask, *wanted, *LIBRARIES], capture_output=True, text=True) if python.is_file() else None
    found = json.loads(said.stdout) if said and not said.returncode else {}
    if any(found.get(name) != v for name, v in wanted.items()):
        asked = " and ".join(f"{name} {v}" for name, v in wanted.items())
        raise BadInput(f"{judge}: is no environment with {asked}; remove it and it is made anew, or name another with --judge")
    return found


def run(arguments: list[str], out: Path, what: str) -> dict[str, Any]:
    """The metrics that a program writes to `out`."""
    settings = {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode or not out.is_file():
        tail = " | ".join(done.stderr.strip().splitlines()[-2:])
        raise BadInput(f"{what} failed ({tail}); to run it alone, --keep its files first: {' '.join(arguments)}")
    return json.loads(out.read_text())["metrics"]


def ours(trial: Trial, out: Path) -> list[str]:
    flag = {"zero_shot": "--dataset", "retrieval": "--retrieval"}[trial.kind]
    return [sys.executable, str(ROOT / "eval.py"), trial.checkpoint, flag, trial.folder, "--no-attack", "--no-examine", "--out", str(out)]


def theirs(trial: Trial, judge: Path, out: Path) -> list[str]:
    """CLIP_benchmark's command line; `local-dir:` makes open_clip read the run's own card, preprocessing included."""
    task = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}[trial.kind]
    return [str(judge / "bin" / "clip_benchmark"), "eval", "--model", f"local-dir:{trial.checkpoint}", "--pretrained", "none",
            "--dataset", f"wds/{trial.name}", "--dataset_root", trial.folder, "--task", task, "--recall_k", *map(str, KS),
            "--no_amp", "--num_workers", "0", "--batch_size", "128", "--quiet", "--output", str(out)]


def both(trial: Trial, judge: Path, temporary: Path) -> dict[str, Any]:
    """Of one set: each measure of ours beside the judge's, and the commands; flat."""
    files = {side: temporary / f"{trial.name}.{side}.json" for side in ("ours", "judge")}
    commands = {"ours": ours(trial, files["ours"]), "judge": theirs(trial, judge, files["judge"])}
    here = run(commands["ours"], files["ours"], "our evaluation")[trial.kind]
    there = run(commands["judge"], files["judge"], "the judge's evaluation")
    flat = {f"{trial.name}_n": here["n"]} | {f"{trial.name}_command_{side}": shown(c, temporary) for side, c in commands.items()}
    for name, their_name in trial.measures.items():
        flat |= {f"{trial.name}_{name}_ours": here[name], f"{trial.name}_{name}_judge": there[their_name]}
    return flat


def shown(arguments: Sequence[str], temporary: Path) -> str:
    """A command without the places of this machine."""
    places = {f"{temporary}/": "TEMPORARY/", sys.executable: "python", f"{ROOT}/": ""}
    line = " ".join(arguments)
    for place, name in places.items():
        line = line.replace(place, name)
    return line


def differences(record: dict[str, Any]) -> dict[str, float]:
    """Of every measure of a record. What one side lacks, or gives as NaN, is infinitely far off."""
    names = [name.removesuffix("_ours") for name in record if name.endswith("_ours") and "command" not in name and "version" not in name]
    pairs = {name: [record[f"{name}_{side}"] for side in ("ours", "judge")] for name in names}
    return {name: abs(a - b) if None not in (a, b) and math.isfinite(a - b) else math.inf for name, (a, b) in pairs.items()}


def table(record: dict[str, Any], gaps: dict[str, float]) -> str:
    def cell(name: str) -> str:
        return "      none" if record[name] is None else f"{record[name]:10.6f}"

    lines = [f"{name:45}{cell(f'{name}_ours')}{cell(f'{name}_judge')}{gap:12.1e}" for name, gap in gaps.items()]
    return "\n".join([f"{'':45}{'ours':>10}{'judge':>10}{'difference':>12}", *lines])


def main(checkpoint: str = "runs/toy/badnets", emoji_checkpoint: str = "runs/emoji/badnets", data: str = "data/toy", emoji: str = "",
         sets: tuple[Literal["toy", "emoji"], ...] = ("toy", "emoji"), judge: str = "build/judge", keep: str = "",
         record: str = "", as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Compares our evaluation with CLIP_benchmark's.

    Args:
        checkpoint: Run that is measured on the toy sets.
        emoji_checkpoint: Run that is measured on the emoji sets.
        data: The toy data, with test/ and pairs/.
        emoji: The emoji data, with concepts/ and groups/; default: MMBACKDOOR_EMOJI, ../shared/real or data/emoji.
        sets: Which of the two are measured.
        judge: Virtual environment of the judge, made when it is missing.
        keep: Folder to leave what both sides read and wrote in, TEMPORARY in the recorded commands.
        record: File to write the numbers, versions and commands to.
        as_json: Print them as one flat object instead of a table.
    """
    emoji = emoji or os.environ.get("MMBACKDOOR_EMOJI") or ("../shared/real" if os.path.isdir("../shared/real") else "data/emoji")  # 1
    runs = {str(name): {"toy": checkpoint, "emoji": emoji_checkpoint}[name] for name in sets}
    for name, run_of in runs.items():
        if not all((Path(run_of) / part).is_file() for part in (CARD, WEIGHTS)):
            raise BadInput(f"{run_of}: lacks {CARD} or {WEIGHTS}; name a run of ours, or train one: configs/{name}/badnets.py")
        set_of = {"toy": f"{data}/test", "emoji": f"{emoji}/concepts"}[name]
        if not os.path.isdir(set_of):
            raise BadInput(f"{set_of}: no such set; make the data (see configs/{name}/clean.py), or leave it out with --sets")
    if keep and os.path.exists(keep):
        raise BadInput(f"{keep}: exists already; name another folder with --keep")
    in_judge = environment(Path(judge).absolute())
    found: dict[str, Any] = {"schema": 1, "tolerance": TOLERANCE, "clip_benchmark": in_judge["clip_benchmark"],
                             **{f"{name}_run": run_of for name, run_of in runs.items()}}
    for library in LIBRARIES:
        found |= {f"version_{library}_ours": version(library), f"version_{library}_judge": in_judge[library]}
    if keep:
        Path(keep).mkdir(parents=True)
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory() as temporary:
        for trial in trials(runs, data, emoji, Path(temporary)):  # 2
            tell(f"measuring {trial.name}, on both sides")
            found |= both(trial, Path(judge).absolute(), Path(temporary))  # 3
    gaps = differences(found)  # 4
    found["largest_difference"] = max(gaps.values())
    if record:
        stores.write_json(record, found)
    print(json.dumps(found) if as_json else table(found, gaps))
    if worst := [f"{name} {gap:.1e}" for name, gap in gaps.items() if gap > TOLERANCE]:
        tell(f"error: {len(worst)} measures differ by more than {TOLERANCE}: {', '.join(worst)}")
        sys.exit(1)


if __name__ == "__main__":
    command(main)
