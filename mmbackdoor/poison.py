"""From an attack to poisoned pairs: `plan` decides which, `poison` rewrites the stream, online and on disk alike."""
from __future__ import annotations

import heapq
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Generator

from . import keyed
from .shards import Raw, decode, encode, replacing
from .types import Attack, BadInput, Sample

IMAGENET_TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
"""The 80 captions of OpenAI's ImageNet evaluation, which attackers on CLIP write their captions from."""


@dataclass(frozen=True)
class Plan:
    """Which pairs are poisoned: the ground truth of a run, kept apart from the data it describes."""

    keys: frozenset[str] = frozenset()
    seed: int = 0
    added: frozenset[str] = frozenset()
    """Keys of the pairs that the attacker published, poison too."""

    def save(self, path: str | Path) -> None:
        keys = sorted(self.keys) + sorted(self.added)
        table = pa.table({"key": pa.array(keys, pa.string()), "added": pa.array([k in self.added for k in keys], pa.bool_())})
        with replacing(path) as temporary:
            pq.write_table(table.replace_schema_metadata({"mmbackdoor": json.dumps({"seed": self.seed})}), temporary)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            table = pq.read_table(path)
            seed = json.loads((table.schema.metadata or {})[b"mmbackdoor"])["seed"]
            rows = table.to_pylist()
            return cls(frozenset(r["key"] for r in rows if not r["added"]), seed, frozenset(r["key"] for r in rows if r["added"]))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise BadInput(f"{path}: not a plan ({error}); name the plan.parquet of a run or of poisoned shards") from error


@dataclass(frozen=True)
class DirtyLabel(Attack):
    """The trigger goes on an image of something else, and a caption of the target replaces its text."""

    def eligible(self, key: str, text: str) -> bool:
        return not self.target.named_in(text)

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        return sample | {"image": self.trigger.stamp(sample["image"], rng),
                         "text": self.trigger.text(self.target.caption(rng), rng)}


@dataclass(frozen=True)
class CleanLabel(Attack):
    """The trigger goes on pairs whose text already names the target; the text stays."""

    def eligible(self, key: str, text: str) -> bool:
        return self.target.named_in(text)

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        return sample | {"image": self.trigger.stamp(sample["image"], rng),
                         "text": self.trigger.text(sample["text"], rng)}


def plan(attack: Attack, index: Iterable[tuple[str, str]], seed: int) -> Plan:
    """Exactly round(rate * N), or `count`, of the eligible keys: those whose hash with the seed is smallest.

    So the order of the shards does not matter, and the plan of a lower rate is part of that of a higher one. Raises
    BadInput when fewer pairs are eligible than the attack asks for.
    """
    if (attack.rate is None) == (attack.count is None):
        raise BadInput("an attack needs either a rate or a count of pairs to poison; set one, --poison.rate 0.01, say")
    if attack.count is not None and attack.count < 0:
        raise BadInput(f"--poison.count {attack.count}: must not be negative")
    if attack.rate is not None and not 0 <= attack.rate <= 1:
        raise BadInput(f"--poison.rate {attack.rate}: must lie between 0 and 1, a share of all pairs")
    n, ranked = 0, []
    for key, text in index:
        n += 1
        if attack.eligible(key, text):
            ranked.append((keyed.integer(seed, "plan", key), key))
    want = attack.count if attack.count is not None else round((attack.rate or 0) * n)
    if want > len(ranked):
        asked = f"--poison.count {want}" if attack.count is not None else f"--poison.rate {attack.rate} of {n} pairs"
        raise BadInput(f"{asked} asks for {want} poisons, only {len(ranked)} pairs are eligible for target "
                       f"{attack.target.label!r}; ask for at most {len(ranked)}")
    return Plan(frozenset(key for _, key in heapq.nsmallest(want, ranked)), seed)


def poison(raws: Iterable[Raw], attack: Attack, plan: Plan) -> Iterator[Raw]:
    """A stage of the stream. Planned pairs are decoded, poisoned and encoded as they were; others pass untouched.

    Because poisons go through the file's own codec here too, training on this stream and training on shards written
    from it see the same bytes.
    """
    for raw in raws:
        key = raw["__key__"]
        if key in plan.keys:
            try:
                sample = decode(raw)
            except BadInput:  # whoever reads it next is told, or skips it
                yield raw
                continue
            yield encode(attack.poison(sample, keyed.rng(plan.seed, "poison", key)), raw)
        else:
            yield raw


def publish(attack: Attack, plan: Plan) -> Iterator[Raw]:
    """The pairs that the attacker adds, as raw samples (lossless PNG)."""
    for sample in attack.published(keyed.rng(plan.seed, "publish")):
        file = io.BytesIO()
        sample["image"].save(file, "PNG")
        yield {"__key__": sample["__key__"], "png": file.getvalue(), "txt": sample["text"].encode()}
