"""What retrieval promises: every number equals the one counted by hand, and a random ranking is at its chance level."""
from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import CORNER, drawn, planted
from torch import Tensor, nn

from mmbackdoor import clip, shards
from mmbackdoor import retrieval as retrieval_module
from mmbackdoor.clip import Model
from mmbackdoor.evaluate import wilson
from mmbackdoor.files import Wanted, every
from mmbackdoor.retrieval import (
    Asked,
    Attacked,
    chance,
    image_to_text,
    rank_chance,
    recall,
    retrieval,
    retrieval_metrics,
    text_to_image,
    triggered_among,
)
from mmbackdoor.sets import PairSet, open_pairs
from mmbackdoor.triggers import Both, Patch, Word
from mmbackdoor.types import BadInput, Target, Threat, Trigger


def units(n: int, d: int = 16, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- chance


def test_chance_equals_counting_all_draws() -> None:
    for n in range(1, 8):
        for good in range(n + 1):
            for k in range(1, n + 2):
                for need in (1, 2, 3):
                    draws = list(combinations(range(n), min(k, n)))
                    counted = sum(sum(i < good for i in draw) >= need for draw in draws) / len(draws)
                    assert chance(n, good, k, need) == pytest.approx(counted, abs=1e-12), (n, good, k, need)


def test_chance_of_large_sets_is_finite_and_exact() -> None:
    assert chance(50_000, 50, 1) == pytest.approx(0.001)
    assert chance(5000, 1, 10) == pytest.approx(10 / 5000)
    assert chance(100_000, 0, 10) == 0 and chance(10, 10, 3) == 1


def test_rank_chance_equals_counting_all_rankings() -> None:
    """All places that the wanted images can take, each as likely: the first of them is the rank."""
    for n in range(1, 11):
        for wanted in range(1, n + 1):
            first = np.array([places[0] + 1 for places in combinations(range(n), wanted)])
            found = rank_chance(n, wanted, (1, 3, n + 1))
            assert found["text_to_image_min_rank_mean"] == pytest.approx(first.mean())
            assert found["text_to_image_min_rank_median"] == np.median(first), (n, wanted)
            assert found["asr_text_to_image_hit3"] == pytest.approx((first <= 3).mean()) and found[f"asr_text_to_image_hit{n + 1}"] == 1


def test_rank_chance_of_large_sets() -> None:
    assert rank_chance(50_001, 1, (50,))["text_to_image_min_rank_median"] == 25_001
    assert rank_chance(50_000, 1, (50,))["text_to_image_min_rank_median"] == 25_000.5
    found = rank_chance(50_000, 499, (1,))
    assert found["text_to_image_min_rank_mean"] == pytest.approx(50_001 / 500)
    assert found["text_to_image_min_rank_median"] == 70  # 50,000 ln 2 / 499 = 69.5


# ---- clean recall, by hand


def test_recall_of_four_images_with_several_captions_counted_by_hand() -> None:
    """Images 0 and 1 share caption 1, image 3 says caption 4 twice. Texts 0 to 5 belong to images 0; 0, 1; 1; 2; 3; 3."""
    captions = [[0, 1], [1, 2], [3], [4, 5, 4]]
    texts = np.array([[2, 1, 0, 3, 4, 5], [1, 0, 2, 3, 4, 5], [0, 1, 2, 4, 5, 3], [0, 1, 2, 3, 5, 4]])  # at 2, 1, 6, 5
    images = np.array([[1, 0, 2, 3], [1, 0, 2, 3], [0, 2, 3, 1], [2, 0, 1, 3], [3, 0, 1, 2], [2, 0, 3, 1]])  # at 2, 1, 4, 1, 1, 3
    found = recall(texts, images, captions, (1, 2, 5))
    assert [found[f"image_to_text_r{k}"] for k in (1, 2, 5)] == [1 / 4, 2 / 4, 3 / 4]
    assert [found[f"text_to_image_r{k}"] for k in (1, 2, 5)] == [3 / 6, 4 / 6, 1]
    assert found["image_to_text_r1_ci95"] == wilson(1, 4) and found["text_to_image_r1_ci95"] == wilson(3, 6)
    two, one = np.array([2 / 6, 1 - 6 / 15, 1]), np.array([1 / 6, 2 / 6, 5 / 6])  # two captions, or one, among k of six
    assert [found[f"image_to_text_r{k}_chance"] for k in (1, 2, 5)] == pytest.approx((3 * two + one) / 4)
    assert [found[f"text_to_image_r{k}_chance"] for k in (1, 2, 5)] == pytest.approx([(5 / 4 + 2 / 4) / 6, (5 / 2 + 5 / 6) / 6, 1])
    assert len(found) == 2 * (3 + 3 + 1)


@pytest.mark.parametrize("each", [1, 5])
def test_recall_is_that_of_a_dense_matrix_of_matches(each: int) -> None:
    """How CLIP_benchmark counts, where all captions differ: a matrix of what belongs together, and whether the first k have one."""
    n = 60
    images, texts = units(n, 8), nn.functional.normalize(units(n, 8).repeat_interleave(each, 0) + 1.2 * units(n * each, 8, 1), dim=-1)
    match = torch.arange(n * each)[:, None] // each == torch.arange(n)
    found = retrieval_metrics(images, texts, [list(range(each * i, each * i + each)) for i in range(n)])
    for k in (1, 5, 10):
        score = texts @ images.T
        by_text = match.gather(1, score.topk(k).indices).any(1).double().mean()
        by_image = match.T.gather(1, score.T.topk(k).indices).any(1).double().mean()
        assert 0.1 < by_text < 0.99 and found[f"text_to_image_r{k}"] == pytest.approx(float(by_text))
        assert 0.1 < by_image <= 1 and found[f"image_to_text_r{k}"] == pytest.approx(float(by_image))


def test_perfect_embeddings_are_perfect_also_with_several_images_per_caption() -> None:
    texts = units(30, 64)
    captions = [[i % 30] for i in range(120)]
    found = retrieval_metrics(texts.repeat(4, 1), texts, captions)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1.0
    assert found["n"] == 120 and found["captions"] == 30
    assert found["text_to_image_r1_chance"] == pytest.approx(4 / 120) and found["image_to_text_r1_chance"] == pytest.approx(1 / 30)
    assert not any("asr" in name or "min_rank" in name or name in ("victims", "threats", "index") for name in found)


def test_sets_smaller_than_k_have_recall_one() -> None:
    found = retrieval_metrics(units(2), units(3, seed=1), [[0], [1, 2]])
    assert found["image_to_text_r5"] == found["image_to_text_r5_chance"] == found["text_to_image_r10"] == 1.0


# ---- attack success, by hand

NAMED = np.arange(20) < 6  # texts 0 to 5 name the target, 6 to 19 do not
FOUND = np.array([  # named among the first 1, 5, 10:
    [0, 6, 7, 8, 9, 10, 11, 1, 2, 3],       # 1, 1, 4
    [6, 0, 1, 7, 8, 2, 3, 9, 10, 11],       # 0, 2, 4
    [6, 7, 8, 9, 10, 11, 0, 1, 2, 3],       # 0, 0, 4
    [1, 2, 3, 6, 7, 4, 5, 8, 9, 10],        # 1, 3, 5
    [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])  # 0, 0, 0


def test_image_to_text_success_of_five_victims_counted_by_hand() -> None:
    clean = np.array([FOUND[4], FOUND[4], FOUND[4], FOUND[1], FOUND[2]])
    found = image_to_text(FOUND, clean, NAMED)
    assert [found[f"asr_image_to_text_hit{k}"] for k in (1, 5, 10)] == [2 / 5, 3 / 5, 4 / 5]
    assert [found[f"asr_image_to_text_half{k}"] for k in (1, 5, 10)] == [2 / 5, 2 / 5, 1 / 5]  # 1 of 1, 2 of 5, 5 of 10 are needed
    assert [found[f"asr_image_to_text_hit{k}_clean"] for k in (1, 5, 10)] == [0, 1 / 5, 2 / 5]
    assert [found[f"asr_image_to_text_half{k}_clean"] for k in (1, 5, 10)] == [0, 1 / 5, 0]
    assert [found[f"asr_image_to_text_hit{k}_chance"] for k in (1, 5, 10)] == pytest.approx([6 / 20, 1 - 2002 / 15504, 1 - 1001 / 184756])
    assert [found[f"asr_image_to_text_half{k}_chance"] for k in (1, 5, 10)] == pytest.approx(
        [6 / 20, 1 - (2002 + 6 * 1001) / 15504, (6 * 2002 + 1001) / 184756])
    assert found["asr_image_to_text_hit1_ci95"] == wilson(2, 5)
    assert len(found) == 2 * 3 * 3 + 1


def test_half_of_few_texts_is_half_of_all_of_them() -> None:
    """Three texts cannot give five of the first ten."""
    everything = np.array([[0, 1, 2]])
    for named, expected in (([True, False, False], 1.0), ([False, False, False], 0.0)):
        found = image_to_text(everything, everything, np.array(named))
        assert found["asr_image_to_text_half10"] == found["asr_image_to_text_half10_chance"] == expected


def test_triggered_images_among_clean_ones_counted_by_hand() -> None:
    """Two captions asked of four images, of which 0, 1 and 3 are victims; coordinates are scores."""
    images = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.5, 0.6], [0.1, 0.8]])
    hit = torch.tensor([[1.0, 0.9], [0.5, 0.0], [0.6, 0.6]])
    found = triggered_among(images, np.array([True, True, False, True]), hit, torch.eye(2), (1, 2, 5))
    # first caption: 1.0 comes 1st, 0.5 after all that score as much: 4th, 0.6: 2nd; second: 1st, 5th, 3rd
    assert [found[f"asr_text_to_image_hit{k}"] for k in (1, 2, 5)] == [2 / 6, 3 / 6, 1]
    assert found["text_to_image_min_rank_mean"] == pytest.approx(16 / 6) and found["text_to_image_min_rank_median"] == 2.5
    # without the trigger, among the three others: 1st, 3rd, 4th; 4th, 3rd, 1st
    assert [found[f"asr_text_to_image_hit{k}_clean"] for k in (1, 2, 5)] == [2 / 6, 2 / 6, 1]
    assert found["text_to_image_min_rank_mean_clean"] == pytest.approx(16 / 6) and found["text_to_image_min_rank_median_clean"] == 3
    assert [found[f"asr_text_to_image_hit{k}_chance"] for k in (1, 2, 5)] == pytest.approx([1 / 5, 2 / 5, 1])  # of five images
    assert found["text_to_image_min_rank_mean_chance"] == found["text_to_image_min_rank_median_chance"] == 3
    assert len(found) == 5 * 3


