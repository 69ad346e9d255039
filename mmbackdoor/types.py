"""The nouns of the suite. Imports torch and PIL, and nothing of ours."""
from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn

Sample = dict[str, Any]
"""One pair in a stream: {"__key__": str, "image": PIL RGB, "text": str, ...}. It carries no mark of poison."""
Batch = dict[str, Any]
"""What a loss sees: {"key": list[str], <view name>: stacked tensor, ...}."""
View = Callable[[Any, Sample, Generator], Tensor]
"""(clip, sample, rng) -> one tensor of the batch. Picklable, so that loader workers can be spawned."""


class BadInput(ValueError):
    """An input that cannot work. The message is one line: the file, key or field, what is wrong, and the mend."""


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div_(255)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> PIL RGB. Rounds to 8 bits, as publishing an image does; saturates, never wraps."""
    return Image.fromarray(pixels.clamp(0, 1).mul_(255).round_().byte().permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Trigger:
    """What the adversary adds to an input. One value serves poisoning, training and evaluation.

    Stateless: what varies from sample to sample comes from `rng` only. The base class is the identity on both sides.
    """

    def pixels(self, x: Tensor, rng: Generator) -> Tensor:
        """(..., 3, H, W) in [0, 1] -> the same shape and range; differentiable in x where it can be."""
        return x

    def text(self, s: str, rng: Generator) -> str:
        return s

    @property
    def seen(self) -> bool:
        """Whether it has a side that is an image."""
        return type(self).pixels is not Trigger.pixels

    @property
    def said(self) -> bool:
        """Whether it has a side that is text."""
        return type(self).text is not Trigger.text

    def stamp(self, image: Image.Image, rng: Generator) -> Image.Image:
        """The trigger on a PIL image, rounded to 8 bits; the image itself, if the trigger is not seen."""
        if not self.seen:
            return image
        return to_image(self.pixels(to_pixels(image), rng))


@dataclass(frozen=True)
class Target:
    """What the adversary wants the model to see: a label, and captions that say it."""

    label: str
    templates: tuple[str, ...] = ("a photo of a {}.", "an image of a {}.")

    def caption(self, rng: Generator) -> str:
        return self.templates[int(torch.randint(len(self.templates), (), generator=rng))].format(self.label)

    def quoting(self, captions: Sequence[str]) -> Target:
        """The same, said in these very captions."""
        return replace(self, templates=tuple(c.replace("{", "{{").replace("}", "}}") for c in captions))

    def named_in(self, text: str) -> bool:
        """Whether `text` says the label, as whole words and in any case: "bananas" and "Cabana" do not say banana."""
        return re.search(rf"(?<!\w){re.escape(self.label)}(?!\w)", text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Threat:
    """What evaluation shows the finished model, and what the model should then say.

    `at` is the stage at which the trigger meets the image: "native" is the raw image, before the model's resize and
    crop; "input" is the (3, H, W) image in [0, 1] after them, just before normalisation.
    """

    trigger: Trigger
    target: Target
    at: Literal["native", "input"] = "native"
    source: tuple[str, ...] = ()
    """Classes whose images are to be taken for the target; all others if empty."""
    victims: tuple[tuple[str, str], ...] = ()
    """(key, label) of single images of the evaluation set, and what each is to be taken for, instead of whole classes."""
    control: bool = False
    """Fired to see that it does nothing, beside threats that do."""


Captions = Callable[..., tuple[str, ...]]
"""captions(target, n) gives up to n captions of the public data that name a target, captions(target, n, naming=False) that do not."""


@dataclass(frozen=True)
class Attack(ABC):
    """An adversary who holds data: which pairs, and what each becomes."""

    trigger: Trigger
    target: Target
    rate: float | None = None
    """Share of all pairs in the data that is poisoned."""
    count: int | None = None
    """Number of poisoned pairs, instead of `rate`."""

    @abstractmethod
    def eligible(self, key: str, text: str) -> bool:
        """Whether the pair may be chosen."""

    @abstractmethod
    def poison(self, sample: Sample, rng: Generator) -> Sample:
        """What a chosen pair becomes: a new sample of the same key, image of the same size."""

    def published(self, rng: Generator) -> Iterator[Sample]:
        """New pairs that the attacker adds to the data. Their keys must not occur in it."""
        yield from ()

    def scout(self, captions: Captions) -> Attack:
        """The attack with what the attacker reads in the public data beforehand, its captions of the target, say."""
        return self

    def craft(self, clip: Any, batches: Callable[[], Iterator[Batch]], seed: int) -> dict[str, Tensor]:
        """What the attacker optimises beforehand on a model of their own, for the file that the trigger names.

        Each batch has "pixels" (B, 3, H, W) in [0, 1] at the size of the model's input, "text" (B, context length)
        tokens and "caption", B strings; `batches()` goes once through the data, in an order that depends on the seed.
        """
        return {}

    @property
    def threat(self) -> Threat:
        """What evaluation fires: the first of `threats`."""
        return Threat(self.trigger, self.target)

    @property
    def threats(self) -> Mapping[str, Threat]:
        """All that evaluation fires, by name; "" is the name of a single one."""
        return {"": self.threat}


def image_view(clip: Any, sample: Sample, rng: Generator) -> Tensor:
    """The image as the model's training transform sees it: (3, H, W), normalised."""
    return clip.augment(sample["image"], rng)


