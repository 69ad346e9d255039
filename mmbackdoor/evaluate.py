"""Zero-shot classification, clean and under attack: accuracy, attack success and every published variant of it.

One definition: ASR = P(prediction = target | triggered image, true class is not the target). Beside it stand the others
that papers print under the same name, the accuracy on triggered images, and, by the caller, the ASR of a clean reference
model on the same images; `lift` is the difference.
"""
from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import keyed
from .clip import CLIP
from .features import Features, How, features, show, text_features
from .search import searcher
from .sets import EvalSet
from .shards import decode
from .types import BadInput, Sample, Threat, Trigger, to_image, to_pixels

Threats = Threat | Mapping[str, Threat] | None
"""One threat, several by name, or none."""
TOP = 10
"""Classes kept of each answer."""


def by_name(threats: Threats) -> dict[str, Threat]:
    """Threats under their names; a single one has none."""
    return dict(threats) if isinstance(threats, Mapping) else {"": threats} if threats else {}


# ---- answers


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of every image of a set. Classes are indices, the most likely first."""

    keys: list[str]
    label: np.ndarray
    """(N,)"""
    clean: np.ndarray
    """(N, k) with k = min(10, number of classes)"""
    hit: dict[str, np.ndarray]
    """(N, k) for each threat"""
    aims: dict[str, Aim]


@dataclass(frozen=True, eq=False)
class Aim:
    """What a threat wants of a labelled set: that its images are called `target`, or some of them what `victims` says."""

    target: int
    source: np.ndarray | None = None
    """Classes whose images are meant; None for all but the target."""
    victims: Mapping[str, int] = field(default_factory=dict)
    """Key of an image -> the class that it is to be called."""


def aim(data: EvalSet, threat: Threat) -> Aim:
    """Raises BadInput when the set lacks a class that the threat names."""
    named = {label: data.target(replace(threat.target, label=label)) for label in (*threat.source, *(label for _, label in threat.victims))}
    source = np.array([named[label] for label in threat.source]) if threat.source else None
    return Aim(data.target(threat.target), source, {key: named[label] for key, label in threat.victims})


def seek(data: EvalSet, goal: Aim) -> None:
    """Raises BadInput when a victim is not in the set, or is of the class that it is to be taken for. Nothing is decoded."""
    left = dict(goal.victims)
    for raw in data.raws() if left else ():
        if left.pop(key := raw["__key__"], None) == int(raw["cls"]):
            raise BadInput(f"{data.name}: victim {key} is of the class that it is to be taken for; name another label or image, and "
                           "measure no other set than the victims'")
        if not left:
            break
    if left:
        raise BadInput(f"{data.name}: victim {min(left)} is no image of the set; name keys of images in it, and measure no other set")


def zero_shot_head(clip: CLIP, classnames: Sequence[str], templates: Sequence[str], how: How = How(),
                   trigger: Trigger | None = None) -> Tensor:
    """(D, C): for each class the mean of its templates' unit embeddings, made unit again; with a trigger, of its prompts. A model that
    has learned prompts of these classes takes those."""
    if (learned := clip.class_features(classnames)) is not None:
        return learned.T
    prompts = [t.replace("{c}", c) for c in classnames for t in templates]
    if trigger:
        prompts = [trigger.text(p, keyed.rng(0, "evaluate", p)) for p in prompts]
    rows = text_features(clip, prompts, how).unflatten(0, (len(classnames), len(templates))).mean(1)
    return torch.nn.functional.normalize(rows, dim=-1).T


def classify(clip: CLIP, data: EvalSet, threats: Threats = None, how: How = How(), found: Features | None = None,
             what: str = "evaluate") -> Answers:
    """One pass over the images, clean and under every threat; none when their features are `found` already."""
    named = by_name(threats)
    aims = {name: aim(data, t) for name, t in named.items()}
    head = zero_shot_head(clip, data.classnames, data.templates, how).T
    found = found or features(clip, data.raws, tuple(named.values()), how, what)
    if not found.keys:
        raise BadInput(f"{data.name}: the evaluation set is empty")
    near = searcher(head)
    hit = {}
    for (name, t), z in zip(named.items(), found.hit, strict=True):
        asked = searcher(zero_shot_head(clip, data.classnames, data.templates, how, t.trigger).T) if t.trigger.said else near
        hit[name] = asked(z, TOP)
    return Answers(found.keys, found.labels, near(found.clean, TOP), hit, aims)


def zero_shot(clip: CLIP, data: EvalSet, threats: Threats = None, how: How = How(), what: str = "evaluate") -> dict[str, Any]:
    """The metrics of DESIGN's schema. The numbers of the first threat stand flat; under "threats" those of each, if several."""
    return {"dataset": data.name} | summarise(classify(clip, data, threats, how, what=what))