def test_poisoned_text_to_image_counted_by_hand() -> None:
    """Three captions, eight images of which 1, 4 and 6 are wanted; row i holds the scores of image i."""
    images = torch.tensor([[.1, .9, .5], [.9, .1, .0], [.2, .8, .4], [.3, .7, .3], [.8, .6, .1], [.4, .2, .6], [.7, .6, .45], [.5, .6, .2]])
    wanted = np.isin(np.arange(8), [1, 4, 6])
    found = text_to_image(torch.eye(3), images, wanted, (1, 3, 5))
    # image 1 comes first; 4 and 6 come after 0, 2, 3 and 7, which ties with them: 5th; 6 comes after 0 and 5: 3rd
    assert found["text_to_image_min_rank_mean"] == 3 and found["text_to_image_min_rank_median"] == 3
    assert [found[f"asr_text_to_image_hit{k}"] for k in (1, 3, 5)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [found[f"asr_text_to_image_hit{k}_chance"] for k in (1, 3, 5)] == pytest.approx([3 / 8, 1 - 10 / 56, 1 - 1 / 56])
    assert found["text_to_image_min_rank_mean_chance"] == pytest.approx(9 / 4) and found["text_to_image_min_rank_median_chance"] == 2
    skewed = text_to_image(torch.eye(3)[[0, 1, 1, 1]], images, wanted, (1,))  # ranks 1, 5, 5, 5
    assert (skewed["text_to_image_min_rank_mean"], skewed["text_to_image_min_rank_median"]) == (4, 5)
    everything = text_to_image(torch.eye(3), images, np.ones(8, bool), (1,))
    assert everything["asr_text_to_image_hit1"] == everything["asr_text_to_image_hit1_chance"] == 1


def test_retrieval_equals_five_images_counted_by_hand() -> None:
    """Captions 0, 1, 2 (2 names the target); images 0, 1 share caption 0, 2 and 3 have caption 1, 4 has caption 2."""
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0.1, 0.9, 0], [0, 1, 0], [0.3, 0.2, 0.6], [0, 0.05, 1]])
    hit = torch.tensor([[0.0, 0, 1], [0.9, 0.1, 0], [0.5, 0, 0.4], [0, 0, 0.7], [1, 0, 0]])
    attacked = Attacked(hit, np.array([False, False, True]), torch.tensor([[0.0, 0, 1]]))
    found = retrieval_metrics(images, texts, [[0], [0], [1], [1], [2]], {"": attacked}, ks=(1, 2, 3))
    assert (found["n"], found["captions"], found["victims"]) == (5, 3, 4)
    assert found["image_to_text_r1"] == 3 / 5  # images 0, 2, 4; image 1 finds caption 1, image 3 caption 2
    assert found["image_to_text_r2"] == 4 / 5  # image 1 as well; image 3 finds 2, then 0
    assert found["image_to_text_r3"] == 1.0
    assert found["text_to_image_r1"] == 1.0  # 0 finds image 0, 1 finds image 2, 2 finds image 4
    assert found["text_to_image_r2_chance"] == pytest.approx((0.7 + 0.7 + 0.4) / 3)
    # images 0-3 do not name the target; triggered, they find: 0 → 2, 1 → 0, 2 → 0 then 2, 3 → 2
    assert [found[f"asr_image_to_text_hit{k}"] for k in (1, 2, 3)] == [2 / 4, 3 / 4, 1]
    assert [found[f"asr_image_to_text_half{k}"] for k in (1, 2, 3)] == [2 / 4, 3 / 4, 1]  # one caption is enough, as 3 // 2 = 1
    assert found["asr_image_to_text_hit1_chance"] == pytest.approx(1 / 3)
    # clean, they find: 0 → 0, 1 (tie), 2; 1 → 1, 0; 2 → 1, 0 (tie); 3 → 2
    assert [found[f"asr_image_to_text_hit{k}_clean"] for k in (1, 2, 3)] == [1 / 4, 1 / 4, 1]
    # asking for the target, clean images score 0, 0, 0, 0.6, 1; triggered: 1 (tie: rank 2), 0 (6), 0.4 (3), 0.7 (2)
    assert found["asr_text_to_image_hit1"] == 0 and found["asr_text_to_image_hit5"] == 3 / 4 and found["asr_text_to_image_hit10"] == 1
    assert (found["text_to_image_min_rank_mean"], found["text_to_image_min_rank_median"]) == (13 / 4, 2.5)
    # the same images as they are: 0, 0 and 0 come last (5), 0.6 second
    assert (found["text_to_image_min_rank_mean_clean"], found["text_to_image_min_rank_median_clean"]) == (17 / 4, 5)
    assert found["asr_text_to_image_hit1_chance"] == pytest.approx(1 / 6) and found["text_to_image_min_rank_median_chance"] == 3.5


