"""What becomes of a poisoning job that is killed: SIGKILL at a random moment, a rerun to the end, and every byte compared.

    python benchmarks/kills.py [--rounds 100] [--json] [--record results/kills.json]

data_tools/poison.py splices 20 shards of 80 pairs, half of them poisoned, with one process and with two in turn. A fifth of
the kills strike while it starts, the rest while it writes. A round takes about 15 seconds.

kills            rounds
identical        of them, after which the rerun left the very files of an unbroken run, and no other
while_writing    kills that struck when some shards were there and others not
whole_shards     shards that were there at the kills with the bytes of an unbroken run
half_shards      with other bytes
"""
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro
from timing import photographs
from tqdm import tqdm

from mmbackdoor import shards, stores
from mmbackdoor.recipe import command, environment

ROOT = Path(__file__).parents[1]
SHARDS, PAIRS = 20, 80


def write(folder: Path) -> None:
    images = photographs(40)
    samples = ({"__key__": f"{i:06d}", "jpg": images[i % 40], "txt": f"a picture, number {i}"} for i in range(SHARDS * PAIRS))
    shards.write_shards(folder, samples, PAIRS)


def start(source: Path, out: Path, processes: int) -> subprocess.Popen:
    line = ["data_tools/poison.py", "configs/toy/badnets.py", "--data.train", source, "--out", out, "--poison.rate", 0.5,
            "--processes", processes]
    return subprocess.Popen([sys.executable, *map(str, line)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(child: subprocess.Popen) -> None:
    errors = child.communicate()[1]
    if child.returncode:
        raise SystemExit(f"data_tools/poison.py ended with {child.returncode}: {errors.decode()}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def wait_for(child: subprocess.Popen, out: Path, pattern: str) -> float:
    """Waits until a file is there, or the job has ended. Gives the seconds that took."""
    then = time.perf_counter()
    while not any(out.glob(pattern)) and child.poll() is None:
        time.sleep(0.002)
    return time.perf_counter() - then


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False, rounds: int = 100, seed: int = 0, record: str = "") -> None:
    """Kills a poisoning job again and again.

    Args:
        as_json: Print one flat object instead of lines.
        rounds: Jobs to kill.
        seed: Of the moments.
        record: File to write the counts and the environment to.
    """
    rng, found = random.Random(seed), dict.fromkeys(("kills", "identical", "while_writing", "whole_shards", "half_shards"), 0)
    with tempfile.TemporaryDirectory() as folder:
        source, whole, out = (Path(folder, name) for name in ("source", "whole", "out"))
        write(source)
        took = {}
        for processes, into in ((1, whole), (2, out)):
            child = start(source, into, processes)
            took[processes] = wait_for(child, into, "*.tar"), wait_for(child, into, "sizes.json")
            finish(child)
        want = contents(whole)
        if contents(out) != want:
            raise SystemExit("two processes write other bytes than one")
        for i in tqdm(range(rounds), desc="kill", unit="kill", disable=None):
            shutil.rmtree(out)
            processes, moment = 1 + i % 2, rng.uniform(-0.25, 1)
            starting, writing = took[processes]
            child = start(source, out, processes)
            if moment < 0:
                time.sleep(starting * (1 + 4 * moment))
            else:
                wait_for(child, out, "*.tar")
                time.sleep(writing * moment)
            child.kill()
            child.communicate()
            tars = {path.name: path.read_bytes() for path in out.glob("*.tar")}
            half = sum(body != want[name] for name, body in tars.items())
            finish(start(source, out, processes))
            found["kills"] += 1
            found["identical"] += contents(out) == want
            found["while_writing"] += 0 < len(tars) < SHARDS
            found["whole_shards"] += len(tars) - half
            found["half_shards"] += half
    if record:
        stores.write_json(record, found | {"environment": environment(1, "cpu")})
    print(json.dumps(found) if as_json else "\n".join(f"{name}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    command(main)
