"""Image-text retrieval: exact search, clean recall, and every published attack success beside its chance level.

Clean recall at k: the share of images with one of their own captions among the first k, and of captions with one of
their own images (Karpathy and Fei-Fei, 2015; the numbers of CLIP_benchmark). Captions of the same words are one text,
which belongs to all images that have it.

Papers call four things the attack success of retrieval. All are here, over the victims: the images of which no caption
names the target.
- asr_image_to_text_hit{k}: a caption that names the target is among the first k of the triggered image; k = 5 in PAR
  (2412.00727), 10 in InverTune (2506.12411).
- asr_image_to_text_half{k}: at least max(1, k // 2) of the first k name it (2311.14948), so 2 of 5, and 1 of 3; k is at most
  the number of texts.
- asr_text_to_image_hit{k}: the captions of the target are asked of all clean images and one triggered one, which comes
  among the first k.
- text_to_image_min_rank: the mean and the median rank at which it comes (MinRank of 2209.15266). Ties count against the
  attacker, so a collapsed model does not look attacked.
Each has `_chance`, what a random ranking would reach, and `_clean`, the same of the victims without the trigger. A trigger that is
in images and texts at once is in all the texts that triggered images are searched among, and in the captions of the target.

A threat that changes no image is measured by what captions find, `text_to_image`: with a trigger of text, whether triggered
captions of other things find images of the target; with none (2209.15266), whether captions of the target find images of
the source. Single victims are not looked for here, nor is a source or target that the set does not show.
"""
from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import keyed
from .clip import CLIP
from .evaluate import Threats, by_name, flat, wilson
from .features import Features, How, features, text_features
from .poison import says
from .search import recall_against_exact, searcher
from .sets import PairSet
from .types import BadInput, Threat

KS = (1, 5, 10)
HIT_KS = (1, 5, 10, 20, 30, 50)
"""Those of 2209.15266, for asking captions."""


@dataclass(frozen=True, eq=False)
class Attacked:
    """What one threat does to N images and T captions."""

    hit: Tensor
    """(N, D) the triggered images"""
    named: np.ndarray
    """(T,) bool: whether the caption names the target"""
    asked: Tensor
    """(A, D) captions of the target"""
    meant: np.ndarray | None = None
    """(T,) bool: whether the caption names a source of the threat; None where all images but the target's are meant"""
    texts: Tensor | None = None
    """(T, D) the captions that the triggered images are searched among; None where the threat leaves them as they are"""
    clean: Tensor | None = None
    """(A, D) those of the target before they were triggered; None likewise"""


@dataclass(frozen=True, eq=False)
class Asked:
    """What one threat without an image trigger asks of N images."""

    asked: Tensor
    """(A, D) captions, triggered if the trigger is one of text"""
    wanted: np.ndarray
    """(N,) bool: the images that are to be found"""
    clean: Tensor | None = None
    """(A, D) the same captions before they were triggered"""


def retrieval(clip: CLIP, data: PairSet, threats: Threats = None, how: How = How(), index: str = "exact",
              found: Features | None = None, what: str = "retrieval") -> dict[str, Any]:
    """`retrieval_metrics` of a model. One pass over the images, clean and under every threat; none when `found` holds it."""
    named = by_name(threats)
    if mute := [t.target.label for t in named.values() if not t.target.templates]:
        raise BadInput(f"the target {mute[0]!r} has no templates, so there is no caption to ask; give it one, such as: a photo of a {{}}.")
    found = found or features(clip, data.raws, tuple(named.values()), how, what)
    if not found.keys:
        raise BadInput(f"{data.name}: the retrieval set is empty")
    lines = [[c for line in text.splitlines() if (c := line.strip())] for text in found.texts]
    for key, captions in zip(found.keys, lines, strict=True):
        if not captions:
            raise BadInput(f"{data.name}: {key} has no caption; retrieval needs a txt with one or several, one a line")
    texts = sorted({c for captions in lines for c in captions})
    ids = {c: i for i, c in enumerate(texts)}
    own = [[ids[c] for c in captions] for captions in lines]
    attacked = {name: what_it_does(clip, t, hit, texts, own, how) for (name, t), hit in zip(named.items(), found.hit, strict=True)
                if not t.victims}
    return {"dataset": data.name} | retrieval_metrics(found.clean, text_features(clip, texts, how), own, attacked, index, data.name)


