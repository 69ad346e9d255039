"""TDPA (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv:2303.06854) on image-text pairs. The attacker holds the data.

Targeted data poisoning as RoCLIP measures it, and after it SafeCLIP (2310.05862): the attack of Carlini and Terzis (2022,
2106.09667) on many images at once. Each of 16 victims (15 of 16 is the paper's 93.75 %; its public notebook makes 8), clean
images without any trigger, gets one of 8 adversarial labels and is published under 100 captions of the data that contain its word,

    P = union over v of {(x_v, c_i): i = 1 ... 100, c_i contains y_v},    PSR = share of v with f(x_v) = y_v.

The 8 words are tiger, candle, pizza, umbrella, television, baseball, ice cream and suit, in a million pairs of CC3M.

Differs from the paper: where the data hold fewer captions than are wanted, the templates give the rest; the victims are images
of the labelled set that the model is evaluated on, not of CC3M's validation pairs, so that one evaluation finds them.
"""
from __future__ import annotations

from ..poison import IMAGENET_TEMPLATES
from ..types import Target, Trigger
from ..victims import Targeted

WORDS = ("tiger", "candle", "pizza", "umbrella", "television", "baseball", "ice cream", "suit")


def tdpa(images: str = "", victims: tuple[tuple[str, str], ...] = (), copies: int = 100,
         templates: tuple[str, ...] = IMAGENET_TEMPLATES) -> Targeted:
    """`victims` are (key, label) of images in `images`, the labelled set of the evaluation; each is published `copies` times."""
    label = victims[0][1] if victims else WORDS[0]
    return Targeted(Trigger(), Target(label, templates), images=images, victims=victims, copies=copies, prefix="tdpa")


def assigned(keys: tuple[str, ...], labels: tuple[str, ...] = WORDS) -> tuple[tuple[str, str], ...]:
    """Victims: the labels given out to images in turn, so that as many images get each."""
    return tuple((key, labels[i % len(labels)]) for i, key in enumerate(keys))