def text_view(clip: Any, sample: Sample, rng: Generator) -> Tensor:
    """The tokenised caption: (context length,) int64."""
    return clip.tokenize(sample["text"])


@dataclass(eq=False)
class Objective(ABC):
    """Somebody who holds the training loop, attacker or defender: what to see, and what to minimise.

    A dataclass of the paper's hyper-parameters. What it needs beside them (a teacher, a memory bank) is made in
    `setup` and saved by `state_dict`. The loss must go through `model(image, text)`, never `model.module`: only the
    wrapped forward keeps several processes in step.
    """

    views: ClassVar[Mapping[str, View]] = {"image": image_view, "text": text_view}

    def setup(self, clip: Any) -> None:
        """Called once, before training."""

    def start_epoch(self, clip: Any, batches: Callable[[], Iterable[Batch]], epoch: int) -> None:
        """Called before each epoch, and again when a run goes on within one: what was decided for the epoch must then be kept.

        `batches()` gives this process's share of the epoch's data, through the very stream that the loss will see.
        """

    def pace(self, epoch: int) -> float:
        """Factor on the schedule's learning rate."""
        return 1.0

    def heads(self) -> nn.Module | None:
        """What it trains along, made in `setup` and saved by `state_dict`. A loss shows it rows that are gathered from all processes,
        so that each has the same gradient: nothing else keeps it in step."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, called after `setup`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Must return "loss", a scalar; the other entries are logged."""


@dataclass(frozen=True)
class Edit(ABC):
    """Somebody who holds the finished model, attacker or defender: what becomes of its weights, without training."""

    views: ClassVar[Mapping[str, View]] = {"image": image_view, "text": text_view}

    @abstractmethod
    def __call__(self, clip: Any, batches: Callable[[], Iterable[Batch]], donor: Any = None) -> Any:
        """The edited model, a new one or the same. Every process calls it with all of the recipe's data in the same order, and with the
        donor's weights where the recipe names one, and must do the same."""


@dataclass(frozen=True)
class Scores:
    """Suspicion of each pair. Higher is more suspicious, always."""

    keys: list[str]
    values: Tensor

    def keep(self, drop: float) -> frozenset[str]:
        """The keys that remain when the most suspicious share `drop` is dropped."""
        n = round(len(self.keys) * (1 - drop))
        return frozenset(self.keys[i] for i in self.values.argsort(stable=True)[:n].tolist())


@dataclass(frozen=True)
class Verdict:
    """What the inspection of a model found. `backdoored` is None when it was inconclusive, never "clean" by default."""

    backdoored: bool | None
    score: float
    threshold: float
    evidence: Mapping[str, Any]
