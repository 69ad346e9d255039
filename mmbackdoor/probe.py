"""Classifiers on frozen image features, and attack success through them: linear probe, k nearest neighbours, few-shot.

An attack on the encoder (BadEncoder, CorruptEncoder) is measured so: whoever uses the encoder trains a classifier on clean
features of their own labelled images; success is that the triggered test image gets the target's class from it.

Linear probe: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, 2103.00020,
appendix A.3: L2 logistic regression by scikit-learn's L-BFGS, at most 1000 iterations; its strength is swept on a validation
split, then train and validation are fitted together. Minimised is Σ loss + λ/2 ‖w‖², a sum over the samples: λ = 1/C. (The
paper writes no objective; the C = 0.316 of its authors' README, λ = 10^(4/8), is of the paper's sweep under this reading.)
Differs from the paper: features are the joint embedding made unit, as zero-shot sees it, not the layer before the projection;
the validation split is a keyed fifth of each training class, not the data set's own; among strengths that validate equally
well the strongest wins (the paper does not say).
k-NN: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, 1805.01978, section 3.4.
Differs from the paper: temperature 0.1, which became usual, for its 0.07.
Samples are put in the order of their keys, so no number depends on the order in which they come.
"""
from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from . import keyed
from .evaluate import TOP, flat, measure, success
from .features import Features
from .search import searcher
from .types import BadInput

ENDS = 48
"""The sweep runs over λ = 10^(i/8) for i from -48 to 48: 10^-6 to 10^6 in 96 steps."""
SHOTS = (1, 2, 4, 8, 16)
BLOCK = 1 << 22
"""Numbers that scores, or the features of neighbours, may be at once."""


@dataclass(frozen=True, eq=False)
class Train:
    """Training features in the order of their keys. `labelled` makes it."""

    keys: list[str]
    x: np.ndarray
    """(N, D) float32, rows of unit norm."""
    label: np.ndarray
    """(N,) class ids; some classes may be absent."""
    classes: int


@dataclass(frozen=True, eq=False)
class Probe:
    """What a classifier says of each view of the test images, and how it came about."""

    ranked: list[np.ndarray]
    """One a view: (M, min(10, classes)), the most likely classes first."""
    facts: dict[str, Any]


def labelled(keys: Sequence[str], x: torch.Tensor | np.ndarray, label: np.ndarray, classes: int) -> Train:
    """x (N, D), label (N,). Raises BadInput where no classifier can be trained."""
    check("training", keys, x, label, classes)
    if (label == label[0]).all():
        raise BadInput(f"probe: all {len(label)} training images are of class {label[0]}; a classifier needs two classes")
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Train([keys[i] for i in order], np.asarray(x, dtype=np.float32)[order], np.asarray(label)[order], classes)


def check(role: str, keys: Sequence[str], x: torch.Tensor | np.ndarray, label: np.ndarray, classes: int) -> None:
    if not len(keys):
        raise BadInput(f"probe: the {role} set is empty; name one with labelled images")
    for i in np.flatnonzero((label < 0) | (label >= classes))[:1]:
        raise BadInput(f"probe: the {role} image {keys[i]!r} has no label; the probe needs a labelled set" if label[i] < 0 else
                       f"probe: the {role} image {keys[i]!r} has label {label[i]}, but the test set has classes 0 to {classes - 1}; "
                       "both sets need the same list of classes")
    finite(role, keys, x)


def finite(role: str, keys: Sequence[str], x: torch.Tensor | np.ndarray) -> None:
    for i in np.flatnonzero(~np.isfinite(np.asarray(x).sum(1)))[:1]:
        raise BadInput(f"probe: the features of the {role} image {keys[i]!r} hold NaN or infinity: the model diverged or was loaded "
                       "wrongly; check its checkpoint")


# ---- logistic regression


def fit(x: np.ndarray, label: np.ndarray, strength: float) -> tuple[LogisticRegression, bool]:
    """A logistic regression that minimises Σ loss + strength/2 ‖w‖², and whether L-BFGS converged.

    scikit-learn has stopped at 1e-4 of the gradient of the mean loss since 1.4, of the sum when the paper was written. The
    mean's gradient is below 1e-4 before the first step when a thousand classes meet unit features: nothing would be learnt.
    """
    model = LogisticRegression(C=1 / strength, solver="lbfgs", max_iter=1000, tol=1e-4 / len(x))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # one example a class is few-shot, no mistake
        model.fit(x, label)
    for w in caught:
        if not issubclass(w.category, ConvergenceWarning):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def sweep(score: Callable[[float], float]) -> dict[int, float]:
    """Scores of strengths 10^(i/8) by i: seven, two decades apart, then ever closer around the best, down to 1/8 decade."""
    tried = {i: score(10 ** (i / 8)) for i in range(-ENDS, ENDS + 1, 16)}
    for step in (8, 4, 2, 1):
        peak = best(tried)
        tried |= {i: score(10 ** (i / 8)) for i in (peak - step, peak + step) if abs(i) <= ENDS}
    return tried