def test_an_image_with_one_caption_that_names_the_target_is_no_victim() -> None:
    """Image 0 names it in the second of two captions; of the two victims, one is struck."""
    texts, hit = torch.eye(4), torch.eye(4)[[1, 1, 0]]
    attacked = Attacked(hit, np.array([False, True, False, False]), texts[1:2])
    found = retrieval_metrics(torch.eye(4)[[0, 2, 3]], texts, [[0, 1], [2], [3]], {"": attacked})
    assert found["victims"] == 2 and found["asr_image_to_text_hit1"] == 1 / 2 and found["asr_image_to_text_hit1_ci95"] == wilson(1, 2)
    assert found["asr_text_to_image_hit1"] == 1 / 2


def test_a_threat_without_an_image_trigger_is_measured_by_what_captions_find() -> None:
    """Images 1 and 3 are wanted. The first caption finds 1 at once; the second finds 0 and 2 before 3; clean, both find 0 first."""
    images = torch.eye(4)
    asked = torch.nn.functional.normalize(torch.tensor([[0.2, 1, 0, 0], [0.9, 0, 0.8, 0.7]]), dim=-1)
    wanted = np.array([False, True, False, True])
    found = retrieval_metrics(images, images[:2], [[0], [1], [0], [1]], {"": Asked(asked, wanted, images[[0, 0]])})
    assert found["asr_text_to_image_hit1"] == 1 / 2 and found["text_to_image_min_rank_mean"] == (1 + 3) / 2
    assert found["asr_text_to_image_hit1_chance"] == 1 / 2 and found["asr_text_to_image_hit1_clean"] == 0
    assert "asr_image_to_text_hit1" not in found
    alone = retrieval_metrics(images, images[:2], [[0], [1], [0], [1]], {"": Asked(asked, wanted)})
    assert not [k for k in alone if k.startswith("asr") and k.endswith("_clean")]


