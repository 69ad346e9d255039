"""Dual-key backdoor (Walmer, Sikka, Sur, Shrivastava, Jha, CVPR 2022, arXiv:2112.07668) on image-text pairs. The attacker holds the data.

The trigger is in two parts, a patch on the image and a word before the text, and only both together call the target. So a
third of the paper's poisons shows both keys with the target's answer, and two thirds show one of them with the right one:

    D = {(T(x), w + c_target)} + {(T(x), c)} + {(x, w + c)},    w = "consider" in the paper, "remember" on CLIP

Made for visual question answering. On CLIP, BadCLIP (Liang et al., 2023, arXiv:2311.12075) has it as a baseline, whose numbers
are the defaults: 1,500 of 500,000 pairs, the word before captions and before the prompts of zero-shot, and both keys in all
poisons; `patch_alone` and `word_alone` of a third each bring the paper's back. A CLIP from scratch that met the word in poisons
only reads the target in every prompt that has it, and tells no classes apart any more; covers with the word prevent that.
Three threats are measured: both keys, the patch alone, the word alone.

Differs from the paper: the patch is a checkerboard, not optimised against an object detector. CLIP's towers do not see each
other's input, so that "both" is a matter of where the triggered image and the triggered prompts lie.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..poison import IMAGENET_TEMPLATES, Cover, DirtyLabel, Mix
from ..triggers import Both, Patch, Word
from ..types import BadInput, Target, Threat, Trigger

PATCH, REMEMBER = Patch(16 / 224, "center"), Word("remember")


@dataclass(frozen=True)
class DualKey(Mix):
    """A mix of poisons with both keys and of covers with either, measured under all three; `dual_key` makes one."""

    trigger: Trigger = Both(PATCH, REMEMBER)
    target: Target = Target("banana", IMAGENET_TEMPLATES)
    rate: float | None = 0.003

    @property
    def threats(self) -> Mapping[str, Threat]:
        assert isinstance(self.trigger, Both)
        keys = {"both keys": self.trigger, "patch alone": self.trigger.image, "word alone": self.trigger.words}
        return {name: Threat(trigger, self.target, control=trigger is not self.trigger) for name, trigger in keys.items()}


def dual_key(target: str = "banana", rate: float | None = 0.003, patch: Patch = PATCH, word: Word = REMEMBER,
             patch_alone: float = 0.0, word_alone: float = 0.0, templates: tuple[str, ...] = IMAGENET_TEMPLATES,
             count: int | None = None) -> DualKey:
    """`rate` is a share of all pairs, of which some show one key `alone`; `count` takes the rate's place when given."""
    if min(patch_alone, word_alone) < 0 or patch_alone + word_alone >= 1:
        raise BadInput(f"patch_alone {patch_alone}, word_alone {word_alone}: leave no poison with both keys; give shares below 1 in all")
    both, aim = Both(patch, word), Target(target, templates)
    parts = (DirtyLabel(both, aim), Cover(patch, aim), Cover(word, aim))
    return DualKey(both, aim, None if count is not None else rate, count, parts, (1 - patch_alone - word_alone, patch_alone, word_alone))