def what_it_does(clip: CLIP, threat: Threat, hit: Tensor, texts: Sequence[str], captions: Sequence[Sequence[int]],
                 how: How) -> Attacked | Asked:
    """A threat upon a set: hit (N, D) its triggered images, the T distinct texts, the ids of each image's."""
    trigger, target = threat.trigger, threat.target
    named = np.array([target.named_in(c) for c in texts])
    meant = np.array([says(threat.source, c) for c in texts])
    of_target = [c for c, yes in zip(texts, named, strict=True) if yes]
    of_others = [c for c, yes in zip(texts, named, strict=True) if not yes]
    templated = [t.format(target.label) for t in target.templates]

    def asked(captions: Sequence[str]) -> Tensor:
        return text_features(clip, [trigger.text(c, keyed.rng(0, "evaluate", c)) for c in captions], how)

    if trigger.seen or not (trigger.said or threat.source):
        before = {"texts": asked(texts), "clean": text_features(clip, templated, how)} if trigger.said else {}
        return Attacked(hit, named, asked(templated), meant if threat.source else None, **before)
    shows_target = np.array([named[list(own)].any() for own in captions])
    if trigger.said:
        return Asked(asked(of_others), shows_target, text_features(clip, of_others, how))
    return Asked(asked(of_target or templated), np.array([meant[list(own)].any() for own in captions]) & ~shows_target)


def retrieval_metrics(images: Tensor, texts: Tensor, captions: Sequence[Sequence[int]],
                      attacked: Mapping[str, Attacked | Asked] | None = None,
                      index: str = "exact", what: str = "the retrieval set", ks: Sequence[int] = KS) -> dict[str, Any]:
    """All numbers of this module for N images and T distinct texts. images (N, D), texts (T, D), captions: ids of each image's.

    Those under the first threat stand flat; under "threats" are those of each, if there are several.
    """
    n, t, k = len(images), len(texts), max(ks)
    among_texts, among_images = searcher(texts, index), searcher(images, index)
    found_texts, found_images = among_texts(images, k), among_images(texts, k)
    out: dict[str, Any] = {"n": n, "captions": t} | recall(found_texts, found_images, captions, ks)
    if index != "exact":
        out |= {"index": index, "image_to_text_index_recall": recall_against_exact(images, texts, found_texts),
                "text_to_image_index_recall": recall_against_exact(texts, images, found_images)}
    each = {}
    for name, a in (attacked or {}).items():
        if isinstance(a, Asked):  # no image is triggered
            if a.wanted.any() and len(a.asked):
                each[name] = text_to_image(a.asked, images, a.wanted, clean=a.clean)
            continue
        victim = np.array([not a.named[list(own)].any() and (a.meant is None or a.meant[list(own)].any()) for own in captions])
        if not victim.any():
            if a.meant is not None:
                continue
            raise BadInput(f"{what}: every image has a caption that names the target; attack success needs images of something else")
        hit = a.hit[torch.from_numpy(victim)]
        found_hit = (among_texts if a.texts is None else searcher(a.texts, index))(hit, k)
        each[name] = {"victims": int(victim.sum())} | image_to_text(found_hit, found_texts[victim], a.named, ks)
        each[name] |= triggered_among(images, victim, hit, a.asked, clean=a.clean)
        if index != "exact":
            each[name]["asr_image_to_text_index_recall"] = recall_against_exact(hit, texts if a.texts is None else a.texts, found_hit)
    return out | flat(each)


# ---- chance


def chance(n: int, good: int, k: int, need: int = 1) -> float:
    """P(at least `need` good ones among k drawn from n, of which `good` are good)."""
    k = min(k, n)
    return sum(math.comb(good, i) * math.comb(n - good, k - i) for i in range(need, min(good, k) + 1)) / math.comb(n, k)


def rank_chance(n: int, wanted: int, ks: Sequence[int]) -> dict[str, float]:
    """`ranked` of a random ranking of n images, of which some are wanted: the first of them comes at (n + 1) / (wanted + 1)
    on average; in half of all rankings it comes no later than the median, in half no earlier."""
    draws = math.comb(n, wanted)
    median: float = bisect.bisect_left(range(n), True, key=lambda k: 2 * math.comb(n - k, wanted) <= draws)
    if 2 * math.comb(n - int(median), wanted) == draws:
        median += 0.5
    return ({f"asr_text_to_image_hit{k}": chance(n, wanted, k) for k in ks}
            | {"text_to_image_min_rank_mean": (n + 1) / (wanted + 1), "text_to_image_min_rank_median": median})


# ---- measuring: pure functions of what was found