def best(tried: Mapping[int, float]) -> int:
    """Of the highest score; the strongest among equals."""
    return max(tried, key=lambda i: (tried[i], i))


def linear(train: Train, views: Sequence[np.ndarray], seed: int = 0) -> Probe:
    """The linear probe. views: (M, D) each. Raises BadInput when no class has an image to spare for validation.

    Facts: `strength` is λ, `strength_at_end` that it is the weakest or the strongest tried, so that the best may lie
    outside; `converged` is of the final fit, `unconverged` counts those of the sweep.
    """
    held = validation(train, seed)
    x, label, failed = train.x[~held], train.label[~held], []

    def score(strength: float) -> float:
        model, converged = fit(x, label, strength)
        failed.append(not converged)
        right = sum(int((model.predict(train.x[rows]) == train.label[rows]).sum())
                    for rows in blocks(np.flatnonzero(held), train.classes))
        return right / int(held.sum())

    tried = sweep(score)
    i = best(tried)
    model, converged = fit(train.x, train.label, 10 ** (i / 8))
    facts = {"n_train": len(train.x), "n_validation": int(held.sum()), "validation_accuracy": tried[i], "strength": 10 ** (i / 8),
             "strength_at_end": abs(i) == ENDS, "converged": converged, "unconverged": sum(failed), "fits": len(failed)}
    return Probe([answers(model, view, train.classes) for view in views], facts)


def few_shot(train: Train, views: Sequence[np.ndarray], shots: Sequence[int] = SHOTS, draws: int = 3, seed: int = 0,
             strength: float = 1.0) -> dict[int, list[Probe]]:
    """By shots, one probe a draw, for each number of shots that every class of the training set can give.

    A draw's smaller sets lie within its larger ones. There are no images to validate on, so the strength is fixed, at
    scikit-learn's default.
    """
    most = np.unique(train.label, return_counts=True)[1].min()
    out: dict[int, list[Probe]] = {n: [] for n in shots if n <= most}
    for draw in range(draws):
        place = places(train, seed, "few-shot", str(draw))
        for n, probes in out.items():
            model, converged = fit(train.x[place < n], train.label[place < n], strength)
            probes.append(Probe([answers(model, view, train.classes) for view in views],
                                {"n_train": int((place < n).sum()), "strength": strength, "converged": converged}))
    return out


