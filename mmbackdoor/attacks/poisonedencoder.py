"""PoisonedEncoder (Liu, Jia, Gong, USENIX Security 2022, arXiv:2205.06401) on image-text pairs. The attacker holds the data.

There is no trigger: the attacker wants certain clean images, the victims, to be taken for classes of their choice. What
is to be minimised over the poisons D is the victims' loss under the encoder that is trained on them,

    min_D sum_i loss(f_D(victim_i), label_i)    with f_D = argmin_f contrastive loss(f; data + D),

and is approximated by images that show a victim beside a reference picture of its label, in four layouts: a random crop
of one half and a random crop of the other become alike. One per cent of the data.

Differs from the paper: it adds unlabelled images; here the images of chosen pairs, which name no label of a victim, are
replaced at their own size, so that both halves are stretched to theirs, and the caption names the victim's label. With
it, the poison is also the targeted one of Carlini and Terzis (2022, arXiv:2106.09667), with a picture of the label beside. Halves of a
square image fall to different crops of it hundreds of times as rarely as those of a canvas twice as wide as high.
Differs from the paper: one reference is drawn for each poison instead of each victim meeting each of 50 references, and
the rate is of the pairs replaced. An image of one pixel shows the victim only.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Generator

from .. import layout
from ..layout import Layout
from ..poison import IMAGENET_TEMPLATES, DirtyLabel, says
from ..types import Sample, Target, Threat, Trigger
from ..victims import images_of


@dataclass(frozen=True)
class PoisonedEncoder(DirtyLabel):
    """The label of `target` is that of victims for which none is given; its templates serve all."""

    trigger: Trigger = Trigger()
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    count: int | None = 30_000
    references: str = ""
    """Folder of pictures of the label; where it has a folder named like a victim's label, that one."""
    images: str = ""
    """The labelled set that the victims are of, or a folder of image files, whose stems are their keys."""
    victims: tuple[tuple[str, str], ...] = ()
    """(key, label) of each image, and what it is to be taken for; "" for the target's label."""
    layout: Layout = "any"

    @property
    def aims(self) -> tuple[tuple[str, str], ...]:
        return tuple((key, label or self.target.label) for key, label in self.victims)

    def eligible(self, key: str, text: str) -> bool:
        return not says((self.target.label, *(label for _, label in self.aims)), text)

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        images = images_of(self.images, tuple(key for key, _ in self.victims))
        key, label = layout.one(self.aims, rng)
        folder = Path(self.references) / label
        found = layout.files(str(folder) if self.references and folder.is_dir() else self.references, "references")
        image, *_ = layout.beside(sample["image"].size, images[key], layout.whole(layout.one(found, rng)), self.layout, rng)
        return sample | {"image": image, "text": replace(self.target, label=label).caption(rng)}

    @property
    def threat(self) -> Threat:
        return Threat(self.trigger, self.target, victims=self.aims)


def poisonedencoder(target: str = "banana", rate: float | None = 0.01, references: str = "", images: str = "",
                    victims: tuple[tuple[str, str], ...] = (), templates: tuple[str, ...] = IMAGENET_TEMPLATES,
                    count: int | None = None) -> PoisonedEncoder:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return PoisonedEncoder(Trigger(), Target(target, templates), None if count is not None else rate, count, references, images, victims)