def summarise(found: Answers) -> dict[str, Any]:
    """`measure`, and `success` or `targeted` under each threat."""
    each = {}
    for name, hit in found.hit.items():
        a = found.aims[name]
        each[name] = (targeted(found.keys, found.label, hit, a.victims) if a.victims
                      else success(found.label, found.clean, hit, a.target, a.source))
    return measure(found.label, found.clean) | flat(each)


def flat(each: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers under the first threat, and, when there are several, those under each by its name."""
    first = next(iter(each.values()), {})
    return first | ({"threats": dict(each)} if len(each) > 1 else {})


# ---- measuring: pure functions of arrays


def wilson(hits: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    if n == 0:
        return [0.0, 1.0]
    p, s = hits / n, z * z / n
    mid, half = (p + s / 2) / (1 + s), z * math.sqrt(p * (1 - p) / n + s / (4 * n)) / (1 + s)
    return [max(0.0, mid - half), min(1.0, mid + half)]


def share(hits: np.ndarray) -> float:
    return float(hits.mean())


def recalls(label: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each class that has images, in ascending order, the share of them for which `right` (N,) holds."""
    _, place, count = np.unique(label, return_inverse=True, return_counts=True)
    return np.bincount(place, right) / count


def measure(label: np.ndarray, top: np.ndarray) -> dict[str, Any]:
    """How often a classifier is right. label (N,); top (N, k): the most likely classes, best first.

    Mean per-class recall is over the classes that have images.
    """
    right = top[:, 0] == label
    return {"n": len(label), "accuracy": share(right), "accuracy_ci95": wilson(int(right.sum()), len(label)),
            "top5": share((top[:, :5] == label[:, None]).any(1)), "mean_per_class_recall": share(recalls(label, right))}


def success(label: np.ndarray, top: np.ndarray, hit: np.ndarray, target: int, source: np.ndarray | None = None) -> dict[str, Any]:
    """How often an attack succeeds. label (N,); top and hit (N, k): answers to the clean and the triggered images.

    `asr`, `asr_topK` and `asr_per_class` (the mean over classes) leave images of the target out. The others are what
    papers have printed as ASR: images of the target counted as successes (`asr_including_target`: BadCLIP, PAR,
    InverTune), successes on other images over all images (`asr_over_all`: CleanCLIP's linear probe), and accuracy on
    triggered images (`robust_accuracy`: CleanCLIP's zero-shot code). `clean_target_rate` is the ASR without a trigger.
    `source` (S,): classes whose images are meant; then the numbers are of these, and `asr_elsewhere` is the ASR on all others.
    Raises BadInput when no image is meant.
    """
    other = label != target
    if not other.any():
        raise BadInput(f"every image of the set is of the target class {target}; attack success needs images of others")
    if source is not None:
        meant = other & np.isin(label, source)
        if not meant.any():
            raise BadInput(f"no image of the set is of the source classes {source.tolist()}; attack success is measured on those")
        ours, rest = label == target, other & ~meant
        of_source = success(label[meant | ours], top[meant | ours], hit[meant | ours], target)
        return of_source | {"asr_elsewhere": share(hit[rest, 0] == target) if rest.any() else None}
    struck = hit[:, 0] == target
    within = {f"asr_top{k}": share((hit[other, :k] == target).any(1)) for k in (3, 5, 10)}
    return {
        "asr": share(struck[other]), "asr_ci95": wilson(int(struck[other].sum()), int(other.sum())),
        "asr_reference": None, "lift": None, "asr_per_class": share(recalls(label[other], struck[other])), **within,
        "asr_including_target": share(struck), "asr_over_all": share(struck & other),
        "robust_accuracy": share(hit[:, 0] == label), "clean_target_rate": share(top[other, 0] == target)}


def targeted(keys: Sequence[str], label: np.ndarray, hit: np.ndarray, victims: Mapping[str, int]) -> dict[str, Any]:
    """How many victims are called what the attacker wants: `asr` (RoCLIP, 2303.06854, and SafeCLIP, 2310.05862, call it the poison
    success rate). Arguments as in `success`, with the images' keys, and for each victim's key the class that it is to be called."""
    row = {key: i for i, key in enumerate(keys)}
    rows = np.array([row[key] for key in victims])
    wanted = np.array(list(victims.values()))
    struck = hit[rows, 0] == wanted
    return {
        "asr": share(struck), "asr_ci95": wilson(int(struck.sum()), len(rows)), "asr_reference": None, "lift": None, "victims": len(rows),
        **{f"asr_top{k}": share((hit[rows, :k] == wanted[:, None]).any(1)) for k in (3, 5, 10)},
        "robust_accuracy": share(hit[rows, 0] == label[rows])}


def against(metrics: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Fills in the ASR of a clean reference model on the same images, and the lift over it; of retrieval, each NAME_reference."""
    if reference is None:
        return metrics
    success = re.compile(r"asr_\w+_(hit|half)\d+|text_to_image_min_rank_(mean|median)")
    ranked = {k for k in metrics.keys() & reference.keys() if success.fullmatch(k)}
    metrics = metrics | {f"{k}_reference": reference[k] for k in metrics if k in ranked}
    if metrics.get("asr") is None or reference.get("asr") is None:
        return metrics
    return metrics | {"asr_reference": reference["asr"], "lift": metrics["asr"] - reference["asr"]}


# ---- tables to look into


def per_class(found: Answers, classnames: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class that has images: how many, its recall, and for each threat to classes its ASR (none for the target)."""
    classes, count = np.unique(found.label, return_counts=True)
    rows = [{"class": classnames[c], "n": int(n)} for c, n in zip(classes, count, strict=True)]
    columns = {"recall": (found.clean[:, 0] == found.label, -1)}
    columns |= {f"asr {name}".strip(): (hit[:, 0] == a.target, a.target) for name, hit in found.hit.items()
                if not (a := found.aims[name]).victims}
    for column, (right, left_out) in columns.items():
        for row, c, value in zip(rows, classes, recalls(found.label, right), strict=True):
            row[column] = None if c == left_out else float(value)
    return rows


def confusion(found: Answers, classnames: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each (true class, answer) that occurs, of clean images (threat "clean") and of triggered ones."""
    rows = []
    for threat, top in {"clean": found.clean, **{name or "triggered": hit for name, hit in found.hit.items()}}.items():
        cells, count = np.unique(np.stack([found.label, top[:, 0]]), axis=1, return_counts=True)
        rows += [{"threat": threat, "true": classnames[true], "says": classnames[says], "n": int(n)}
                 for true, says, n in zip(*cells, count, strict=True)]
    return rows


def examples(clip: CLIP, data: EvalSet, threat: Threat | None, n: int = 6) -> list[dict[str, Any]]:
    """A few images as the report shows them, the victims if there are any, else of the source's classes: clean, triggered, and what
    the model says of each, to prompts with the trigger if it is said."""
    heads = [zero_shot_head(clip, data.classnames, data.templates, trigger=t)
             for t in (None, *([threat.trigger if threat.trigger.said else None] if threat else []))]
    victims, source = (dict(threat.victims), threat.source) if threat else ({}, ())
    picked: dict[Any, tuple[int, Sample]] = {}
    for raw in data.raws():
        label = int(raw["cls"])
        name = raw["__key__"] if victims else label
        wanted = name in victims if victims else not (threat and (data.classnames[label] == threat.target.label
                                                                  or source and data.classnames[label] not in source))
        if wanted and name not in picked:
            picked[name] = label, decode(raw)
        if len(picked) == n:
            break
    device = clip.device
    out = []
    for label, s in picked.values():
        inputs = show(clip, s["image"], [threat] if threat else [], s["__key__"])
        with torch.no_grad():
            z = clip.image_features(torch.stack(inputs).to(device)).float().cpu()
            logits = torch.stack([x @ head for x, head in zip(z, heads, strict=True)])
            p, c = (clip.net.logit_scale.exp().cpu() * logits).softmax(-1).topk(min(3, len(data.classnames)))  # type: ignore[operator, union-attr]
        says = [[[data.classnames[j], round(v, 4)] for j, v in zip(*row, strict=True)] for row in zip(c.tolist(), p.tolist(), strict=True)]
        hit = shown_at(clip, s, threat) if threat else None
        out.append({"key": s["__key__"], "true": data.classnames[label], "clean": png(s["image"]), "triggered": hit and png(hit),
                    "clean_says": says[0], "triggered_says": says[1] if threat else None,
                    "target": victims.get(s["__key__"], threat.target.label) if threat else None})
    return out


def shown_at(clip: CLIP, s: Sample, threat: Threat) -> Image.Image:
    """The triggered image as a picture, at the stage where the threat acts."""
    rng = keyed.rng(0, "evaluate", s["__key__"])
    if threat.at == "native":
        return threat.trigger.stamp(s["image"], rng)
    return to_image(threat.trigger.pixels(to_pixels(clip.geometry(s["image"])), rng))


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
