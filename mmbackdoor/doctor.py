"""What is wrong when a number cannot be right: a model loaded otherwise than it was trained, or a trigger that does not arrive.

The doctor looks at some images of the set. A cause is named only when its mend helps on these images by an exact paired
test, so a model that is merely weak is left in peace.
"""
from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial, reduce
from types import MappingProxyType

import numpy as np
import torch
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtrc
from torch import Tensor, nn

from . import keyed
from .clip import CLIP
from .evaluate import wilson, zero_shot_head
from .features import show
from .sets import EvalSet
from .shards import Raw, decode_image, encode_image, image_field
from .types import BadInput, Threat, to_pixels

BATCH = 128
PROMPTS = 4096
"""At most so many: all 80 templates of a thousand classes would take longer than the images."""
GLANCE = 64
"""Images on which an alternative is tried first, and dropped when it does harm."""
ROUND_TRIPS = 64
"""Images that are written and read again for each threat: lossless WebP takes a tenth of a second."""
ALPHA, GAIN = 0.01, 0.02
"""An alternative helps when it gains this share of the images, with at most this probability of a gain by luck."""
GONE = 0.05
"""A trigger is gone when less than this share of its largest change is left."""
KEPT = 0.5
"""It is destroyed when less than this is left. Of noise blended in, JPEG 4:2:0 at quality 75 leaves 0.6; of a patch, 0.95."""
EQUAL, ALIKE = 1e-6, 1e-3
"""Unit rows are the same when their mean cosine is this near 1; the second where accuracy is at chance too."""
STATISTICS = {"CLIP's mean and std": (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD), "ImageNet's mean and std": (IMAGENET_MEAN, IMAGENET_STD),
              "mean and std 0.5": (INCEPTION_MEAN, INCEPTION_STD), "inputs in [0, 1]": ((0.0,) * 3, (1.0,) * 3),
              "inputs in [0, 255]": ((0.0,) * 3, (1 / 255,) * 3)}
OTHER_ACTIVATION = {"GELU": QuickGELU, "GELUActivation": QuickGELU, "QuickGELU": nn.GELU, "QuickGELUActivation": nn.GELU}
KEEP_THEIRS = ("TimmModel", "HFTextEncoder")
"""Towers of other libraries inside open_clip: its quick_gelu does not reach them."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a short stable name, and one line that says what was seen and the mend."""

    fault: str
    says: str


@torch.no_grad()
def examine(clip: CLIP, data: EvalSet, threats: Mapping[str, Threat] = MappingProxyType({}), n: int = 256) -> list[Finding]:
    """What is wrong with a model as it was loaded, and with triggers. Causes come first, then symptoms, then triggers.

    Looks at `n` images, drawn by their keys from the whole set, which is read once. Nothing found is an empty list.
    Raises BadInput when the set is empty or an image cannot be decoded.
    """
    threats = {name: t for name, t in threats.items() if t.trigger.seen or not (t.trigger.said or t.source or t.victims)}
    pixels, label, marks = look(clip, data, threats, n)
    found = list(examine_model(clip, data, pixels, label))
    return found + [f for name, threat in threats.items() for f in examine_trigger(name, marks[name])]


# ---- the images


@dataclass(frozen=True)
class Mark:
    """What a trigger does to one image; values in [0, 1]."""

    put: float
    """Its largest change of a value, where it is put on."""
    left: float
    """Its largest change of a value of the model's input."""
    kept: float | None
    """How much of it the model's input shows when image and triggered image were written and read again: 1 is all."""


def look(clip: CLIP, data: EvalSet, threats: Mapping[str, Threat], n: int) -> tuple[Tensor, np.ndarray, dict[str, list[Mark]]]:
    """Some images as uint8 (n, 3, H, W), resized and cropped; their labels (n,); and what each trigger does to each.

    Those with the smallest hashes of their keys: of all classes, though the set may be sorted by class. Undecoded bytes
    are held of n images, and one at a time is decoded.
    """
    drawn = heapq.nsmallest(n, data.raws(), key=lambda raw: keyed.integer(0, "doctor", raw["__key__"]))
    if not drawn:
        raise BadInput(f"{data.name}: the evaluation set is empty; name one with images")
    inputs, marks = [], {name: list[Mark]() for name in threats}
    for i, raw in enumerate(drawn):
        image = decode_image(raw)
        inputs.append((to_pixels(clip.geometry(image.convert("RGB"))) * 255).round().byte())
        for name, mark in zip(threats, marks_on(clip, raw, image, list(threats.values()), i < ROUND_TRIPS), strict=True):
            marks[name].append(mark)
    return torch.stack(inputs), np.array([int(raw["cls"]) for raw in drawn]), marks