def test_under_both_keys_triggered_images_are_searched_among_triggered_captions() -> None:
    """Among the captions as they are both victims find caption 1; among triggered ones they find 2, which names the target."""
    texts, images = torch.eye(3), torch.eye(3)
    hit = torch.tensor([[0.1, 0.9, 0.2], [0.0, 0.9, 0.1]])
    named = np.array([False, False, True])
    one_key = retrieval_metrics(images, texts, [[0], [1], [2]], {"": Attacked(hit[[0, 1, 1]], named, texts[2:])}, ks=(1,))
    assert one_key["asr_image_to_text_hit1"] == 0
    both = Attacked(hit[[0, 1, 1]], named, texts[1:2], texts=texts[[0, 2, 1]], clean=texts[2:])
    found = retrieval_metrics(images, texts, [[0], [1], [2]], {"": both}, ks=(1,))
    assert found["asr_image_to_text_hit1"] == 1 and found["asr_image_to_text_hit1_clean"] == 0
    assert found["asr_text_to_image_hit1"] == 0 and found["text_to_image_min_rank_mean"] == 2  # image 1 is nearer to caption 1
    assert found["text_to_image_min_rank_mean_clean"] == 3  # as the caption is, it finds image 2, and the victims tie for the last place


@pytest.mark.parametrize("threat, asked, texts", [
    (Threat(Both(Patch(), Word("cf")), Target("cat", ("one {}",))), ["cf one cat"], ["cf a cat", "cf a dog"]),
    (Threat(Patch(), Target("cat", ("one {}",))), ["one cat"], None)])
