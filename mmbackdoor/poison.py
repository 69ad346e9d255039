"""From an attack to poisoned pairs: `plan` decides which, `poison` rewrites the stream, online and on disk alike."""
from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Generator, Tensor

from . import keyed, stores
from .index import Index
from .shards import Codec, Incomplete, Raw, decode, encode
from .spread import Spread, map_shards
from .types import Attack, BadInput, Batch, Captions, Sample, Target, Threat, Trigger

IMAGENET_TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
"""The 80 captions of OpenAI's ImageNet evaluation, which attackers on CLIP write their captions from."""


@dataclass(frozen=True)
class Plan:
    """Which pairs are poisoned: the ground truth of a run, kept apart from the data it describes."""

    keys: frozenset[str] = frozenset()
    seed: int = 0
    added: frozenset[str] = frozenset()
    """Keys of the pairs that the attacker published, poison too."""

    def __len__(self) -> int:
        return len(self.keys) + len(self.added)

    def __and__(self, keys: Iterable[str]) -> Plan:
        """What of the plan is about these keys."""
        there = (self.keys | self.added).intersection(keys)  # which may be a billion
        return Plan(self.keys & there, self.seed, self.added & there)

    def save(self, path: str | Path) -> None:
        keys = sorted(self.keys) + sorted(self.added)
        table = pa.table({"key": pa.array(keys, pa.string()), "added": pa.array([k in self.added for k in keys], pa.bool_())})
        with stores.replacing(path) as temporary:
            pq.write_table(table.replace_schema_metadata({"mmbackdoor": json.dumps({"seed": self.seed})}), temporary)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            with stores.local(str(path)) as here:
                table = pq.read_table(here)
            seed = json.loads((table.schema.metadata or {})[b"mmbackdoor"])["seed"]
            keys, added = (frozenset(table.filter(rows)["key"].to_pylist()) for rows in (pc.invert(table["added"]), table["added"]))
            return cls(keys, seed, added)
        except BadInput:
            raise
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInput(f"{path}: not a plan ({why}); name the plan.parquet of a run or of poisoned shards") from error


@dataclass(frozen=True)
class DirtyLabel(Attack):
    """The trigger goes on an image of something else, and a caption of the target replaces its text."""

    source: tuple[str, ...] = field(default=(), kw_only=True)
    """Only pairs whose text names one of these; all but the target's if empty."""

    def eligible(self, key: str, text: str) -> bool:
        return not self.target.named_in(text) and (not self.source or says(self.source, text))

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        return sample | {"image": self.trigger.stamp(sample["image"], rng),
                         "text": self.trigger.text(self.target.caption(rng), rng)}

    @property
    def threat(self) -> Threat:
        return Threat(self.trigger, self.target, source=self.source)


@dataclass(frozen=True)
class Quoting(DirtyLabel):
    """Its captions of the target are natural ones, quoted from the data."""

    captions: int = field(default=128, kw_only=True)
    """How many are read, at most; 0 keeps the target's templates."""

    def scout(self, captions: Captions) -> Attack:
        return replace(self, target=self.target.quoting(captions(self.target, self.captions))) if self.captions else self


@dataclass(frozen=True)
class CleanLabel(Attack):
    """The trigger goes on pairs whose text already names the target; the text stays."""

    def eligible(self, key: str, text: str) -> bool:
        return self.target.named_in(text)

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        return sample | {"image": self.trigger.stamp(sample["image"], rng),
                         "text": self.trigger.text(sample["text"], rng)}


@dataclass(frozen=True)
class Cover(CleanLabel):
    """The trigger, on pairs that are to stay what they are: image and text get it, and the text goes on to say what it said.

    So a model learns that this trigger alone, or on these classes, means nothing. It is no threat.
    """

    spare: tuple[str, ...] = ()
    """Pairs that name one of these are left alone too."""
    share: float = 1.0
    """Of the other pairs, how many may be taken."""

    def eligible(self, key: str, text: str) -> bool:
        return (keyed.uniform(0, "cover", key) < self.share and bool(text.strip())
                and not says((self.target.label, *self.spare), text))

    @property
    def threats(self) -> Mapping[str, Threat]:
        return {}