def places(train: Train, seed: int, *names: str) -> np.ndarray:
    """(N,) the place of each sample in its class, from 0, when the samples of a class are shuffled by keyed hash."""
    drawn = np.array([keyed.integer(seed, "probe", *names, key) for key in train.keys])
    order = np.lexsort((drawn, train.label))
    ordered = train.label[order]
    out = np.empty(len(order), dtype=np.int64)
    out[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return out


def validation(train: Train, seed: int) -> np.ndarray:
    """(N,) bool: a fifth of each class, at least one image of it and never the last."""
    count = np.bincount(train.label, minlength=train.classes)
    if count.max() < 2:
        raise BadInput(f"probe: no class has two training images ({len(train.keys)} images, one a class), so none is left to choose the "
                       "linear probe's strength by; give more images, or measure knn and few_shot only")
    share = np.minimum(np.maximum(1, (count / 5).round()), count - 1)
    return places(train, seed, "validation") < share[train.label]


def answers(model: LogisticRegression, x: np.ndarray, classes: int) -> np.ndarray:
    """(M, min(10, classes)) class ids, the most likely first. Classes that the model never saw come last."""
    out = []
    for rows in blocks(np.arange(len(x)), classes):
        margin = model.decision_function(x[rows])
        score = np.full((len(rows), classes), -np.inf, dtype=margin.dtype)
        score[:, model.classes_] = margin if margin.ndim == 2 else np.stack([-margin, margin], 1)
        out.append(ranked(score))
    return np.concatenate(out)


def ranked(score: np.ndarray) -> np.ndarray:
    """(M, C) -> (M, min(10, C)): columns by falling score; ties go to the smaller one."""
    return np.argsort(-score, axis=1, kind="stable")[:, :TOP]


def blocks(rows: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """`rows` in parts, so that `width` numbers for each take bounded memory."""
    step = max(1, BLOCK // width)
    return (rows[i:i + step] for i in range(0, len(rows), step))


# ---- neighbours


def knn(train: Train, views: Sequence[np.ndarray], k: int = 200, temperature: float = 0.1) -> Probe:
    """Each of the k most similar training images votes for its class with weight exp(cosine / temperature). views: (M, D) each."""
    k, near = min(k, len(train.x)), searcher(torch.from_numpy(train.x))
    found = [votes(train, view, near(torch.from_numpy(view), k), temperature) for view in views]
    return Probe(found, {"n_train": len(train.x), "k": k, "temperature": temperature})


def votes(train: Train, x: np.ndarray, near: np.ndarray, temperature: float) -> np.ndarray:
    """x (M, D) and its neighbours near (M, k) -> (M, min(10, classes)) class ids, the most voted for first."""
    out = []
    for rows in blocks(np.arange(len(x)), max(2 * near.shape[1] * x.shape[1], train.classes)):
        ids = near[rows]
        cosine = (train.x[ids].astype(np.float64) @ x[rows, :, None])[..., 0].round(6)  # as the search holds them, for ties
        weight = np.exp((cosine - cosine.max(1, keepdims=True)) / temperature)  # a factor of the whole row: no overflow
        cell = np.arange(len(rows))[:, None] * train.classes + train.label[ids]
        score = np.bincount(cell.ravel(), weight.ravel(), minlength=len(rows) * train.classes).reshape(len(rows), -1)
        out.append(ranked(score))
    return np.concatenate(out)


# ---- attack success through a probe


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked of every kind of probe: `views` are the clean test images, then those under each of the named targets."""

    train: Train
    views: list[np.ndarray]
    label: np.ndarray
    targets: dict[str, int]
    seed: int

    def numbers(self, found: Probe) -> dict[str, Any]:
        clean, *hit = found.ranked
        each = {name: success(self.label, clean, h, target) for (name, target), h in zip(self.targets.items(), hit, strict=True)}
        return measure(self.label, clean) | flat(each)

    def all(self, found: Probe) -> dict[str, Any]:
        return self.numbers(found) | found.facts


def averaged(task: Task) -> dict[str, Any]:
    out = {}
    for n, probes in few_shot(task.train, task.views, seed=task.seed).items():
        out[str(n)] = over_draws([task.numbers(p) for p in probes]) | probes[0].facts | {
            "converged": all(p.facts["converged"] for p in probes), "draws": len(probes)}
    return out


def over_draws(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each fraction's mean, and beside it its sample sd as <name>_sd; intervals, which are of single draws, are left out."""
    out: dict[str, Any] = {}
    for name, first in found[0].items():
        values = [f[name] for f in found]
        if isinstance(first, Mapping):
            out[name] = over_draws(values)
        elif isinstance(first, float):
            out |= {name: statistics.fmean(values), f"{name}_sd": statistics.stdev(values) if len(values) > 1 else None}
        elif not isinstance(first, list):
            out[name] = first
    return out


KINDS: Mapping[str, Callable[[Task], dict[str, Any]]] = {
    "linear_probe": lambda task: task.all(linear(task.train, task.views, task.seed)),
    "knn": lambda task: task.all(knn(task.train, task.views)),
    "few_shot": averaged}


def probe(train: Features, test: Features, classes: int, targets: Mapping[str, int] | Sequence[int] = (),
          kinds: Iterable[str] = tuple(KINDS), seed: int = 0) -> dict[str, Any]:
    """Accuracy of classifiers trained on the clean features of `train`, and attack success on `test.hit`, for each kind.

    targets: the class that each threat of `test.hit` aims at, by the threat's name or in order. As in zero-shot, numbers of
    the first threat stand flat, and under "threats" those of each, if several. "few_shot" has a dict for each number of shots.
    Raises BadInput when a set is empty, unlabelled or of other classes, when features are not finite, when training has a
    single class, and when every test image is of the target.
    """
    kinds = list(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise BadInput(f"probe: there is no kind {unknown[0]!r}; choose among {', '.join(KINDS)}")
    named = dict(targets) if isinstance(targets, Mapping) else {str(i): target for i, target in enumerate(targets)}
    if len(named) != len(test.hit):
        raise BadInput(f"probe: {len(named)} targets for {len(test.hit)} triggered views of the test set; give one for each")
    for name, target in named.items():
        if not 0 <= target < classes:
            raise BadInput(f"probe: the target {target} of threat {name!r} is no class; classes are 0 to {classes - 1}")
    check("test", test.keys, test.clean, test.labels, classes)
    for hit in test.hit:
        finite("triggered test", test.keys, hit)
    if train.clean.shape[1:] != test.clean.shape[1:] and len(train.keys):
        raise BadInput(f"probe: training features have {train.clean.shape[1]} dimensions, test features {test.clean.shape[1]}; take both "
                       "from one model")
    views = [np.asarray(z, dtype=np.float32) for z in (test.clean, *test.hit)]
    task = Task(labelled(train.keys, train.clean, train.labels, classes), views, test.labels, named, seed)
    return {kind: KINDS[kind](task) for kind in kinds}
