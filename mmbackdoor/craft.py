"""Triggers that are optimised beforehand, on a model of the attacker's: the data that they see, the steps, and the file they leave.

An attack that crafts has a trigger that names a .safetensors file, and `Attack.craft`, which gives the tensors in it. The functions
that papers share are here: a bounded store of public pairs, steps in random order, crops that gradients go through, and the
pull towards captions of the target.
"""
from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor
from tqdm import tqdm
from webdataset.filters import _shuffle as shuffled

from . import keyed
from .clip import CLIP
from .index import Index
from .shards import Raw, decode, parts, read_pairs
from .stores import replacing
from .triggers import picture, tensors
from .types import Attack, BadInput, Batch, Sample, Target, to_pixels

HEADER = "mmbackdoor"
"""The one entry of the file's metadata: safetensors would write several in any order."""
HELD = 2048
"""Undecoded pairs that are held for shuffling."""


def crafted(attack: Attack) -> str:
    """The file that the attack's trigger is crafted into: the first .safetensors that it or a part of it names; "" for none."""
    return next(names(attack.trigger), "")


def names(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.endswith(".safetensors"):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from names(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from names(getattr(value, field.name))


def craft(attack: Attack, clip: CLIP, index: Index, seed: int, identity: Mapping[str, str], size: int = 64) -> str:
    """Lets the attack optimise its trigger on `clip`, where the model is, and writes the file that the trigger names, unless it is
    there. The same seed gives the same file on a CPU.

    `identity` tells what the file is made from and goes into it. Raises BadInput as `check` does when another file is there.
    """
    file = crafted(attack)
    if not file:
        raise BadInput(f"{type(attack).__name__}: its trigger names no .safetensors file, so there is nothing to craft; name one in it")
    if os.path.exists(file):
        check(file, identity)
        return file
    with frozen(clip):
        found = attack.craft(clip, batches(clip, index, size, seed, attack.target), seed)
    if not found:
        raise BadInput(f"{file}: {type(attack).__name__} crafts no trigger; name a file that is there, or an attack that does")
    if bad := [name for name, x in found.items() if not torch.isfinite(x).all()]:
        raise BadInput(f"{file}: crafting gave numbers that are not finite in {', '.join(bad)}; lower --poison.lr")
    told = {HEADER: json.dumps(dict(identity), sort_keys=True)}
    with replacing(file) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in found.items()}, temporary, told)
    tensors.cache_clear()
    picture.cache_clear()
    return file


def check(file: str, identity: Mapping[str, str]) -> None:
    """Raises BadInput unless the file was made from just this."""
    try:
        with safe_open(file, "pt") as opened:
            said = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as a crafted trigger ({error}); remove it") from error
    if said != dict(identity):
        other = ", ".join(sorted(k for k in said.keys() | identity.keys() if said.get(k) != identity.get(k)))
        raise BadInput(f"{file}: was crafted by another recipe (other {other}); remove it or name another file in the trigger")


@contextmanager
def frozen(clip: CLIP) -> Iterator[None]:
    """The network in evaluation mode and its parameters without gradients; afterwards as it was."""
    modes = [(m, m.training) for m in clip.net.modules()]
    wanted = [(p, p.requires_grad) for p in clip.net.parameters()]
    clip.net.eval().requires_grad_(False)
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, grad in wanted:
            p.requires_grad_(grad)


# ---- the attacker's data


def batches(clip: CLIP, index: Index, size: int, seed: int, target: Target | None = None,
            first: int = 512) -> Callable[[], Iterator[Batch]]:
    """batches() goes once through the data: "pixels" (B, 3, H, W) in [0, 1] at the size of the model's input, "text" (B, context
    length) tokens, "caption" and "key", B strings. The order depends on the seed alone.

    Pairs that name `target` come first, up to `first` of them, because they are rare. Images that cannot be decoded are left out.
    """
    def batch(rows: list[Sample]) -> Batch:
        return {"pixels": torch.stack([to_pixels(clip.geometry(s["image"])) for s in rows]),
                "text": torch.stack([clip.tokenize(s["text"]) for s in rows]),
                "caption": [s["text"] for s in rows], "key": [s["__key__"] for s in rows]}

    def once() -> Iterator[Batch]:
        yield from map(batch, parts(decoded(ordered(index, seed, target, first)), size))

    return once