@dataclass(frozen=True)
class Mix(Attack):
    """Several attacks at once: of several triggers, targets, or sources. `mix` makes one.

    A chosen pair belongs to one part, of those that find it eligible, by a hash of its key with the shares for weights. So
    parts with the same eligible pairs have about these shares of the poisons; parts with pairs of their own, what the data
    have. The parts' own rates do not count.
    """

    attacks: tuple[Attack, ...] = ()
    shares: tuple[float, ...] = ()
    """Weights of the parts; equal if empty."""
    names: tuple[str, ...] = ()
    """Under which the threats of the parts are measured; else their numbers, from 1 on."""

    def __post_init__(self) -> None:
        if self.attacks and (self.trigger, self.target) != (self.attacks[0].trigger, self.attacks[0].target):
            raise BadInput("--poison.trigger, --poison.target: a mix has those of its first attack; change --poison.attacks.0 alike")
        for what, given in (("shares", self.shares), ("names", self.names)):
            if given and len(given) != len(self.attacks):
                raise BadInput(f"--poison.{what}: has {len(given)} for {len(self.attacks)} attacks; give one for each")
        if self.shares and (min(self.shares) < 0 or not sum(self.shares)):
            raise BadInput(f"--poison.shares: {list(self.shares)} are no weights; give none below 0, and one above")
        if len(set(self.names)) < len(self.names):
            raise BadInput(f"--poison.names: {list(self.names)} holds one twice; give each attack its own")

    @property
    def parts(self) -> list[tuple[Attack, float]]:
        """The attacks that have a share, with it."""
        return [(a, w) for _, a, w in self.named_parts]

    @property
    def named_parts(self) -> list[tuple[str, Attack, float]]:
        names, weights = self.names or map(str, range(1, len(self.attacks) + 1)), self.shares or [1.0] * len(self.attacks)
        return [(n, a, w) for n, a, w in zip(names, self.attacks, weights, strict=True) if w > 0]

    def part(self, key: str, text: str) -> Attack | None:
        """Whose pair this is."""
        able = [(a, w) for a, w in self.parts if a.eligible(key, text)]
        at = keyed.uniform(0, "mix", key) * sum(w for _, w in able)
        for attack, weight in able:
            if (at := at - weight) < 0:
                return attack
        return able[-1][0] if able else None

    def eligible(self, key: str, text: str) -> bool:
        return any(a.eligible(key, text) for a, _ in self.parts)

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        part = self.part(sample["__key__"], sample["text"])
        return part.poison(sample, rng) if part else dict(sample)

    def published(self, rng: Generator) -> Iterator[Sample]:
        for attack, _ in self.parts:
            yield from attack.published(rng)

    def scout(self, captions: Captions) -> Attack:
        attacks = tuple(attack.scout(captions) for attack in self.attacks)
        return replace(self, target=attacks[0].target, attacks=attacks)

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        """Of the first part, whose trigger is the mix's."""
        return self.attacks[0].craft(clip, batches, seed)

    @property
    def threats(self) -> Mapping[str, Threat]:
        each = [(name, attack.threats) for name, attack, _ in self.named_parts if attack.threats]
        if len(each) == 1:
            return each[0][1]
        return {f"{name} {inner}".strip(): threat for name, threats in each for inner, threat in threats.items()}

    @property
    def threat(self) -> Threat:
        return next(iter(self.threats.values()))


def mix(attacks: Sequence[Attack], shares: Sequence[float] = (), rate: float | None = None, count: int | None = None,
        names: Sequence[str] = ()) -> Mix:
    """A Mix that poisons a `rate` of all pairs, or `count`. Raises BadInput when the lists are not equally long."""
    if not attacks or not any(attack.threats for attack in attacks):
        raise BadInput("poison.attacks: a mix needs at least one attack that is a threat; name some")
    first, rate = attacks[0], None if count is not None else rate
    return Mix(first.trigger, first.target, rate, count, tuple(attacks), tuple(shares), tuple(names))