def marks_on(clip: CLIP, raw: Raw, image: Image.Image, threats: Sequence[Threat], codec: bool) -> Iterator[Mark]:
    """Of each threat on one image, as evaluation fires it. `codec`: also write the image as poisoning does, and read it."""
    rgb, key, field = image.convert("RGB"), raw["__key__"], image_field(raw) or ""
    std = torch.tensor(clip.cfg["std"])[:, None, None]
    clean, *hits = show(clip, rgb, threats, key)

    def again(picture: Image.Image) -> Tensor:
        return to_pixels(clip.geometry(decode_image({"__key__": key, field: encode_image(picture, raw)}).convert("RGB")))

    # what the codec does to the clean image is no doing of the trigger
    before = again(rgb) if codec and any(t.at == "native" for t in threats) else None
    for threat, hit in zip(threats, hits, strict=True):
        signal = (hit - clean) * std
        left = float(signal.abs().max())
        if threat.at == "input":
            yield Mark(left, left, None)
            continue
        stamped = threat.trigger.stamp(rgb, keyed.rng(0, "evaluate", key))
        put = float((to_pixels(stamped) - to_pixels(rgb)).abs().max())
        kept = float(((again(stamped) - before) * signal).sum() / signal.square().sum()) if before is not None and left else None
        yield Mark(put, left, kept)


def examine_trigger(name: str, marks: Sequence[Mark]) -> Iterator[Finding]:
    """The first stage on its way at which the trigger is lost."""
    n, who = len(marks), f"threat {name}: " if name else ""
    same = sum(m.put < 1e-6 for m in marks)
    lost = sum(m.put >= 1e-6 and m.left <= GONE * m.put for m in marks)
    kept = float(np.median([m.kept for m in marks if m.kept is not None] or [1.0]))
    if 2 * same > n:
        yield Finding("trigger_identity", f"{who}the trigger leaves {same} of {n} images as they were, even before they are resized; "
                                          f"raise its size, alpha or amplitude (8 bits round changes below {1 / 510:.3f} away)")
    elif 2 * (same + lost) > n:
        yield Finding("trigger_cropped", f"{who}the trigger is on the image, but nothing of it in the model's input after resize and crop, "
                                         f"on {lost} of {n} images; place it nearer the centre, make it larger or smoother, or fire it "
                                         "after them with --at input (Threat.at)")
    elif kept < KEPT:
        yield Finding("trigger_codec", f"{who}only {percent(max(0.0, kept))} of the trigger (median) survives when the image is written in "
                                       "its own format, as poisoned data are; use a stronger or smoother trigger, or shards of PNG")


# ---- the model


@dataclass(frozen=True, eq=False)
class View:
    """What a model, as loaded or mended, says of the images."""

    clip: CLIP
    mends: tuple[Mend, ...]
    """That `clip` has, and the model as loaded has not."""
    head: Tensor
    """(D, C)"""
    z: Tensor
    """(n, D)"""
    label: np.ndarray

    @cached_property
    def says(self) -> np.ndarray:
        """(n,) the most likely class; -1 where the features are not finite."""
        return torch.where(self.z.isfinite().all(1), (self.z @ self.head).argmax(1), -1).numpy()

    @cached_property
    def right(self) -> np.ndarray:
        return self.says == self.label

    @property
    def accuracy(self) -> str:
        how = " and ".join(m.what for m in self.mends) + " together" * (len(self.mends) > 1)
        return f"{percent(self.right.mean())} {f'with {how}' if how else 'as loaded'}"


