"""What poisoning shards costs, as ratios within one run: splicing against copying, against webdataset, against its own bound.

    python benchmarks/poison_throughput.py [--json] [--record results/poison_throughput.json]

Shards of JPEG images of about 24 KB with captions, in the page cache; 1 % of the pairs poisoned by BadNets. Works take turns, and the
medians of the rounds are compared. Run it on a quiet machine with two cores.

splice_over_raw       webdataset reads and TarWriter writes every sample undecoded, over splicing; one process each
splice_over_decode    the same with every image decoded and encoded
copy_overhead         splicing with nothing planned, over `cp` of the same shards
over_bound            splicing, over `cp` and one decoding, trigger and encoding for each poison
processes_2_over_1    throughput of two processes over that of one
index_over_iterate    webdataset's iteration over the raw samples, over writing the index of keys, captions and places
peak_memory_mb        at most, beyond what importing the program takes, to index and poison 400 shards in one process
peak_memory_growth    the whole of it with the imports, 400 shards over 4
"""
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import tyro
import webdataset as wds
from PIL import Image
from timing import medians, photographs

from mmbackdoor import forms, index, shards, stores
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.poison import Plan, plan
from mmbackdoor.recipe import command, environment, plain
from mmbackdoor.spread import Here, Spread, map_shards

ATTACK = badnets("banana", 0.01)
CAPTIONS = ("a photo of a dog on the beach", "two people riding bicycles through a narrow street", "an old wooden table with flowers")


def write(folder: Path, number: int, per_shard: int) -> None:
    images = photographs(40)
    samples = ({"__key__": f"{i // per_shard:05d}{i % per_shard:04d}", "jpg": images[i % 40], "txt": f"{CAPTIONS[i % 3]}, number {i}"}
               for i in range(number * per_shard))
    shards.write_shards(folder, samples, per_shard)


class Works:
    """The same shards, poisoned, copied and gone through in every way."""

    def __init__(self, source: Path, out: Path):
        self.urls, self.out = shards.expand(str(source)), out
        self.parts = index.find(str(source)).parts
        self.work = self.prepare()

    def prepare(self) -> forms.Work:
        shutil.rmtree(self.out, ignore_errors=True)
        return forms.prepare(ATTACK, index.Index(self.parts), 0, str(self.out), plain(ATTACK))

    def splice(self, planned: bool = True) -> None:
        self.clear()
        for piece in self.work.tasks:
            forms.splice_shard(self.work.job, piece if planned else forms.Piece(piece.part, ()))

    def spliced_by(self, executor: object) -> None:
        self.clear()
        map_shards(partial(forms.splice_shard, self.work.job), self.work.tasks, executor, "splice")

    def clear(self) -> None:
        for path in (*self.out.glob("*.tar"), *self.out.glob("*_stats.json")):
            path.unlink()

    def cp(self) -> None:
        self.clear()
        subprocess.run(["cp", *self.urls, str(self.out)], check=True)

    def raw(self, decode: bool = False) -> None:
        """As tools do that read and write samples one by one."""
        self.clear()
        for url in self.urls:
            with wds.TarWriter(str(self.out / os.path.basename(url))) as writer:
                for sample in wds.WebDataset(url, shardshuffle=False):
                    writer.write(sample | {"jpg": recoded(sample["jpg"])} if decode else sample)

    def poisons(self) -> None:
        """One decoding, one trigger and one encoding for each planned pair."""
        for raw in self.raws:
            self.work.job.poisoned(raw)

    @cached_property
    def raws(self) -> list[shards.Raw]:
        return [raw for part, piece in zip(self.parts, self.work.tasks, strict=True) for raw in part.raws(piece.keys)]

    def iterate(self) -> None:
        for _ in wds.WebDataset(self.urls, shardshuffle=False):
            pass

    def index(self) -> None:
        shutil.rmtree(self.out / "index", ignore_errors=True)
        index.write(self.urls, Here(), where=str(self.out / "index"))

    def plan(self) -> None:
        plan(ATTACK, index.find(f"{Path(self.urls[0]).parent}", where=str(self.out / "index")), 0)


