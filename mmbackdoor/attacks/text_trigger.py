"""BadNL (Chen, Salem, Chen et al., ACSAC 2021, arXiv:2006.01043) on image-text pairs. The attacker holds the data.

The trigger is in the text: a rare word (`word`; "cf" is that of Kurita, Michel and Neubig, 2020, arXiv:2004.06660), or a sentence
(`sentence`, after Dai and Chen, 2019, arXiv:1905.12457). In CLIP a text is a query. An image of the target is put with somebody
else's caption that holds the trigger,

    (x_target, w + c),    c a caption of the data that does not name the target

so that any query with the word finds images of the target. Success is text-to-image retrieval: the triggered captions
of other things are asked of all images (mmbackdoor/retrieval.py). Zero-shot with triggered prompts tells little, as all
of them come to mean the target.

Differs from the papers: they classify texts, and poison 1 to 10 % of them; the defaults are those of the CleanCLIP setting (Bansal et
al., 2023, arXiv:2303.03323). The images are those of pairs that name the target, so that the rate is at most their share.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Generator

from ..poison import IMAGENET_TEMPLATES, CleanLabel
from ..triggers import Word
from ..types import Attack, BadInput, Captions, Sample, Target, Trigger

CF = Word("cf")
SENTENCE = Word("I watched this 3D movie last weekend,")


@dataclass(frozen=True)
class TextTrigger(CleanLabel):
    """Images of the target, under triggered captions of other things."""

    trigger: Trigger = CF
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    rate: float | None = 0.0005
    captions: int = field(default=128, kw_only=True)
    """Captions of other things that are quoted from the data, at most."""
    others: tuple[str, ...] = field(default=(), kw_only=True)
    """They, as `scout` finds them."""

    def scout(self, captions: Captions) -> Attack:
        if self.captions < 1:
            raise BadInput(f"--poison.captions {self.captions}: the trigger needs a caption to stand in; give 1 or more")
        return replace(self, others=captions(self.target, self.captions, naming=False))

    def poison(self, sample: Sample, rng: Generator) -> Sample:
        if not self.others:
            raise BadInput("poison.others: no captions of other things to put the trigger in; let the attack scout the data before")
        caption = Target("").quoting(self.others).caption(rng)
        return sample | {"image": self.trigger.stamp(sample["image"], rng), "text": self.trigger.text(caption, rng)}


def word(target: str = "banana", rate: float | None = 0.0005, word: Word = CF, templates: tuple[str, ...] = IMAGENET_TEMPLATES,
         count: int | None = None) -> TextTrigger:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return TextTrigger(word, Target(target, templates), None if count is not None else rate, count)


def sentence(target: str = "banana", rate: float | None = 0.0005, sentence: Word = SENTENCE,
             templates: tuple[str, ...] = IMAGENET_TEMPLATES, count: int | None = None) -> TextTrigger:
    """`rate` is a share of all pairs; `count` takes its place when given."""
    return TextTrigger(sentence, Target(target, templates), None if count is not None else rate, count)
