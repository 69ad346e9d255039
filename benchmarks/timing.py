"""What the benchmarks share: photographs to work on, and works that take turns at the clock."""
from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from tqdm import tqdm


def photographs(n: int, noise: float = 6.5) -> list[bytes]:
    """JPEG files of 320 x 256 pixels and about 24 KB, smooth enough to compress as photographs do."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(256, size=(16, 20, 3), dtype=np.uint8)).resize((320, 256), Image.Resampling.BICUBIC)
        fine = np.asarray(coarse, np.int16) + rng.normal(0, noise, (256, 320, 1)).astype(np.int16)
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=85)
        found.append(file.getvalue())
    return found


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def medians(rounds: int, clock: Callable[[], float] = time.perf_counter, **works: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each work, by this clock; they take turns, so that a busy moment strikes all."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(rounds), desc=" ".join(works), unit="round", disable=None, leave=False):
        for name, work in works.items():
            times[name].append(seconds(work, clock))
    return {name: statistics.median(t) for name, t in times.items()}