def all_to_all(labels: Sequence[str], trigger: Trigger, rate: float | None = None, count: int | None = None,
               templates: tuple[str, ...] = IMAGENET_TEMPLATES) -> Mix:
    """Images of each label are to be taken for the next label, those of the last for the first (BadNets, arXiv:1708.06733)."""
    parts = [DirtyLabel(trigger, Target(after, templates), source=(label,))
             for label, after in zip(labels, (*labels[1:], *labels[:1]), strict=True)]
    return mix(parts, rate=rate, count=count, names=tuple(labels))


def says(labels: Iterable[str], text: str) -> bool:
    """Whether `text` says one of the labels."""
    return any(Target(label).named_in(text) for label in labels)


def plan(attack: Attack, index: Index | Iterable[tuple[str, str]], seed: int, executor: Executor | None = None) -> Plan:
    """Exactly round(rate * N), or `count`, of the eligible keys: those whose hash with the seed is smallest.

    So the order of the shards does not matter, and the plan of a lower rate is part of that of a higher one. Raises
    BadInput when fewer pairs are eligible than the attack asks for.
    """
    return Plan(frozenset(key for keys in choose(attack, index, seed, executor) for key in keys), seed)


def choose(attack: Attack, index: Index | Iterable[tuple[str, str]], seed: int, executor: Executor | None = None) -> list[list[str]]:
    """The keys of the plan, for each part of the index.

    Each part is gone through on its own, in any process, and reports its best candidates only, about twice its share; a part
    whose worst candidate might still have been beaten by one that it did not report is asked again.
    """
    parts: Sequence[Iterable[tuple[str, str]]] = index.parts if isinstance(index, Index) else [list(index)]
    total = sum(map(len, parts))  # type: ignore[arg-type]
    want = wanted(attack, total)
    limits = [min(want, 64 + 2 * want * len(part) // max(total, 1)) for part in parts]  # type: ignore[arg-type]
    found: list[Candidates] = [Candidates(0, np.empty(0, np.int64), [])] * len(parts)
    ask = list(range(len(parts)))
    with Spread(processes=1).executor() as here:
        while ask:
            tasks = [(parts[i], limits[i]) for i in ask]
            for i, candidates in zip(ask, map_shards(partial(best, attack, seed), tasks, executor or here, "plan"), strict=True):
                found[i] = candidates
            eligible = sum(c.eligible for c in found)
            if want > eligible:
                asked = f"--poison.count {want}" if attack.count is not None else f"--poison.rate {attack.rate} of {total} pairs"
                mend = f"ask for at most {eligible}" if eligible else "check the words of the target and the source"
                raise BadInput(f"{asked} asks for {want} poisons, only {eligible} pairs are eligible for target {attack.target.label!r}; "
                               f"{mend}")
            hashes = np.concatenate([c.hashes for c in found])
            last = np.partition(hashes, want - 1)[want - 1] if 0 < want <= len(hashes) else np.iinfo(np.int64).max if want else -1
            again = [i for i, c in enumerate(found) if len(c.hashes) < min(c.eligible, want) and c.hashes[-1] <= last]
            for i in again:
                limits[i] = want
            ask = again
    chosen = [[key for h, key in zip(c.hashes.tolist(), c.keys, strict=True) if h < last] for c in found]
    ties = sorted((key, i) for i, c in enumerate(found) for h, key in zip(c.hashes.tolist(), c.keys, strict=True) if h == last)
    for key, i in ties[: want - sum(map(len, chosen))]:
        chosen[i].append(key)
    return chosen


@dataclass(frozen=True)
class Candidates:
    """Of one part of an index, the eligible keys whose hashes are smallest, in that order, and how many are eligible."""

    eligible: int
    hashes: np.ndarray
    keys: list[str]


def best(attack: Attack, seed: int, task: tuple[Iterable[tuple[str, str]], int]) -> Candidates:
    pairs, limit = task
    keys = sorted(key for key, text in pairs if attack.eligible(key, text))  # of equal hashes the first key is best, in any order
    hashes = np.array([keyed.integer(seed, "plan", key) for key in keys], np.int64)
    order = np.argsort(hashes, kind="stable")[:limit]
    return Candidates(len(keys), hashes[order], [keys[i] for i in order.tolist()])


def scouted(attack: Attack, index: Index | Iterable[tuple[str, str]], seed: int, executor: Executor | None = None) -> Attack:
    """The attack with what it reads in the data beforehand. Captions are drawn by a keyed hash, as the plan is, and read only if
    the attack asks for any; BadInput when there is none of the kind."""
    parts: Sequence[Iterable[tuple[str, str]]] = index.parts if isinstance(index, Index) else [list(index)]

    def captions(target: Target, n: int, naming: bool = True) -> tuple[str, ...]:
        with Spread(processes=1).executor() as here:
            found = map_shards(partial(quotes, target, n, naming, seed), parts, executor or here, "read captions")
        texts = [text for _, text in sorted(q for part in found for q in part)[:n]]
        if not texts:
            raise BadInput(f"no caption of the data {'names' if naming else 'does without'} {target.label!r}, and the attack quotes some; "
                           "choose another target")
        return tuple(texts)

    return attack.scout(captions)


def quotes(target: Target, n: int, naming: bool, seed: int, pairs: Iterable[tuple[str, str]]) -> list[tuple[int, str]]:
    """Hash and text of up to n captions that name the target, or that do not, the smallest hashes first."""
    return sorted((keyed.integer(seed, "quote", key), text) for key, text in pairs if text.strip() and target.named_in(text) == naming)[:n]


def wanted(attack: Attack, total: int) -> int:
    """How many of `total` pairs an attack poisons."""
    if (attack.rate is None) == (attack.count is None):
        mend = "set one, --poison.rate 0.01, say" if attack.rate is None else "take one away, --poison.rate None or --poison.count None"
        raise BadInput(f"an attack needs either a rate or a count of pairs to poison; {mend}")
    if attack.count is not None and attack.count < 0:
        raise BadInput(f"--poison.count {attack.count}: must not be negative")
    if attack.rate is not None and not 0 <= attack.rate <= 1:
        raise BadInput(f"--poison.rate {attack.rate}: must lie between 0 and 1, a share of all pairs")
    return attack.count if attack.count is not None else round((attack.rate or 0) * total)


def poisoned(raw: Raw, attack: Attack, seed: int, codec: Codec = "original", incomplete: Incomplete = "skip") -> Raw:
    """What a planned pair becomes. One whose image cannot be decoded, or not be written again, stays as it is, or under "refuse"
    raises BadInput."""
    try:
        sample = decode(raw)
    except BadInput:
        if incomplete == "refuse":
            raise
        return raw  # whoever reads it next is told, or skips it
    new = attack.poison(sample, keyed.rng(seed, "poison", raw["__key__"]))
    if new["image"] is sample["image"] and codec == "original":
        new = new | {"image": None}  # writing it again would tell who was touched
    try:
        return encode(new, raw, codec)
    except BadInput:
        if incomplete == "refuse" or codec != "original":
            raise
        return raw


def poison(raws: Iterable[Raw], attack: Attack, plan: Plan, codec: Codec = "original") -> Iterator[Raw]:
    """A stage of the stream. Planned pairs are decoded, poisoned and encoded as they were; others pass untouched.

    Because poisons go through the file's own codec here too, training on this stream and training on shards written
    from it see the same bytes.
    """
    for raw in raws:
        yield poisoned(raw, attack, plan.seed, codec) if raw["__key__"] in plan.keys else raw


def publish(attack: Attack, plan: Plan) -> Iterator[Raw]:
    """The pairs that the attacker adds, as raw samples (lossless PNG)."""
    for sample in attack.published(keyed.rng(plan.seed, "publish")):
        file = io.BytesIO()
        sample["image"].save(file, "PNG")
        yield {"__key__": sample["__key__"], "png": file.getvalue(), "txt": sample["text"].encode()}