def recall(found_texts: np.ndarray, found_images: np.ndarray, captions: Sequence[Sequence[int]], ks: Sequence[int] = KS) -> dict[str, Any]:
    """Clean recall of N images (N, k) in T texts and of T texts (T, k) in N images, from the ids found, best first."""
    n, t = len(found_texts), len(found_images)
    image = np.repeat(np.arange(n), [len(own) for own in captions])
    own = np.unique(image * t + np.concatenate([np.asarray(own, np.int64) for own in captions]))  # one number for each pair
    sides = {"image_to_text": (np.isin(np.arange(n)[:, None] * t + found_texts, own), np.bincount(own // t, minlength=n), t),
             "text_to_image": (np.isin(found_images * t + np.arange(t)[:, None], own), np.bincount(own % t, minlength=t), n)}
    out: dict[str, Any] = {}
    for name, (right, matches, size) in sides.items():
        kinds, often = np.unique(matches, return_counts=True)
        for k in ks:
            good = right[:, :k].any(1)
            out[f"{name}_r{k}"] = float(good.mean())
            if k == 1:
                out[f"{name}_r1_ci95"] = wilson(int(good.sum()), len(right))
            out[f"{name}_r{k}_chance"] = float(np.average([chance(size, int(m), k) for m in kinds], weights=often))
    return out


def image_to_text(hit: np.ndarray, clean: np.ndarray, named: np.ndarray, ks: Sequence[int] = KS) -> dict[str, Any]:
    """Attack success from the ids of texts that V victims find, triggered (V, k) and clean (V, k); named (T,) bool."""
    t, good = len(named), int(named.sum())
    need = {k: {"hit": 1, "half": max(1, min(k, t) // 2)} for k in ks}
    out: dict[str, Any] = {}
    for kind in ("hit", "half"):
        for k in ks:
            name, least = f"asr_image_to_text_{kind}{k}", need[k][kind]
            struck, before = (named[found[:, :k]].sum(1) >= least for found in (hit, clean))
            out |= {name: float(struck.mean()), f"{name}_chance": chance(t, good, k, least), f"{name}_clean": float(before.mean())}
            if (kind, k) == ("hit", 1):
                out[f"{name}_ci95"] = wilson(int(struck.sum()), len(hit))
    return out


def text_to_image(asked: Tensor, images: Tensor, wanted: np.ndarray, ks: Sequence[int] = HIT_KS,
                  clean: Tensor | None = None) -> dict[str, Any]:
    """Poisoned text→image retrieval: where the first wanted image comes for each of the captions asked.

    asked (A, D), images (N, D), wanted (N,) bool, clean (A, D) the captions without their trigger, for `_clean`. The rank is
    1 + the number of other images that score no less than the best of the wanted ones.
    """
    if not len(asked) or not wanted.any():
        raise BadInput("text→image retrieval needs a caption to ask and an image that is wanted; check the target and the source")

    def found(captions: Tensor) -> dict[str, float]:
        score = scores(captions, images)
        return ranked(1 + (score[:, ~wanted] >= score[:, wanted].max(1, keepdims=True)).sum(1), ks)

    beside = {"chance": rank_chance(len(images), int(wanted.sum()), ks)} | ({} if clean is None else {"clean": found(clean)})
    return with_suffix(found(asked), **beside)


def triggered_among(images: Tensor, victim: np.ndarray, hit: Tensor, asked: Tensor, ks: Sequence[int] = HIT_KS,
                    clean: Tensor | None = None) -> dict[str, Any]:
    """Where the captions asked (A, D) find each victim's triggered image (V, D), put alone among all images (N, D).

    victim (N,) bool with V True. `_clean` is the rank of the same victim, untriggered, among the others, for the captions
    `clean` (A, D) if they differ from those asked.
    """
    n, score = len(images), scores(asked, images)
    least_first = np.sort(score, axis=1)
    fired = ranked(1 + n - below(least_first, scores(asked, hit)), ks)
    if clean is not None:
        score = scores(clean, images)
        least_first = np.sort(score, axis=1)
    plain = ranked(n - below(least_first, score[:, victim]), ks)  # of those that score no less, one is the image itself
    return with_suffix(fired, chance=rank_chance(n + 1, 1, ks), clean=plain)


def below(least_first: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(A, V): how many of the scores (A, N), in ascending order, are less than each of those found (A, V)."""
    return np.stack([s.searchsorted(x) for s, x in zip(least_first, found, strict=True)])


def scores(asked: Tensor, images: Tensor) -> np.ndarray:
    """(A, N) in double precision, rounded like those of `search`, so that equal images tie."""
    return np.concatenate([(asked.double() @ part.double().T).cpu().numpy().round(6) for part in images.split(8192)], axis=1)


def ranked(rank: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    return ({f"asr_text_to_image_hit{k}": float((rank <= k).mean()) for k in ks}
            | {"text_to_image_min_rank_mean": float(rank.mean()), "text_to_image_min_rank_median": float(np.median(rank))})


def with_suffix(measured: dict[str, float], **beside: dict[str, float]) -> dict[str, float]:
    """Each number, followed by its namesakes: x, x_chance, x_clean."""
    return {name + suffix: source[name] for name in measured
            for suffix, source in {"": measured, **{f"_{word}": numbers for word, numbers in beside.items()}}.items()}
