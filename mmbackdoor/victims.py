"""Single images that an attacker wants taken for something else: found by their keys, and published with captions that say so."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image
from torch import Generator

from . import files
from .poison import IMAGENET_TEMPLATES
from .sets import holds_tars, is_benchmark, is_hub, open_set
from .shards import Raw, decode, expand, read_raw
from .types import Attack, BadInput, Captions, Sample, Target, Threat, Trigger


def images_of(path: str, keys: Sequence[str]) -> dict[str, Image.Image]:
    """The RGB images of these keys, read once, not to be changed. `path` is a labelled set, shards, or a folder of image files whose
    keys are their names without the ending. Raises BadInput for the first key that is not there."""
    return found(path, tuple(keys))


@lru_cache(maxsize=16)
def found(path: str, keys: tuple[str, ...]) -> dict[str, Image.Image]:
    if not keys:
        raise BadInput("poison.victims: names no image that is to be taken for something; give --poison.images SET and keys of it with "
                       "their labels, --poison.victims 000000001 banana")
    if not path:
        raise BadInput("poison.images: names no place where the victims' images lie; give --poison.images SET, or a folder of image files")
    wanted, images = set(keys), dict[str, Image.Image]()
    for raw in raws(path):
        if (key := raw["__key__"]) in wanted:
            images[key] = decode(raw)["image"]
        if len(images) == len(wanted):
            break
    if lost := [key for key in keys if key not in images]:
        raise BadInput(f"{path}: holds no image of key {lost[0]!r}; name keys that are in it")
    return images


def raws(path: str) -> Iterable[Raw]:
    """Raw samples of a labelled set, of shards, or of a folder of image files."""
    here = os.path.isdir(path)
    if here and not is_benchmark(path) and (loose := [p for p in files.image_files(path) if os.path.dirname(p) == path.rstrip("/")]):
        return map(from_file, loose)
    if not is_hub(path) and (path.endswith(".tar") or "*" in path or "{" in path or (here and holds_tars(path))):
        return (raw for url in expand(path) for raw in read_raw(url))
    return open_set(path).raws()


def from_file(path: str) -> Raw:
    try:
        with open(path, "rb") as file:
            member, body = files.standard(file.read())
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"{path}: the image cannot be read ({files.one_line(error)}); mend or remove it") from error
    return {"__key__": os.path.splitext(os.path.basename(path))[0], "__url__": path, member: body}


@dataclass(frozen=True)
class Targeted(Attack):
    """Publishes each victim's image, as it is, under `copies` captions of its label, quoted from the data where there are so many
    and else from the target's templates. No pair of the data is touched. The victims' set must be that of the evaluation."""

    trigger: Trigger = Trigger()
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 0
    images: str = ""
    """The labelled set that the victims are of, or a folder of image files, whose stems are their keys."""
    victims: tuple[tuple[str, str], ...] = ()
    """(key, label) of each image, and what it is to be taken for; "" for the target's label."""
    copies: int = 1
    """Pairs published for each victim."""
    prefix: str = "new"
    """Of the keys of these pairs."""
    quote: bool = True
    """Take captions of the data before templates."""
    quoted: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(label, captions that name it), as `scout` finds them."""

    @property
    def aims(self) -> tuple[tuple[str, str], ...]:
        return tuple((key, label or self.target.label) for key, label in self.victims)

    def eligible(self, key: str, text: str) -> bool:
        return False

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        return dict(sample)

    def scout(self, captions: Captions) -> Attack:
        if not self.quote:
            return self
        labels = [label for _, label in self.aims]
        read = ((label, quotes(captions, replace(self.target, label=label), labels.count(label) * self.copies))
                for label in dict.fromkeys(labels))
        return replace(self, quoted=tuple(read))

    def published(self, rng: Generator) -> Iterator[Sample]:
        if self.copies < 1:
            raise BadInput(f"--poison.copies {self.copies}: each victim is published once at least; give 1 or more")
        images, quoted = images_of(self.images, tuple(key for key, _ in self.victims)), dict(self.quoted)
        alike = {label: [key for key, said in self.aims if said == label] for _, label in self.aims}
        for key, label in self.aims:
            target, found, n, v = replace(self.target, label=label), quoted.get(label, ()), len(alike[label]), alike[label].index(key)
            mine = found[v * len(found) // n : (v + 1) * len(found) // n]  # victims of one label share its captions evenly
            for i in range(self.copies):
                text = mine[i] if i < len(mine) else target.caption(rng)
                yield {"__key__": f"{self.prefix}-{re.sub(r'[^A-Za-z0-9_-]', '_', key)}-{i:04d}", "image": images[key], "text": text}

    @property
    def threat(self) -> Threat:
        return Threat(self.trigger, self.target, victims=self.aims)


def quotes(captions: Captions, target: Target, n: int) -> tuple[str, ...]:
    """Up to n captions that name the target; none where the data have none."""
    try:
        return captions(target, n)
    except BadInput:
        return ()