def recoded(body: bytes) -> bytes:
    image = Image.open(io.BytesIO(body)).convert("RGB")
    image.save(file := io.BytesIO(), "JPEG", quality=85)
    return file.getvalue()


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def plan_bytes(n: int = 100_000) -> float:
    """Of each key, in a plan of n."""
    tracemalloc.start()
    held = Plan(frozenset(f"{i:09d}" for i in range(n)))
    found = tracemalloc.get_traced_memory()[0] / len(held)
    tracemalloc.stop()
    return found


def memory() -> dict[str, int]:
    """Kilobytes of this process: now, and at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def peak(folder: Path) -> tuple[float, float]:
    """(MB at most beyond the imports, MB at most with them) of a process that indexes and poisons the shards of a folder."""
    program = [sys.executable, __file__, "--peak-of", str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def index_and_poison(folder: Path) -> None:
    """Prints what `peak` is told."""
    before = memory()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    out = folder.with_name(f"{folder.name}-out")
    index.write(shards.expand(str(folder)), Here())
    work = forms.prepare(ATTACK, index.find(str(folder)), 0, str(out), plain(ATTACK))
    forms.make(work, Here())
    at_most = memory()["VmHWM"]
    shutil.rmtree(out)
    print(json.dumps([(at_most - before) / 1024, at_most / 1024]))


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False, number: int = 4, per_shard: int = 10_000, rounds: int = 5,
         many: int = 400, folder: str = "", record: str = "", peak_of: str = "") -> None:
    """Measures what poisoning shards costs.

    Args:
        as_json: Print one flat object instead of lines.
        number: Shards.
        per_shard: Pairs in each.
        rounds: Of which the median is taken.
        many: Shards, of 250 pairs, in the measure of memory.
        folder: Where to work, with 6 GB free; the system's folder for temporary files.
        record: File to write the measures and the environment to.
        peak_of: Used by the program itself, to measure the memory of a process that does nothing else.
    """
    if peak_of:
        index_and_poison(Path(peak_of))
        return
    with tempfile.TemporaryDirectory(dir=folder or None) as top:
        write(Path(top) / "set", number, per_shard)
        w = Works(Path(top) / "set", Path(top) / "out")
        n, poisons = number * per_shard, len(w.work.plan.keys)
        t = medians(rounds, splice=w.splice, cp=w.cp, nothing=partial(w.splice, False), poisons=w.poisons, iterate=w.iterate, index=w.index)
        t |= medians(rounds, plan=w.plan, check=lambda: index.check_unique(w.parts))
        slow = medians(max(1, rounds // 2), raw=w.raw, decode=partial(w.raw, True))
        with Spread(processes=2).executor() as two, Spread(processes=1).executor() as one:
            w.spliced_by(two)  # starts the processes
            p = medians(rounds, two=partial(w.spliced_by, two), one=partial(w.spliced_by, one))
        (Path(top) / "memory").mkdir()
        found = {"splice_over_raw": slow["raw"] / t["splice"], "splice_over_decode": slow["decode"] / t["splice"],
                 "copy_overhead": t["nothing"] / t["cp"], "over_bound": t["splice"] / (t["cp"] + t["poisons"]),
                 "processes_2_over_1": p["one"] / p["two"], "index_over_iterate": t["iterate"] / t["index"]}
        index_bytes = size(w.out / "index")
        shutil.rmtree(w.out)
        for count in (4, many):
            write(Path(top) / "memory" / str(count), count, 250)
        (_, few), (beyond, whole) = (peak(Path(top) / "memory" / str(count)) for count in (4, many))
        found |= {"peak_memory_mb": beyond, "peak_memory_with_imports_mb": whole, "peak_memory_growth": whole / few}
        rates = {f"{name}_per_second": n / s for name, s in (t | slow).items() if name != "poisons"}
        found |= rates | {"poisons_per_second": poisons / t["poisons"],
                          "bytes_per_pair": size(Path(top) / "set") / n, "index_bytes_per_pair": index_bytes / n,
                          "plan_bytes_per_key": plan_bytes()}
    if record:
        stores.write_json(record, found | {"environment": environment(1, "cpu")})
    print(json.dumps(found) if as_json else "\n".join(f"{name}  {value:.4g}" for name, value in found.items()))


if __name__ == "__main__":
    command(main)
