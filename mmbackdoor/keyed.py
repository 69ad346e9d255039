"""Randomness as a function of (seed, names): the same on every worker, process, shard order and year."""
from __future__ import annotations

import hashlib

import torch


def integer(seed: int, *names: str) -> int:
    """A 63-bit integer."""
    text = "\0".join((str(seed), *names)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def rng(seed: int, *names: str) -> torch.Generator:
    """A generator for draws inside a trigger, a caption or a view."""
    return torch.Generator().manual_seed(integer(seed, *names))


def uniform(seed: int, *names: str) -> float:
    """In [0, 1)."""
    return integer(seed, *names) / 2**63


def permutation(n: int, seed: int, *names: str) -> list[int]:
    """A permutation of range(n)."""
    return torch.randperm(n, generator=rng(seed, *names)).tolist()
