"""Poison, train, clean and measure CLIP models. The nouns and verbs of the suite.

`fit` and `poison` are modules here; their verbs are mmbackdoor.fit.fit and mmbackdoor.poison.poison.
"""
from .clip import CLIP, Augment, Model
from .evaluate import zero_shot
from .fit import Schedule
from .losses import Clip, SigLip
from .poison import CleanLabel, DirtyLabel, Plan, plan
from .recipe import Data, Recipe, Suite
from .triggers import Blend, Patch, Word
from .types import (
    Attack,
    BadInput,
    Batch,
    Edit,
    Objective,
    Sample,
    Scores,
    Target,
    Threat,
    Trigger,
    Verdict,
    to_image,
    to_pixels,
)

__all__ = [
    "CLIP", "Attack", "Augment", "BadInput", "Batch", "Blend", "CleanLabel", "Clip", "Data", "DirtyLabel", "Edit", "Model",
    "Objective", "Patch", "Plan", "Recipe", "Sample", "Schedule", "Scores", "SigLip", "Suite", "Target", "Threat", "Trigger",
    "Verdict", "Word", "plan", "to_image", "to_pixels", "zero_shot",
]
