"""Randomness as a function of (seed, names): the same on every worker, process, shard order and year. And hashes of values."""
from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def integer(seed: int, *names: str) -> int:
    """A 63-bit integer."""
    text = "\0".join((str(seed), *names)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def rng(seed: int, *names: str) -> torch.Generator:
    """A generator for draws inside a trigger, a caption or a view."""
    return torch.Generator().manual_seed(integer(seed, *names))


@contextmanager
def drawing_from(rng: torch.Generator) -> Iterator[None]:
    """What draws from torch's global generator, as torchvision and new layers do, draws in here from a seed of `rng`; no trace is left."""
    generator = torch.default_generator  # torch.manual_seed would queue a call for every GPU each time
    state = generator.get_state()
    try:
        generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        yield
    finally:
        generator.set_state(state)


def uniform(seed: int, *names: str) -> float:
    """In [0, 1)."""
    return integer(seed, *names) / 2**63


def permutation(n: int, seed: int, *names: str) -> list[int]:
    """A permutation of range(n)."""
    return torch.randperm(n, generator=rng(seed, *names)).tolist()


def digest(*values: Any) -> str:
    """A hash of what values are and do: fields, tensors, files that they name, and the source of their classes.

    "" for a value of which this cannot be told, such as one of a class typed at a prompt.
    """
    found = hashlib.blake2b(digest_size=12)
    try:
        for part in parts(values):
            found.update(len(part).to_bytes(8, "big") + part)
    except (OSError, TypeError):
        return ""
    return found.hexdigest()


def parts(value: Any) -> Iterator[bytes]:
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if isinstance(value, torch.Tensor):
        yield from parts(value.detach().cpu().numpy())
    elif isinstance(value, np.ndarray):
        yield from (str((value.dtype, value.shape)).encode(), np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value):
        for base in kind.__mro__[:-1]:
            yield inspect.getsource(inspect.getmodule(base) or base).encode()
        yield from parts({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        yield from parts(list(value.items()))
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for item in value:
            yield from parts(item)
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        yield repr(value).encode(errors="surrogateescape")
        if isinstance(value, str) and os.path.isfile(value):
            with open(value, "rb") as file:
                yield hashlib.blake2b(file.read()).digest()
    else:
        raise TypeError(f"{kind} has no value that could be hashed")