def ordered(index: Index, seed: int, target: Target | None, first: int) -> Iterator[Raw]:
    """The raw pairs, shard by shard in a random order, those that name the target before the others."""
    shards = [index.parts[i] for i in keyed.permutation(len(index.parts), seed, "craft")]
    early: set[str] = set()
    if target is not None:
        for part in shards:
            named = sorted((key for key, text in part if target.named_in(text)), key=lambda key: keyed.integer(seed, "craft", key))
            early.update(some := named[: first - len(early)])
            yield from part.raws(some) if some else ()
            if len(early) == first:
                break
    rest = (raw for part in shards for raw in read_pairs(part.shard) if raw["__key__"] not in early)
    yield from shuffled(rest, HELD, HELD, rng=random.Random(keyed.integer(seed, "craft")))


def decoded(raws: Iterable[Raw]) -> Iterator[Sample]:
    for raw in raws:
        try:
            yield decode(raw)
        except BadInput:
            continue


@dataclass(frozen=True, eq=False)
class Public:
    """Public pairs in memory, images as 8-bit numbers at the size of the model's input, which lie on its device when they are used."""

    images: Tensor
    """(N, 3, H, W), of anything but the target."""
    text: Tensor
    """(N, context length) tokens of their captions."""
    named: Tensor
    """(M, 3, H, W), images whose captions name the target."""


def gather(batches: Callable[[], Iterator[Batch]], target: Target, images: int, named: int = 0) -> Public:
    """Up to `images` pairs that do not name the target, and up to `named` images of those that do. BadInput where there are none."""
    if images < 1:
        raise BadInput(f"--poison.images {images}: a trigger is crafted on some; give 1 or more")
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    limits = {True: named, False: images}
    for batch in batches():
        for x, text, caption in zip(to_bytes(batch["pixels"]), batch["text"], batch["caption"], strict=True):
            if len(mine := found[target.named_in(caption)]) < limits[target.named_in(caption)]:
                mine.append((x, text))
        if len(found[False]) >= images:
            break
    if not found[False] or (named and not found[True]):
        lacking = "does without" if not found[False] else "names"
        raise BadInput(f"no pair of the data {lacking} {target.label!r}, and the attack is crafted on some; choose another target")
    pixels, text = map(torch.stack, zip(*found[False], strict=True))
    return Public(pixels, text, torch.stack([x for x, _ in found[True]]) if found[True] else pixels[:0])


def to_bytes(x: Tensor) -> Tensor:
    return x.mul(255).round_().byte()


def to_floats(x: Tensor, clip: CLIP) -> Tensor:
    """8-bit images as numbers in [0, 1], on the model's device."""
    return x.to(clip.device).float().div_(255)


# ---- what papers share


def steps(n: int, size: int, epochs: int, rng: Generator, what: str = "craft") -> Iterator[Tensor]:
    """Rows of each step: `epochs` times through n of them in a random order, `size` at a time, the rest left out. Shows progress."""
    size = min(size, n)
    if min(size, epochs) < 1:
        raise BadInput(f"--poison.batch {size}, --poison.epochs {epochs}: nothing would be crafted; give at least 1 of each")
    with tqdm(total=epochs * (n // size), desc=what, unit="step", disable=None) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(n, generator=rng)[: n // size * size].split(size):
                yield rows
                bar.update()


def look(clip: CLIP, x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> features (B, D) of unit norm."""
    return clip.image_features(clip.normalise(x))


@torch.no_grad()
def seen(clip: CLIP, images: Tensor, size: int = 256) -> Tensor:
    """Features (N, D) of many 8-bit images, without gradients."""
    return torch.cat([look(clip, to_floats(x, clip)) for x in images.split(size)])


@torch.no_grad()
def read(clip: CLIP, tokens: Tensor, size: int = 256) -> Tensor:
    """Features (N, D) of many captions' tokens (N, context length), without gradients."""
    return torch.cat([clip.net.encode_text(t.to(clip.device), normalize=True) for t in tokens.split(size)])  # type: ignore[operator]


def cropped(clip: CLIP, x: Tensor, share: float, rng: Generator) -> Tensor:
    """(B, 3, H, W), a `share` of the rows cropped and resized as the model's training transform would, with gradients."""
    h, w = x.shape[-2:]
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    for i in torch.nonzero(torch.rand(len(x), generator=rng) < share).flatten().tolist():
        left, top, right, bottom = clip.aug.box(w, h, rng)
        theta[i] = torch.tensor([[(right - left) / w, 0, (left + right) / w - 1], [0, (bottom - top) / h, (top + bottom) / h - 1]])
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def pull(clip: CLIP, z: Tensor, wanted: Tensor, others: Tensor) -> Tensor:
    """-mean log of the probability that image features z (B, D) choose `wanted` (B, D), row by row, before all of `others` (N, D),
    at the model's own temperature."""
    scale = clip.net.logit_scale.exp()  # type: ignore[operator, union-attr]
    logits = scale * torch.cat([(z * wanted).sum(1, keepdim=True), z @ others.T], 1)
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long, device=z.device))