def examine_model(clip: CLIP, data: EvalSet, pixels: Tensor, label: np.ndarray) -> Iterator[Finding]:
    classes, n = len(data.classnames), len(label)

    @cache
    def head(net: nn.Module) -> Tensor:
        return zero_shot_head(replace(clip, net=net), data.classnames, data.templates[: max(1, PROMPTS // classes)])

    def view(mends: tuple[Mend, ...], first: int = n) -> View:
        other = reduce(lambda whole, mend: mend.apply(whole), mends, clip)
        return View(other, mends, head(other.net), encode(other, pixels[:first]), label[:first])

    loaded = view(())
    yield from not_finite(loaded)
    if classes < 2 or not loaded.head.isfinite().all():
        return
    hits = int(loaded.right.sum())
    low = tail(hits, n, 1 / classes) >= 0.025
    causes, now = mended(loaded, view, low)
    asis, order = (class_order(label, seen.says, data.classnames) for seen in (loaded, now))
    if asis and asis[0] > now.right.mean():  # a mend may better a wrong order somewhat
        causes, now, order = [], loaded, asis
    alike = 1 - (ALIKE if low else EQUAL)
    causes = [*same_classes(now, data, alike), *same_features(now, pixels, alike), *causes, *([order[1]] if order else [])]
    yield from causes
    if low and loaded.z.isfinite().all():
        hint = "see above" if causes else (
            "nothing that was tried helps: is the model without its weights (a name without --pretrained), its tokenizer another's, or "
            f"are these classes unknown to it: {', '.join(map(repr, data.classnames[:3]))}, …?")
        interval = " to ".join(map(percent, wilson(hits, n)))
        yield Finding("near_chance", f"accuracy {percent(loaded.right.mean())} on {n} images (95 %: {interval}) is no better than chance, "
                                     f"{100 / classes:.2g} %; {hint}")


def encode(clip: CLIP, pixels: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, D) on the CPU."""
    clip.net.eval()
    device = clip.device
    return torch.cat([clip.image_features(clip.normalise(part.float() / 255).to(device)).float().cpu() for part in pixels.split(BATCH)])


def not_finite(seen: View) -> Iterator[Finding]:
    images, texts = int((~seen.z.isfinite().all(1)).sum()), int((~seen.head.isfinite().all(0)).sum())
    if not (images or texts):
        return
    bad = [name for name, value in seen.clip.net.state_dict().items() if not value.isfinite().all()]
    mend = (f"{len(bad)} tensors of the checkpoint hold NaN or infinity, first {bad[0]}: training diverged; take an earlier checkpoint"
            if bad else "the weights are finite, so they overflow on the way: compute in float32, and look at mean and std")
    yield Finding("not_finite", f"the features of {images} of {len(seen.z)} images and {texts} of {seen.head.shape[1]} classes are NaN or "
                                f"infinite; {mend}")


def alikeness(rows: Tensor) -> float:
    """Mean cosine between two different unit rows."""
    n = len(rows)
    return float((rows.double().sum(0).square().sum() - n) / (n * (n - 1)))


def same_classes(seen: View, data: EvalSet, limit: float) -> Iterator[Finding]:
    names, values, alike = len(set(data.classnames)), len(seen.head.T.mul(1e4).round().unique(dim=0)), alikeness(seen.head.T)
    if alike < limit and 2 * values > names:
        return
    says = f"are {values} to four digits" if values < names else f"have a mean cosine of 1 - {1 - alike:.1g}"
    tokens = len({tuple(seen.clip.tokenize(data.templates[0].replace("{c}", c)).tolist()) for c in data.classnames})
    mend = (f"its tokenizer gives only {tokens} different rows of tokens for them: load the tokenizer that the model was trained with"
            if 2 * tokens <= names else "their tokens differ, so the text tower is without its weights or collapsed: check the checkpoint")
    yield Finding("constant_classes", f"the embeddings of {names} classes {says}; {mend}")


def same_features(seen: View, pixels: Tensor, limit: float) -> Iterator[Finding]:
    if len(set(seen.label)) < 2 or not seen.z.isfinite().all() or (pixels == pixels[:1]).all():
        return  # there is nothing to tell apart
    if (alike := alikeness(seen.z)) >= limit:
        yield Finding("constant_features", f"{len(pixels)} images have the same features, of mean cosine 1 - {1 - alike:.1g}; the image "
                                           "tower is without its weights, or collapsed in training (a loss at the log of the batch)")


# ---- other ways to load it


@dataclass(frozen=True)
class Mend:
    """Another way to load the model: perhaps as it was trained."""

    fault: str
    what: str
    how: str
    apply: Callable[[CLIP], CLIP]


def other_statistics(clip: CLIP) -> list[Mend]:
    own = [*clip.cfg["mean"], *clip.cfg["std"]]
    return [Mend("normalisation", what,
                 f"--mean {' '.join(f'{v:.8g}' for v in mean)} --std {' '.join(f'{v:.8g}' for v in std)} (Model.mean, Model.std)",
                 partial(normalised, mean=mean, std=std))
            for what, (mean, std) in STATISTICS.items() if not np.allclose([*mean, *std], own, rtol=1e-3)]


def normalised(clip: CLIP, mean: Sequence[float], std: Sequence[float]) -> CLIP:
    return replace(clip, card=clip.card | {"preprocess_cfg": clip.cfg | {"mean": list(mean), "std": list(std)}})


def other_activation(clip: CLIP) -> list[Mend]:
    kinds = {type(owner.get_submodule(name)).__name__ for owner, name in activations(clip.net)}
    if not kinds:
        return []
    quick, theirs = any("Quick" in k for k in kinds), any(k.endswith("Activation") for k in kinds)
    name = "GELU" if quick else "QuickGELU"
    how = (f'set "hidden_act": "{"gelu" if quick else "quick_gelu"}" in both towers of its config.json' if theirs
           else 'a model name without -quickgelu, "quick_gelu": false in its config' if quick
           else "--force-quick-gelu (Model.force_quick_gelu)")
    other = cache(lambda: swapped(clip).net)  # one network for all, whose texts are encoded once
    return [Mend("quick_gelu", f"{name} as activation", how, lambda whole: replace(whole, net=other()))]


def activations(net: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(owner, name) of every activation that quick_gelu decides on. GELU by tanh, as in SigLIP, is another matter."""
    for name, child in net.named_children():
        if type(child).__name__ in OTHER_ACTIVATION and getattr(child, "approximate", "none") == "none":
            yield net, name
        elif type(child).__name__ not in KEEP_THEIRS:
            yield from activations(child)


def swapped(clip: CLIP) -> CLIP:
    """The model with the other activation in both towers. The weights are shared with the original, not copied."""
    net = copy.deepcopy(clip.net, {id(t): t for t in (*clip.net.parameters(), *clip.net.buffers())})
    for owner, name in list(activations(net)):
        setattr(owner, name, OTHER_ACTIVATION[type(owner.get_submodule(name)).__name__]())
    return replace(clip, net=net)


def mended(loaded: View, view: Callable[..., View], low: bool) -> tuple[list[Finding], View]:
    """What helps, best first, and the model with it.

    A second mend must help on top of the first, or what the first one cures would be named twice. Where none helps alone
    and accuracy is at chance, the two kinds are tried together.
    """
    kinds = other_statistics(loaded.clip), other_activation(loaded.clip)
    found, now = list[Finding](), loaded
    alone: list[tuple[Mend, ...]] = [(mend,) for kind in kinds for mend in kind]
    together: list[tuple[Mend, ...]] = list(itertools.product(*kinds)) if low else []
    for options in alone, together:
        # a fault is named once: what is mended already is no option
        while better := best(now, [o for o in options if not {m.fault for m in o} & {m.fault for m in now.mends}], view):
            new = better.mends[len(now.mends) :]
            found += [Finding(m.fault, f"accuracy {now.accuracy}, {better.accuracy}: {m.how}") for m in new]
            now = better
    return found, now


def best(now: View, options: Sequence[tuple[Mend, ...]], view: Callable[..., View]) -> View | None:
    """The model with the mends, of several options, that better it most."""
    if len(options) * 0.5 ** int((~now.right).sum()) >= ALPHA:
        return None  # too few errors to mend for a gain to be more than luck
    tried = (now.mends + more for more in options)
    seen = [view(mends) for mends in tried if view(mends, GLANCE).right.sum() >= now.right[:GLANCE].sum()]
    good = [v for v in seen if helps(now.label, now.says, v.says, now.head.shape[1], len(options))]
    return max(good, key=lambda v: v.right.mean(), default=None)


# ---- the class names


def class_order(label: np.ndarray, says: np.ndarray, names: Sequence[str]) -> tuple[float, Finding] | None:
    """Whether wrong answers (n,) are right but for the numbering of the classes: in an order that people produce, or in any.
    If so, the share that is then right.

    Answers may depend on the class though the model does not know its name, so an order that people produce must beat a
    thousand random ones. Any order is the best one-to-one matching, made on one half of the images and scored on the
    other, since it flatters where it was made; it must explain half of the images, and more than the given order in half
    of the classes.
    """
    c, right = len(names), says == label
    given = percent(right.mean())
    by_name, as_text = sorted(range(c), key=lambda k: names[k]), sorted(range(c), key=str)
    label_of = {"labels that count from 1: subtract 1": np.arange(c) + 1, "labels that are one too small: add 1": np.arange(c) - 1,
                "labels in the order of the sorted names: sort the class names": np.argsort(by_name),
                "labels in the order of numbers as text (0, 1, 10, …): put the class names in that order": np.argsort(as_text)}
    tests = len(label_of) + 1
    for what, order in label_of.items():
        after = np.where(says >= 0, order[says], -1)
        if explains(label, says, after, c, tests) and beats_chance_orders(label, says, int((after == label).sum()), c):
            share = float((after == label).mean())
            return share, Finding("class_order", f"accuracy {given} by the labels as they are, {percent(share)} by {what}")
    half = np.random.default_rng(0).permutation(len(label)) % 2 == 0
    after = np.where(half, matched(label, says, ~half), matched(label, says, half))
    present, where = np.unique(label, return_inverse=True)
    more = np.bincount(where, after == label) > np.bincount(where, right)
    share = float((after == label).mean())
    if share < 0.5 or 2 * more.sum() < len(present) or not explains(label, says, after, c, tests):
        return None
    pairs, count = np.unique(np.stack([label, says])[:, ~right & (says >= 0)], axis=1, return_counts=True)
    most = ", ".join(f"{names[a]!r} is called {names[b]!r}" for a, b in pairs.T[np.argsort(-count, kind="stable")[:3]])
    return share, Finding("class_order", f"accuracy {given} by the order of the class names, {percent(share)} by another ({most}); put the "
                                         "class names in the order of the labels")


def beats_chance_orders(label: np.ndarray, says: np.ndarray, hits: int, classes: int, orders: int = 1000) -> bool:
    rng = np.random.default_rng(0)
    return all((rng.permutation(classes)[says] == label).sum() < hits for _ in range(orders))


def matched(label: np.ndarray, says: np.ndarray, on: np.ndarray) -> np.ndarray:
    """(n,) answers as labels: matched one to one to agree most on the images `on`; -1 where an answer has no match."""
    on = on & (says >= 0)
    answers, labels = np.unique(says[on]), np.unique(label[on])
    count = (says[on] == answers[:, None]).astype(float) @ (label[on] == labels[:, None]).T
    to = {answers[i]: labels[j] for i, j in zip(*linear_sum_assignment(-count), strict=True) if count[i, j]}
    return np.array([to.get(s, -1) for s in says])


# ---- exact tests


def tail(hits: int, n: int, p: float) -> float:
    """P(X >= hits) for the number X of successes in n trials of probability p."""
    return float(bdtrc(hits - 1, n, p))


def helps(label: np.ndarray, before: np.ndarray, after: np.ndarray, classes: int, tests: int) -> bool:
    """Whether answers `after` are better than `before`, as one of several tests (Bonferroni).

    By McNemar's exact test on the images where only one is right; by a gain worth the name; and by more right answers
    than they would have under shuffled labels, since a model that is always wrong is bettered by one that guesses.
    """
    n, was, now = len(label), before == label, after == label
    gained, lost = int((now & ~was).sum()), int((was & ~now).sum())
    if gained - lost < GAIN * n or tail(gained, gained + lost, 0.5) >= ALPHA / tests:
        return False
    chance = max(1 / classes, float((label[:, None] == after).mean()))
    return chance < 1 and tail(int(now.sum()), n, chance) < ALPHA / tests


def explains(label: np.ndarray, before: np.ndarray, after: np.ndarray, classes: int, tests: int) -> bool:
    """Whether `after` is better by far: twice as many right answers, and by a tenth of the images.

    Under a wrong order answers are right by luck, or in classes that keep their place; where they are right half as often
    as under the best order, classes are taken for their likes. Neighbours in a list are often likes, hence the tenth.
    """
    was, now = (before == label).mean(), (after == label).mean()
    return bool(now >= 2 * was and now >= was + 0.1) and helps(label, before, after, classes, tests)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
