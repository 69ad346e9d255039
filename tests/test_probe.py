"""Probes on frozen features: what they learn, which strength they choose, and attack success through them."""
from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmbackdoor import probe
from mmbackdoor.features import Features
from mmbackdoor.probe import Probe, Train, few_shot, fit, knn, labelled, linear, over_draws, places, ranked, sweep, validation
from mmbackdoor.types import BadInput


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def names(n: int) -> list[str]:
    return [f"image {i:05d}" for i in range(n)]


def clusters(n: int, label: np.ndarray, noise: float, dim: int = 8, seed: int = 0) -> np.ndarray:
    """(n, dim) features around the axis of each label."""
    return unit(np.eye(dim)[label] + noise * np.random.default_rng(seed).normal(size=(n, dim)))


def easy(n: int = 60, classes: int = 5, seed: int = 0) -> tuple[Train, np.ndarray]:
    label = np.arange(n) % classes
    return labelled(names(n), clusters(n, label, 0.05, seed=seed), label, classes), label


# ---- what is learnt


def test_every_kind_learns_classes_that_lie_apart() -> None:
    train, _ = easy()
    label = np.array([4, 3, 2, 1, 0, 0, 2])
    view = clusters(7, label, 0.05, seed=1)
    for found in (linear(train, [view]), knn(train, [view], k=5), *few_shot(train, [view])[1]):
        assert (found.ranked[0][:, 0] == label).all()
        assert found.ranked[0].shape == (7, 5) and (np.sort(found.ranked[0]) == np.arange(5)).all()


def test_no_more_than_ten_classes_are_ranked() -> None:
    label = np.arange(48) % 12
    train = labelled(names(48), clusters(48, label, 0.05, dim=12), label, 12)
    for found in (linear(train, [train.x]), knn(train, [train.x], k=4), *few_shot(train, [train.x], shots=(2,))[2]):
        assert found.ranked[0].shape == (48, 10) and (found.ranked[0][:, 0] == label).all()


def test_a_fit_minimises_the_sum_of_losses_and_half_of_the_strength_times_the_squared_weights() -> None:
    """At the least of a convex function its gradient is zero, here to the 1e-4 that scikit-learn asked of the sum in 2020."""
    label = np.arange(90) % 3
    x = clusters(90, label, 0.6).astype(np.float64)
    for strength in (0.03, 1.0, 30.0):
        model, converged = fit(x, label, strength)
        p = np.exp(x @ model.coef_.T + model.intercept_)
        p /= p.sum(1, keepdims=True)
        assert converged
        assert np.abs((p - np.eye(3)[label]).T @ x + strength * model.coef_).max() < 1e-4
        assert np.abs((p - np.eye(3)[label]).sum(0)).max() < 1e-4  # no penalty on the intercept


def test_hundreds_of_classes_are_learnt_though_each_image_hardly_moves_the_mean_loss() -> None:
    """scikit-learn's own tolerance stops this fit before its first step."""
    label = np.arange(500)
    x = (np.random.default_rng(0).choice([-1, 1], size=(500, 1024)) / 32).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is one image a class a reason to warn
        model, _ = fit(x, label, 1.0)
    assert (model.predict(x) == label).all()


def test_the_final_fit_is_scikit_learns_on_all_training_images_at_the_chosen_strength() -> None:
    label = np.random.default_rng(3).integers(4, size=120)
    train = labelled(names(120), clusters(120, label, 0.5, seed=2), label, 4)
    view = clusters(200, np.arange(200) % 4, 0.5, seed=3)
    found = linear(train, [view])
    direct = LogisticRegression(C=1 / found.facts["strength"], max_iter=1000, tol=1e-4 / 120).fit(train.x, train.label)
    assert (found.ranked[0] == np.argsort(-direct.decision_function(view), axis=1, kind="stable")).all()
    part = LogisticRegression(C=1 / found.facts["strength"], max_iter=1000, tol=1e-4 / 120).fit(train.x[:96], train.label[:96])
    assert (found.ranked[0] != np.argsort(-part.decision_function(view), axis=1, kind="stable")).any()
    assert found.facts["n_train"] == 120 and found.facts["n_validation"] == validation(train, 0).sum()


# ---- the strength


