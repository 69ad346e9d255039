"""What evaluation costs, as ratios within one run: one pass against its parts, search against a matmul, cache against none.

    python benchmarks/evaluate.py [--json] [--record results/evaluate.json]

The images are JPEG files of 320 x 256 pixels in shards, the model is open_clip's ViT-S-32 at 224 pixels with random weights.
Parts and whole alternate, and the medians of the rounds are compared. Run it on a quiet machine.
"""
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from timing import medians, photographs, seconds

from mmbackdoor import clip, shards, stores
from mmbackdoor.evaluate import zero_shot
from mmbackdoor.features import How
from mmbackdoor.recipe import command, environment
from mmbackdoor.search import search
from mmbackdoor.sets import EvalSet, open_set
from mmbackdoor.triggers import Blend, Patch
from mmbackdoor.types import Target, Threat, Trigger

CLASSES = tuple(f"thing number {i}" for i in range(10))
TRIGGERS: tuple[Trigger, ...] = (Patch(), Blend(), Patch(0.2, "center", "noise"), Patch(0.1, "top-left", "white"))


def photographed(folder: Path, n: int) -> EvalSet:
    """A set of n photographs."""
    raws = ({"__key__": f"{i:06d}", "jpg": body, "cls": str(i % len(CLASSES))} for i, body in enumerate(photographs(n, noise=9)))
    shards.write_eval_set(folder, raws, CLASSES, ("a photo of a {c}.",))
    return open_set(folder)


def over_parts(net: clip.CLIP, data: EvalSet, how: How, k: int, rounds: int) -> float:
    """Zero-shot evaluation under k threats, over one decode + k triggers + (k + 1) encodes."""
    threats = {f"threat {i}": Threat(trigger, Target(CLASSES[0])) for i, trigger in enumerate(TRIGGERS[:k])}
    images = [shards.decode(raw)["image"] for raw in data.raws()]
    rng = torch.Generator().manual_seed(0)

    def decode():
        for raw in data.raws():
            shards.decode(raw)

    def trigger():
        for threat in threats.values():
            for image in images:
                threat.trigger.stamp(image, rng)

    @torch.no_grad()
    def encode():
        for i in range(0, len(images), how.batch):
            net.image_features(torch.stack([net.preprocess(image) for image in images[i : i + how.batch]]))

    t = medians(rounds, whole=lambda: zero_shot(net, data, threats, how), decode=decode, trigger=trigger, encode=encode)
    return t["whole"] / (t["decode"] + t["trigger"] + (k + 1) * t["encode"])


def over_matmul(rounds: int, queries: int = 2000, gallery: int = 100_000, width: int = 512) -> float:
    """Exact search of the ten nearest, over torch's product and topk of the same."""
    q, g = (torch.nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(n)), dim=1)
            for n in (queries, gallery))
    t = medians(rounds, search=lambda: search(q, g, 10), matmul=lambda: (q @ g.T).topk(10))
    return t["search"] / t["matmul"]


def speedup(net: clip.CLIP, data: EvalSet, how: How, rounds: int) -> float:
    """Evaluation from pixels, over evaluation from the cache."""
    threat = Threat(Patch(), Target(CLASSES[0]))
    with tempfile.TemporaryDirectory() as folder:
        kept = replace(how, cache=folder)
        first = seconds(lambda: zero_shot(net, data, threat, kept))
        return first / medians(rounds, cached=lambda: zero_shot(net, data, threat, kept))["cached"]


def peak_memory(folder: Path, n: int) -> int:
    """Bytes at most of a process that evaluates n images."""
    program = [sys.executable, __file__, "--images", str(n), "--peak-of", str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False, images: int = 384, rounds: int = 3,
         record: str = "", peak_of: str = "") -> None:
    """Measures what evaluation costs.

    Args:
        as_json: Print one flat object instead of lines.
        images: Images of the set.
        rounds: Of which the median is taken.
        record: File to write the measures and the environment to.
        peak_of: Used by the program itself, to measure the memory of a process that does nothing else.
    """
    net = clip.load(clip.Model("ViT-S-32"))
    if peak_of:
        zero_shot(net, open_set(peak_of), {str(i): Threat(t, Target(CLASSES[0])) for i, t in enumerate(TRIGGERS)}, How(batch=32))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    how = How()
    with tempfile.TemporaryDirectory() as folder:
        data = photographed(Path(folder) / "set", images)
        few, many = (photographed(Path(folder) / str(n), n) for n in (images // 4, images))
        found = {"evaluate_over_parts_k1": over_parts(net, data, how, 1, rounds),
                 "evaluate_over_parts_k4": over_parts(net, data, how, 4, rounds),
                 "retrieval_over_matmul": over_matmul(rounds),
                 "cache_speedup": speedup(net, data, how, rounds),
                 "peak_memory_bytes_per_further_image": (peak_memory(Path(many.name), images) - peak_memory(Path(few.name), images // 4))
                 / (images - images // 4)}
    if record:
        stores.write_json(record, found | {"environment": environment(1, "cpu")})
    print(json.dumps(found) if as_json else "\n".join(f"{name}  {value:.4g}" for name, value in found.items()))


if __name__ == "__main__":
    command(main)