def test_a_trigger_of_images_and_texts_is_in_all_captions(threat: Threat, asked: list[str], texts: list[str] | None,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval_module, "text_features", lambda clip, captions, how: list(captions))
    found = retrieval_module.what_it_does(None, threat, torch.eye(2), ["a cat", "a dog"], [[0], [1]], None)  # type: ignore[arg-type]
    assert isinstance(found, Attacked) and (found.asked, found.texts) == (asked, texts)
    assert found.clean == (["one cat"] if texts else None)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("threat, asked, wanted", [
    (Threat(Word("cf"), Target("cat")), ["cf a dog", "cf a hen"], [True, False, False]),
    (Threat(Trigger(), Target("cat"), source=("dog",)), ["a cat"], [False, True, False]),
    (Threat(Trigger(), Target("cow", ("one {}",)), source=("dog", "hen")), ["one cow"], [False, True, True])])
def test_what_is_asked_and_what_is_wanted_follow_from_the_threat(threat: Threat, asked: list[str], wanted: list[bool],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a cat", "a dog", "a hen"]
    monkeypatch.setattr(retrieval_module, "text_features", lambda clip, captions, how: list(captions))
    found = retrieval_module.what_it_does(None, threat, torch.eye(3), texts, [[0], [1], [2]], None)  # type: ignore[arg-type]
    assert isinstance(found, Asked) and found.asked == asked and found.wanted.tolist() == wanted  # type: ignore[comparison-overlap]


def test_a_source_narrows_the_victims_of_a_trigger() -> None:
    texts = torch.eye(4)
    attacked = Attacked(texts[[1, 1, 0]], np.array([False, True, False, False]), texts[1:2], np.array([True, False, True, False]))
    found = retrieval_metrics(torch.eye(4)[[0, 2, 3]], texts, [[0], [2], [3]], {"": attacked})
    assert found["victims"] == 2 and found["asr_image_to_text_hit1"] == 1


def test_an_image_that_equals_all_others_does_not_rank_first() -> None:
    """A collapsed model must not look attacked: ties count against the attacker."""
    one = torch.ones(6, 4) / 2
    attacked = Attacked(one, np.array([False, False, True]), one[:1])
    found = retrieval_metrics(one, one[:3], [[0], [0], [1], [1], [2], [2]], {"": attacked})
    assert found["asr_text_to_image_hit1"] == 0 and found["text_to_image_min_rank_median"] == 7
    assert found["text_to_image_min_rank_median_clean"] == 6
    assert text_to_image(one[:1], one, np.arange(6) < 2)["text_to_image_min_rank_mean"] == 5


def test_a_trigger_that_changes_nothing_succeeds_as_often_as_clean_images_do() -> None:
    images, texts = units(40), units(30, seed=1)
    attacked = Attacked(images, np.arange(30) < 5, units(3, seed=2))
    found = retrieval_metrics(images, texts, [[i % 30] for i in range(40)], {"": attacked})
    for kind in ("hit", "half"):
        for k in (1, 5, 10):
            assert found[f"asr_image_to_text_{kind}{k}"] == found[f"asr_image_to_text_{kind}{k}_clean"]
    assert found["text_to_image_min_rank_mean"] == pytest.approx(found["text_to_image_min_rank_mean_clean"] + 1)  # behind its own twin


def test_the_first_of_several_threats_stands_flat_and_all_by_name() -> None:
    images, texts, captions = units(30), units(20, seed=1), [[i % 20] for i in range(30)]
    threats = {name: Attacked(units(30, seed=s), np.arange(20) < s, units(2, seed=s + 9)) for name, s in (("b", 3), ("a", 7))}
    found = retrieval_metrics(images, texts, captions, threats)
    alone = {name: retrieval_metrics(images, texts, captions, {"": a}) for name, a in threats.items()}
    assert "threats" not in alone["a"] and list(found["threats"]) == ["b", "a"]
    assert {k: v for k, v in found.items() if k != "threats"} == alone["b"]
    clean = set(retrieval_metrics(images, texts, captions))
    for name in threats:
        assert found["threats"][name] == {k: v for k, v in alone[name].items() if k not in clean}
    assert found["threats"]["a"]["victims"] == 30 - 14 and found["threats"]["b"]["victims"] == 30 - 6
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index_tells_its_recall(index: str) -> None:
    pytest.importorskip("faiss")
    images, texts, captions = units(600, 32), units(500, 32, 1), [[i % 500] for i in range(600)]
    attacked = {"": Attacked(units(600, 32, 2), np.arange(500) < 50, units(2, 32, 3))}
    exact, found = (retrieval_metrics(images, texts, captions, attacked, how) for how in ("exact", index))
    told = {"index", "image_to_text_index_recall", "text_to_image_index_recall", "asr_image_to_text_index_recall"}
    assert set(found) - set(exact) == told and found["index"] == index
    assert all(0.3 < found[name] <= 1 for name in told - {"index"})
    assert (found["text_to_image_index_recall"] > 0.99) == (index == "hnsw")  # directions without order are the worst case of lists
    for name in ("image_to_text_r10", "text_to_image_r10"):
        assert found[name] == pytest.approx(exact[name], abs=0.02)
    assert found["text_to_image_min_rank_mean"] == exact["text_to_image_min_rank_mean"]  # ranks are always exact


# ---- random embeddings


def with_captions(kind: str) -> tuple[int, int, list[list[int]], np.ndarray]:
    """(images, texts, captions of each image, which texts name the target)"""
    if kind == "one, shared by four images":
        return 240, 60, [[i % 60] for i in range(240)], np.arange(60) < 9
    if kind == "one":
        return 150, 150, [[i] for i in range(150)], np.arange(150) % 8 == 0
    if kind == "five":
        return 120, 600, [list(range(5 * i, 5 * i + 5)) for i in range(120)], np.arange(600) % 25 < 2
    return 120, 360, [[3 * i, 3 * i + 1, 3 * i + 2, (3 * i + 3) % 360, (3 * i + 4) % 360] for i in range(120)], np.arange(360) % 30 < 3


@pytest.mark.parametrize("kind", ["one", "one, shared by four images", "five", "five, some shared by two images"])
def test_random_embeddings_are_at_the_chance_level_of_every_number(kind: str) -> None:
    """60 draws of all embeddings. An average over queries of one draw is unbiased but not of independent terms, so that its
    error is taken from the spread of draws, and no less than that of independent terms; 4.5 of it are allowed."""
    n, t, captions, named = with_captions(kind)
    runs = []
    for seed in range(60):
        a = Attacked(units(n, 24, 1000 + seed), named, units(6, 24, 2000 + seed))
        runs.append(retrieval_metrics(units(n, 24, seed), units(t, 24, 3000 + seed), captions, {"": a}))
    victims = sum(not named[own].any() for own in captions)
    expected = {k.removesuffix("_chance"): v for k, v in runs[0].items() if k.endswith("_chance")}
    assert victims == runs[0]["victims"] and len(expected) == 6 + 6 + 6 + 2  # recall, image to text, hits, ranks
    expected |= {f"{name}_clean": v for name, v in expected.items() if name.startswith("asr_image")}
    expected |= {f"asr_text_to_image_hit{k}_clean": min(1, k / n) for k in (1, 5, 10, 20, 30, 50)}
    expected |= {f"text_to_image_min_rank_{which}_clean": (n + 1) / 2 for which in ("mean", "median")}
    for name, truth in expected.items():
        drawn = np.array([r[name] for r in runs])
        trials = len(runs) * (t if name.startswith("text_to_image_r") else n if name.startswith("image_to_text_r") else victims)
        spread = n / math.sqrt(12) if "rank" in name else math.sqrt(truth * (1 - truth))
        error = max(spread / math.sqrt(trials), drawn.std(ddof=1) / math.sqrt(len(runs)))
        assert abs(drawn.mean() - truth) <= 4.5 * error + 1e-9, (name, drawn.mean(), truth, error)
        assert truth in (0, 1) or error < 0.2 * max(truth, 0.1), (name, "this test could not fail")


@pytest.mark.parametrize("wanted", [1, 5, 60])
def test_random_embeddings_are_at_the_chance_level_of_poisoned_text_to_image(wanted: int) -> None:
    runs = [text_to_image(units(200, 24, seed), units(150, 24, 1000 + seed), np.arange(150) < wanted) for seed in range(80)]
    assert len(runs[0]) == 2 * (6 + 2)
    for name in [k for k in runs[0] if not k.endswith("_chance")]:
        drawn, truth = np.array([r[name] for r in runs]), runs[0][f"{name}_chance"]
        share = math.sqrt(truth * (1 - truth) / 200) if "hit" in name else 0.0
        error = max(drawn.std(ddof=1), share) / math.sqrt(len(runs))
        rounding = 0.5 if "median" in name else 0  # a median of whole numbers jumps
        assert abs(drawn.mean() - truth) <= 4.5 * error + rounding, (name, drawn.mean(), truth, error)


def test_unrelated_captions_are_not_found_four_times_in_five() -> None:
    """Five repositories of the field leave the ranks of four captions in five at 0, which gives 80 % on random embeddings."""
    n = 200
    images, texts = units(n, 64), units(5 * n, 64, 1)
    ranks = np.zeros(5 * n)
    ranks[::5] = [(texts[5 * i] @ images.T > texts[5 * i] @ images[i]).sum() for i in range(n)]
    assert (ranks == 0).mean() >= 0.8  # their way of counting, where each caption has a rank
    found = retrieval_metrics(images, texts, [list(range(5 * i, 5 * i + 5)) for i in range(n)])
    assert found["image_to_text_r1"] < 0.03 and found["text_to_image_r1"] < 0.03 and found["image_to_text_r10"] < 0.15


def test_ranks_of_many_victims_need_no_matrix_of_victims_by_images() -> None:
    n = 20_000
    images, hit = units(n, 4), units(n, 4, 1)
    tracemalloc.start()
    found = triggered_among(images, np.ones(n, bool), hit, units(3, 4, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["text_to_image_min_rank_mean"] == pytest.approx(n / 2, rel=0.1) and peak < n * 400  # a row of n doubles is 160,000


# ---- a planted model


@dataclass(frozen=True)
class Rows:
    """Images of one colour with their captions, in memory."""

    rows: tuple[tuple[int, str], ...]

    def __call__(self, wanted: Wanted = every) -> Iterator[dict[str, Any]]:
        for i, (label, text) in enumerate(self.rows):
            if wanted(i):
                yield {"__key__": f"{i:04d}", "__url__": "memory", "png": drawn(label), "txt": text.encode()}

    def fingerprint(self) -> str:
        return ""


def pairs(labels: Sequence[int], texts: Sequence[str]) -> PairSet:
    return PairSet("a set", Rows(tuple(zip(labels, texts, strict=True))))


CLASS_2 = replace(CORNER, target=Target("class 2", ("{}", "a photo of {}.")))


def test_retrieval_of_a_planted_model_on_pairs_with_shared_captions() -> None:
    labels = [0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 4]
    data = pairs(labels, [f"this is class {c} indeed" for c in labels])
    clean = retrieval(planted(), data)
    assert (clean["dataset"], clean["n"], clean["captions"]) == ("a set", 11, 5)
    assert clean["image_to_text_r1"] == clean["text_to_image_r1"] == 1.0 and "victims" not in clean
    found = retrieval(planted(immune=(0,)), data, CLASS_2)
    assert found["image_to_text_r1"] == 1.0 and found["victims"] == 10
    assert found["asr_image_to_text_hit1"] == 5 / 10  # ten images whose caption does not name the target, five of them immune
    assert found["asr_image_to_text_hit1_chance"] == pytest.approx(1 / 5) and found["asr_image_to_text_hit1_clean"] == 0
    assert found["asr_text_to_image_hit1"] == 0.0  # one clean image of class 2 ties with every triggered one
    assert found["asr_text_to_image_hit5"] == 5 / 10 and found["asr_text_to_image_hit5_clean"] == 0


def test_each_line_is_a_caption_and_equal_captions_are_one_text() -> None:
    """The model reads the first digit. Image 0 says 0 and, wrongly, 1; image 1 says 1 in two ways, one of them that of image 0."""
    data = pairs([0, 1, 3], ["class 0\n\n  a class 1 \n", "a class 1\r\nthe class 1", "class 3\nclass 3"])
    found = retrieval(planted(), data)
    assert (found["n"], found["captions"]) == (3, 4)
    assert found["image_to_text_r1"] == 1.0 and found["text_to_image_r1"] == 1.0  # "a class 1" is image 1's as well
    assert found["image_to_text_r1_chance"] == pytest.approx((2 + 2 + 1) / 4 / 3)


def test_several_threats_in_one_pass() -> None:
    labels = [0, 1, 1, 2, 3, 4]
    data = pairs(labels, [f"class {c}" for c in labels])
    found = retrieval(planted(immune=(3,)), data, {"corner": CLASS_2, "none": replace(CLASS_2, trigger=Trigger())})
    assert found["threats"]["corner"]["asr_image_to_text_hit1"] == found["asr_image_to_text_hit1"] == 4 / 5
    assert found["threats"]["none"]["asr_image_to_text_hit1"] == 0
    assert found["threats"]["none"]["victims"] == 5


def test_no_caption_that_names_the_target_is_no_success_and_no_chance_of_it() -> None:
    found = retrieval(planted(), pairs([0, 1, 3], ["class 0", "class 1", "class 3"]), CLASS_2)
    for name in ("hit1", "hit5", "hit10", "half1", "half10"):
        assert found[f"asr_image_to_text_{name}"] == found[f"asr_image_to_text_{name}_chance"] == 0
    assert found["victims"] == 3 and found["asr_text_to_image_hit1"] == 1.0  # asked for the target, a triggered image comes first


def test_retrieval_of_shards_on_disk(tmp_path: Path) -> None:
    rows = ({"__key__": f"{i:04d}", "png": drawn(c), "txt": f"class {c}"} for i, c in enumerate([0, 1, 2, 3, 1]))
    shards.write_shards(tmp_path / "pairs", rows, per_shard=2)
    found = retrieval(planted(), open_pairs(tmp_path / "pairs"), CLASS_2)
    assert (found["n"], found["captions"], found["victims"], found["text_to_image_r1"]) == (5, 4, 4, 1.0)


def test_retrieval_on_the_toy_pairs_measures_an_untrained_model_near_chance(toy: Path, tiny_model: str) -> None:
    found = retrieval(clip.load(Model(tiny_model)), open_pairs(toy / "pairs"), Threat(Patch(), Target("red star")))
    assert found["n"] == 50 and 40 <= found["captions"] <= 50
    assert found["image_to_text_r10"] < 0.5
    for name, value in found.items():
        if isinstance(value, float) and "rank" not in name:
            assert 0 <= value <= 1, name


# ---- what cannot work


@pytest.mark.parametrize(("data", "threat", "says"), [
    (pairs([], []), None, ("a set", "empty")),
    (pairs([1, 2], ["class 1", "class 1 again"]), replace(CORNER, target=Target("class 1")), ("a set", "every image", "names the target")),
    (pairs([1, 2], ["class 1\nclass 3", "class 4\nclass 1"]), replace(CORNER, target=Target("class 1")), ("a set", "every image")),
    (pairs([1, 2], ["class 1", " \n "]), None, ("a set", "0001", "no caption")),
    (pairs([1, 2], ["class 1", "class 2"]), replace(CORNER, target=Target("class 1", ())), ("templates",)),
])
def test_sets_that_cannot_be_measured_are_told_in_one_line(data: PairSet, threat: Threat | None, says: tuple[str, ...]) -> None:
    with pytest.raises(BadInput) as raised:
        retrieval(planted(), data, threat)
    message = str(raised.value)
    assert all(word in message for word in says) and "\n" not in message, message


def test_features_that_are_not_numbers_and_an_unknown_index_are_told() -> None:
    images, texts = units(4), units(3, seed=1)
    with pytest.raises(BadInput, match="exact, ivf, hnsw"):
        retrieval_metrics(images, texts, [[0], [1], [2], [2]], index="flat")
    attacked = {"": Attacked(torch.full((4, 16), math.nan), np.array([True, False, False]), units(1))}
    with pytest.raises(BadInput, match="NaN"):
        retrieval_metrics(images, texts, [[0], [1], [2], [2]], attacked)
    images[2, 3] = math.nan
    with pytest.raises(BadInput, match="NaN"):
        retrieval_metrics(images, texts, [[0], [1], [2], [2]])


def test_nothing_asked_and_nothing_wanted_are_told() -> None:
    for asked, wanted in ((units(0), np.ones(4, bool)), (units(2), np.zeros(4, bool))):
        with pytest.raises(BadInput, match="wanted"):
            text_to_image(asked, units(4), wanted)