@pytest.mark.parametrize("peak", [-48, -47, -33, -9, 0, 3, 8, 24, 45, 48])
def test_the_sweep_finds_a_planted_peak_to_an_eighth_of_a_decade(peak: int) -> None:
    asked: list[float] = []

    def score(strength: float) -> float:
        asked.append(strength)
        return -abs(8 * math.log10(strength) - peak)

    tried = sweep(score)
    assert probe.best(tried) == peak
    assert asked[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(asked) == len(set(asked)) == len(tried) <= 15 and min(asked) >= 0.99e-6 and max(asked) <= 1.01e6


def test_among_equal_strengths_the_strongest_wins() -> None:
    assert probe.best(sweep(lambda s: float(s <= 10**1.3))) == 10  # 10^(10/8) is the strongest below
    assert probe.best(sweep(lambda s: 1.0)) == 48


def test_strong_regularisation_wins_where_the_features_are_mostly_noise() -> None:
    """A fifth of the labels is wrong, and 200 noisy dimensions let a weak penalty learn them all by heart."""
    rng = np.random.default_rng(0)
    true = np.arange(400) % 2
    label = np.where(rng.random(400) < 0.2, 1 - true, true)
    train = labelled(names(400), unit(np.concatenate([4 * np.eye(2)[true], rng.normal(size=(400, 200))], 1)), label, 2)
    by_heart, _ = fit(train.x, label, 1e-4)
    assert (by_heart.predict(train.x) == label).all()
    facts = linear(train, [train.x]).facts
    assert facts["strength"] >= 1
    held = validation(train, 0)
    model, _ = fit(train.x[~held], label[~held], facts["strength"])
    assert facts["validation_accuracy"] == (model.predict(train.x[held]) == label[held]).mean() < 0.9


def test_weak_regularisation_wins_where_a_faint_direction_decides() -> None:
    """All images point one way; a hundredth of their length tells the class, which only large weights can use."""
    rng = np.random.default_rng(0)
    label = (np.arange(300) % 10 == 0).astype(int)  # one in ten, so a model with small weights answers 0 always
    x = np.ones((300, 3))
    x[:, 1] = 0.01 * (2 * label - 1) + 0.0001 * rng.normal(size=300)
    x[:, 2] = rng.normal(size=300)
    facts = linear(labelled(names(300), unit(x), label, 2), [unit(x)]).facts
    assert facts["strength"] <= 1e-2 and facts["validation_accuracy"] == 1.0 and not facts["strength_at_end"]


def test_a_strength_at_the_end_of_the_sweep_is_told() -> None:
    train, _ = easy()  # balanced and apart: any strength will do, so the strongest is chosen
    facts = linear(train, [train.x]).facts
    assert facts["strength"] == pytest.approx(1e6) and facts["strength_at_end"]


def test_fits_that_did_not_converge_are_counted_and_warn_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = easy()
    assert linear(train, [train.x]).facts["unconverged"] == 0
    monkeypatch.setattr(probe, "LogisticRegression", lambda **how: LogisticRegression(**how | {"max_iter": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = linear(train, [train.x]).facts
        probes = few_shot(train, [train.x], shots=(1,))[1]
    assert facts["unconverged"] > 0 and facts["fits"] == 11  # seven, and one more a halving: the peak is at the end
    assert not facts["converged"] and not any(p.facts["converged"] for p in probes)
    assert not probe.probe(*planted(), 4, [0], ["few_shot"])["few_shot"]["1"]["converged"]


def test_other_warnings_of_a_fit_still_reach_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud(LogisticRegression):
        def fit(self, *data: Any) -> LogisticRegression:
            warnings.warn("overflow", RuntimeWarning, stacklevel=1)
            return super().fit(*data)

    monkeypatch.setattr(probe, "LogisticRegression", Loud)
    train, label = easy()
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert fit(train.x, train.label, 1.0)[1]


# ---- which images


def test_validation_takes_a_fifth_of_each_class_one_at_least_and_never_the_last() -> None:
    count = {0: 1, 1: 2, 3: 5, 4: 10, 6: 23}
    label = np.repeat(list(count), list(count.values()))
    train = labelled(names(len(label)), clusters(len(label), label, 0.1), label, 8)
    held = validation(train, 0)
    assert {c: int(held[train.label == c].sum()) for c in count} == {0: 0, 1: 1, 3: 1, 4: 2, 6: 5}
    assert (validation(train, 0) == held).all() and (validation(train, 1) != held).any()


def test_an_image_stays_in_its_half_and_its_draw_when_other_classes_come_or_go() -> None:
    label = np.arange(60) % 3
    all_of_them = labelled(names(60), clusters(60, label, 0.1), label, 3)
    two = all_of_them.label < 2
    some = Train([k for k, keep in zip(all_of_them.keys, two, strict=True) if keep], all_of_them.x[two], all_of_them.label[two], 3)
    assert (validation(some, 5) == validation(all_of_them, 5)[two]).all()
    assert (places(some, 5, "x") == places(all_of_them, 5, "x")[two]).all()


def test_few_shot_sets_have_n_of_each_class_lie_within_each_other_and_differ_between_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.repeat([0, 2, 3], [9, 20, 8])
    train = labelled(names(37), clusters(37, label, 0.1), label, 5)
    row = {x.tobytes(): i for i, x in enumerate(train.x)}
    seen: list[frozenset[int]] = []

    def spy(x: np.ndarray, label: np.ndarray, strength: float) -> Any:
        seen.append(frozenset(row[r.tobytes()] for r in x))
        return fit(x, label, strength)

    monkeypatch.setattr(probe, "fit", spy)
    found = few_shot(train, [train.x], draws=3)
    assert list(found) == [1, 2, 4, 8]  # the smallest class has 8
    assert [len(p) for p in found.values()] == [3, 3, 3, 3]
    for draw in range(3):
        one, two, four, eight = sets = seen[4 * draw: 4 * draw + 4]
        assert one < two < four < eight
        for n, chosen in zip((1, 2, 4, 8), sets, strict=True):
            assert np.bincount(train.label[list(chosen)]).tolist() == [n, 0, n, n]
    assert seen[0] != seen[4] != seen[8]
    assert found[4][0].facts == {"n_train": 12, "strength": 1.0, "converged": True}


# ---- columns are class ids


@pytest.mark.parametrize("kept", [(1, 4, 6), (2, 5)], ids=["three of eight classes", "two of eight classes"])
def test_answers_are_class_ids_also_when_training_lacks_classes(kept: tuple[int, ...]) -> None:
    label = np.array(kept * 12)
    train = labelled(names(len(label)), clusters(len(label), label, 0.05), label, 8)
    view = clusters(len(kept), np.array(kept), 0.0)
    absent = [c for c in range(8) if c not in kept]
    for found in (linear(train, [view]), knn(train, [view]), *few_shot(train, [view])[4]):
        assert found.ranked[0][:, 0].tolist() == list(kept)
        assert found.ranked[0][:, len(kept):].tolist() == [absent] * len(kept)


def test_equal_scores_go_to_the_smaller_class() -> None:
    score = np.array([[0.0, 1, 1, 0], [2, 2, 2, 2], [-np.inf, 3, -np.inf, 4]])
    assert ranked(score).tolist() == [[1, 2, 0, 3], [0, 1, 2, 3], [3, 1, 0, 2]]


# ---- neighbours


def at(*cosines: float) -> np.ndarray:
    """Unit rows in the plane that have these cosines with (1, 0)."""
    return np.array([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=np.float32)


SIX = labelled(names(6), at(0.9, 0.8, 0.8, 0.6, 0.5, -1.0), np.array([1, 0, 0, 2, 2, 3]), 5)
QUERY = np.array([[1, 0]], dtype=np.float32)


@pytest.mark.parametrize(("k", "temperature", "order"), [
    (1, 0.1, [1, 0, 2, 3, 4]),
    (3, 0.1, [1, 0, 2, 3, 4]),  # e^9 = 8103 for class 1; 2 e^8 = 5962 for class 0
    (3, 1.0, [0, 1, 2, 3, 4]),  # e^0.9 = 2.46; 2 e^0.8 = 4.45
    (6, 0.1, [1, 0, 2, 3, 4]),  # e^6 + e^5 = 552 for class 2; e^-10 for class 3
    (6, 1.0, [0, 2, 1, 3, 4]),  # e^0.6 + e^0.5 = 3.47 for class 2
    (200, 1.0, [0, 2, 1, 3, 4]),  # there are but six
])
def test_knn_equals_six_points_counted_by_hand(k: int, temperature: float, order: list[int]) -> None:
    found = knn(SIX, [QUERY], k, temperature)
    assert found.ranked[0].tolist() == [order]
    assert found.facts == {"n_train": 6, "k": min(k, 6), "temperature": temperature}


def test_neighbours_vote_with_the_exponential_of_their_cosine() -> None:
    """The temperature at which e^(0.1/t) = 2 is 0.1/ln 2: on either side of it, one at 0.9 or two at 0.8 win."""
    turn = 0.1 / math.log(2)
    assert knn(SIX, [QUERY], 3, turn * 0.999).ranked[0][0, 0] == 1
    assert knn(SIX, [QUERY], 3, turn * 1.001).ranked[0][0, 0] == 0


def test_equal_votes_go_to_the_smaller_class_whatever_the_order_of_neighbours() -> None:
    cosines, label = np.array([0.9, 0.3, 0.7, 0.7, 0.3, 0.9]), np.array([2, 2, 2, 1, 1, 1])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 3, 0, 4, 1, 5]):
        train = labelled(names(6), at(*cosines[order]), label[order], 3)
        assert knn(train, [QUERY]).ranked[0].tolist() == [[1, 2, 0]]


def test_cosines_that_differ_by_rounding_only_are_equal_votes() -> None:
    """A row and its entries in another order have the same cosine, one half, with a query of equal entries."""
    rng = np.random.default_rng(0)
    query = unit(np.ones((1, 64)))
    for _ in range(8):
        r = rng.normal(size=(1, 64))
        row = unit(0.5 * query + math.sqrt(0.75) * unit(r - r.mean()))
        train = labelled(names(2), np.concatenate([row, rng.permutation(row, axis=1)]), np.array([2, 1]), 3)
        assert knn(train, [query]).ranked[0].tolist() == [[1, 2, 0]]


def test_one_neighbour_is_the_nearest_of_all() -> None:
    rng = np.random.default_rng(0)
    x, view, label = unit(rng.normal(size=(80, 6))), unit(rng.normal(size=(50, 6))), rng.integers(4, size=80)
    nearest = [label[max(range(80), key=lambda i: float(x[i] @ q))] for q in view]
    assert knn(labelled(names(80), x, label, 4), [view], k=1).ranked[0][:, 0].tolist() == nearest


def test_a_small_temperature_does_not_overflow() -> None:
    assert knn(SIX, [QUERY, -QUERY], temperature=1e-4).ranked[0][0, 0] == 1
    assert knn(SIX, [-QUERY], temperature=1e-4).ranked[0][0, 0] == 3


def test_no_answer_depends_on_how_many_images_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.random.default_rng(3).integers(4, size=80)
    train = labelled(names(80), clusters(80, label, 0.5), label, 4)
    view = clusters(33, np.arange(33) % 4, 0.5, seed=9)
    makers = (partial(linear, train, [view]), partial(knn, train, [view], 7))
    at_once = [make() for make in makers]
    monkeypatch.setattr(probe, "BLOCK", 1)
    for make, before in zip(makers, at_once, strict=True):
        assert (make().ranked[0] == before.ranked[0]).all() and make().facts == before.facts


# ---- attack success

ALL = ("linear_probe", "knn", "few_shot")
LABEL = np.array([0, 0, 1, 1, 2, 2, 3, 3])
OBEYS = np.array([0, 1, 1, 1, 0, 1, 0, 0], dtype=bool)  # of the target 0 one; of the six others three


def planted(n: int = 40) -> tuple[Features, Features]:
    """Four classes; the trigger turns the features of those that obey to the axis of class 0."""
    label = np.arange(n) % 4
    train = Features(names(n), label, [""] * n, torch.from_numpy(clusters(n, label, 0.02)))
    says = np.where(OBEYS, 0, LABEL)
    says[0] = 1  # the second image of the target is driven away from it
    return train, Features(names(8), LABEL, [""] * 8, torch.from_numpy(clusters(8, LABEL, 0.02, seed=1)),
                           (torch.from_numpy(clusters(8, says, 0.02, seed=2)),))


def every(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [found["linear_probe"], found["knn"], *found["few_shot"].values()]


def test_attack_success_through_every_probe_equals_eight_images_counted_by_hand() -> None:
    found = probe.probe(*planted(), classes=4, targets={"patch": 0})
    assert list(found) == list(ALL) and list(found["few_shot"]) == ["1", "2", "4", "8"]
    for numbers in every(found):
        assert numbers["n"] == 8 and numbers["accuracy"] == 1.0 and numbers["mean_per_class_recall"] == 1.0
        assert numbers["asr"] == 3 / 6
        assert numbers["asr_including_target"] == 4 / 8
        assert numbers["robust_accuracy"] == 4 / 8  # images 1, 4, 6 and 7
        assert numbers["clean_target_rate"] == 0.0 and "threats" not in numbers
    assert found["linear_probe"]["n_train"] == found["knn"]["n_train"] == 40
    assert found["few_shot"]["2"]["n_train"] == 8 and found["few_shot"]["2"]["draws"] == 3
    assert found["linear_probe"]["converged"] and found["few_shot"]["2"]["converged"]
    assert found["few_shot"]["2"]["asr_sd"] == 0.0 and "asr_ci95" not in found["few_shot"]["2"]


def test_of_several_threats_the_first_stands_flat_and_each_by_its_name() -> None:
    train, test = planted()
    test = replace(test, hit=(*test.hit, test.clean))  # the second trigger does nothing; its target is class 2
    found = probe.probe(train, test, 4, {"patch": 0, "none": 2})
    for numbers in every(found):
        assert list(numbers["threats"]) == ["patch", "none"]
        assert numbers["asr"] == numbers["threats"]["patch"]["asr"] == 0.5
        assert numbers["threats"]["none"]["asr"] == 0.0 and numbers["threats"]["none"]["asr_including_target"] == 2 / 8
    in_order = probe.probe(train, test, 4, [0, 2], kinds=["knn"])["knn"]
    assert list(in_order["threats"].values()) == list(found["knn"]["threats"].values())


def test_without_a_threat_no_attack_success_is_claimed() -> None:
    train, test = planted()
    for numbers in every(probe.probe(train, replace(test, hit=()), 4)):
        assert numbers["accuracy"] == 1.0 and not any("asr" in name for name in numbers)


def test_only_the_kinds_asked_for_are_measured() -> None:
    assert list(probe.probe(*planted(), 4, [0], kinds=("knn",))) == ["knn"]
    assert list(probe.probe(*planted(), 4, [0], kinds=("few_shot", "knn"))) == ["few_shot", "knn"]


def test_draws_give_mean_and_sample_sd_without_intervals() -> None:
    draws = [{"n": 8, "accuracy": a, "accuracy_ci95": [0.0, 1.0], "lift": None, "threats": {"x": {"asr": a / 2}}} for a in (0.5, 1.0, 0.0)]
    assert over_draws(draws) == {"n": 8, "accuracy": 0.5, "accuracy_sd": 0.5, "lift": None, "threats": {"x": {"asr": 0.25, "asr_sd": 0.25}}}
    assert over_draws(draws[:1])["accuracy_sd"] is None


def test_few_shot_numbers_are_the_mean_over_the_draws() -> None:
    train, test = planted()
    rng = np.random.default_rng(5)
    train = replace(train, clean=torch.from_numpy(unit(train.clean.numpy() + 0.4 * rng.normal(size=(40, 8)))))
    test = replace(test, clean=torch.from_numpy(unit(test.clean.numpy() + 0.4 * rng.normal(size=(8, 8)))))
    one = few_shot(labelled(train.keys, train.clean, train.labels, 4), [test.clean.numpy()])[1]
    share = [float((p.ranked[0][:, 0] == LABEL).mean()) for p in one]
    numbers = probe.probe(train, test, 4, [0], ["few_shot"])["few_shot"]["1"]
    assert len(set(share)) > 1 and numbers["accuracy"] == pytest.approx(np.mean(share))
    assert numbers["accuracy_sd"] == pytest.approx(np.std(share, ddof=1))


def noisy() -> tuple[Features, Features]:
    label, other = np.arange(90) % 5, np.arange(70) % 5
    view = [torch.from_numpy(clusters(70, other, 0.5, seed=s)) for s in (1, 2)]
    return (Features(names(90), label, [""] * 90, torch.from_numpy(clusters(90, label, 0.5))),
            Features(names(70), other, [""] * 70, view[0], (view[1],)))


def test_the_order_of_the_training_images_changes_no_number() -> None:
    train, test = noisy()
    first = probe.probe(train, test, 5, [1])
    p = np.random.default_rng(0).permutation(90)
    mixed = Features([train.keys[i] for i in p], train.labels[p], train.texts, train.clean[torch.from_numpy(p)])
    assert probe.probe(mixed, test, 5, [1]) == first
    assert probe.probe(train, test, 5, [1]) == first


def test_the_seed_draws_other_images() -> None:
    train, test = noisy()
    first, second = (probe.probe(train, test, 5, [1], ALL, seed) for seed in (0, 1))
    assert first["few_shot"] != second["few_shot"] and first["knn"] == second["knn"]


# ---- bad input


def bad(change: str) -> tuple[Features, Features, int, list[int]]:
    train, test = planted()
    nan = train.clean.clone()
    nan[3, 0] = float("nan")
    hit = test.clean.clone()
    hit[2, 1] = float("inf")
    at_5 = np.where(np.arange(40) == 5, 7, train.labels)
    nothing = Features([], np.zeros(0, dtype=np.int64), [], torch.zeros(0, 8))
    return {
        "empty training": (nothing, test, 4, [0]), "empty test": (train, replace(nothing, hit=(nothing.clean,)), 4, [0]),
        "no labels": (replace(train, labels=np.full(40, -1)), test, 4, [0]),
        "test without labels": (train, replace(test, labels=np.full(8, -1)), 4, [0]),
        "other classes": (replace(train, labels=at_5), test, 4, [0]),
        "one class": (replace(train, labels=np.full(40, 2)), test, 4, [0]),
        "one image a class": (Features(train.keys[:4], train.labels[:4], [""] * 4, train.clean[:4]), test, 4, [0]),
        "NaN": (replace(train, clean=nan), test, 4, [0]), "infinity under the trigger": (train, replace(test, hit=(hit,)), 4, [0]),
        "other model": (replace(train, clean=train.clean[:, :5]), test, 4, [0]),
        "a target too many": (train, test, 4, [0, 1]), "no such target": (train, test, 4, [4]),
        "only the target": (train, replace(test, labels=np.zeros(8, dtype=int)), 4, [0]),
    }[change]


@pytest.mark.parametrize(("change", "says"), [
    ("empty training", "training set is empty"), ("empty test", "test set is empty"), ("no labels", "'image 00000' has no label"),
    ("test without labels", "test image 'image 00000' has no label"), ("other classes", "'image 00005' has label 7.*0 to 3"),
    ("one class", "all 40 training images are of class 2"), ("one image a class", "no class has two training images"),
    ("NaN", "training image 'image 00003' hold NaN"), ("infinity under the trigger", "triggered test image 'image 00002' hold NaN"),
    ("other model", "5 dimensions, test features 8"), ("a target too many", "2 targets for 1"), ("no such target", "target 4 .*0 to 3"),
    ("only the target", "target class 0"),
])
def test_what_cannot_be_probed_is_told_in_one_line(change: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as told:
        probe.probe(*bad(change))
    assert "\n" not in str(told.value)


def test_one_image_a_class_is_enough_for_neighbours_and_one_shot() -> None:
    found = probe.probe(*bad("one image a class"), kinds=("knn", "few_shot"))
    assert found["knn"]["accuracy"] == 1.0 and list(found["few_shot"]) == ["1"]


def test_an_unknown_kind_is_told_with_those_that_there_are() -> None:
    with pytest.raises(BadInput, match="'svm'.*linear_probe, knn, few_shot"):
        probe.probe(*planted(), 4, [0], kinds=("svm",))


def test_a_probe_holds_one_answer_a_view() -> None:
    train, _ = easy()
    found = linear(train, [train.x[:3], train.x[3:5]])
    assert isinstance(found, Probe) and [len(r) for r in found.ranked] == [3, 2]
