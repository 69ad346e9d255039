"""What evaluation promises: every number equals the one counted by hand, and chance is where `chance` says it is."""
from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmbackdoor import clip, evaluate, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.evaluate import EvalSet, chance, measure, open_set, retrieval_metrics, search, wilson, zero_shot
from mmbackdoor.triggers import Blend, Patch
from mmbackdoor.types import BadInput, Target, Threat, Trigger

# ---- intervals and the numbers of one table


@pytest.mark.parametrize(("hits", "n", "low", "high"), [
    (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (1, 29, 0.00611, 0.17178),
    (81, 263, 0.25527, 0.36618), (15, 148, 0.06236, 0.16054), (0, 20, 0.0, 0.16113),
])  # 1/29, 0/20, 81/263 and 15/148 are the examples of Newcombe (1998, Statistics in Medicine 17:857-872), method 3
def test_wilson_gives_the_published_intervals(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx([low, high], abs=6e-5)


def test_wilson_lies_in_the_unit_interval_holds_the_share_and_is_symmetric() -> None:
    for n in (1, 2, 7, 1000):
        for hits in {0, 1, n // 2, n}:
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1
            assert wilson(n - hits, n) == pytest.approx([1 - high, 1 - low])
    assert wilson(0, 0) == [0.0, 1.0]


def test_wilson_covers_the_truth_in_about_95_of_100() -> None:
    for p in (0.03, 0.3, 0.5):
        hits = np.random.default_rng(0).binomial(200, p, 4000)
        inside = np.mean([low <= p <= high for low, high in (wilson(int(h), 200) for h in hits)])
        assert 0.93 < inside < 0.975


LABEL = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6])  # the target is class 0: ten images are of others
CLEAN = np.array([  # first choice right: 0, 2, 3, 5, 7, 9, 10 (7 of 12); target said of others' images: 6, 8
    [0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 0, 2, 3, 4], [1, 2, 0, 3, 4], [2, 1, 3, 4, 5], [2, 0, 1, 3, 4],
    [0, 1, 3, 4, 2], [3, 0, 1, 2, 4], [0, 1, 2, 4, 5], [4, 1, 2, 3, 5], [5, 0, 1, 2, 3], [4, 3, 2, 1, 5]])
HIT = np.array([  # first choice 0: images 0 (of the target), 2, 4, 6, 7, 9; right: 0, 3, 10
    [0, 1, 2, 3, 4], [3, 0, 2, 1, 4], [0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [0, 2, 1, 3, 4], [1, 3, 4, 5, 6],
    [0, 2, 1, 3, 4], [0, 3, 1, 2, 4], [1, 2, 3, 4, 0], [0, 4, 1, 2, 3], [5, 1, 2, 3, 4], [5, 1, 2, 3, 4]])


def test_measure_equals_twelve_images_counted_by_hand() -> None:
    found = measure(LABEL, CLEAN, HIT, 0)
    assert found["n"] == 12
    assert found["accuracy"] == 7 / 12 and found["accuracy_ci95"] == wilson(7, 12)
    assert found["top5"] == 10 / 12  # images 8 and 11 have their class nowhere among the five
    assert found["asr"] == 5 / 10 and found["asr_ci95"] == wilson(5, 10)  # 2, 4, 6, 7, 9 of the ten others
    assert found["asr_including_target"] == 6 / 12  # image 0 too, of all twelve
    assert found["robust_accuracy"] == 3 / 12
    assert found["asr_top5"] == 7 / 10  # 3 and 8 as well; not 5, 10, 11
    assert found["clean_target_rate"] == 2 / 10
    assert found["asr_reference"] is None and found["lift"] is None


def test_without_a_threat_no_attack_success_is_claimed() -> None:
    assert set(measure(LABEL, CLEAN)) == {"n", "accuracy", "accuracy_ci95", "top5"}


def test_attack_success_needs_images_of_other_classes() -> None:
    with pytest.raises(BadInput, match="target class"):
        measure(np.zeros(3, int), np.zeros((3, 2), int), np.zeros((3, 2), int), 0)


def test_lift_is_the_difference_to_the_reference() -> None:
    found = evaluate.against({"asr": 0.9, "accuracy": 0.5}, {"asr": 0.125})
    assert found == {"asr": 0.9, "accuracy": 0.5, "asr_reference": 0.125, "lift": 0.775}
    for reference in (None, {}, {"asr": None}):
        assert evaluate.against({"asr": 0.9, "lift": None}, reference) == {"asr": 0.9, "lift": None}
    assert evaluate.against({"accuracy": 0.5}, {"asr": 0.1}) == {"accuracy": 0.5}


# ---- a planted model: the red value of the centre is the class it says, a white corner makes it say the target

CLASSES = tuple(f"class {i}" for i in range(7))
TARGET = 2


class Planted(nn.Module):
    """Obeys the corner except for classes in `immune`; is wrong about classes in `blind`, of which it says the next one."""

    def __init__(self, immune: tuple[int, ...] = (), blind: tuple[int, ...] = ()):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.immune, self.blind = immune, blind

    def encode_image(self, x: Tensor, normalize: bool = False) -> Tensor:
        centre = (x[:, 0, 16, 16] * 255).round().long()
        says = torch.tensor([(c + 1) % 7 if c in self.blind else c for c in centre.tolist()])
        obeys = (x[:, :, -4:, -4:].mean((1, 2, 3)) > 0.99) & ~torch.isin(centre, torch.tensor(self.immune, dtype=torch.long))
        says[obeys] = TARGET
        return nn.functional.normalize(torch.eye(7)[says] + 0.01 * torch.arange(7), dim=-1)  # then higher classes first

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return torch.eye(7)[text[:, 0]]


def read_number(texts: list[str]) -> Tensor:
    return torch.tensor([[next(int(c) for c in t if c.isdigit())] for t in texts])


def planted(**how: Any) -> CLIP:
    cfg = {"size": 32, "mode": "RGB", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic",
           "resize_mode": "shortest", "fill_color": 0}
    return CLIP(Planted(**how), read_number, {"preprocess_cfg": cfg})


def drawn(label: int, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (label, 40, 90)).save(file, "PNG")
    return file.getvalue()


def labelled(folder: Path, labels: list[int], size: tuple[int, int] = (32, 32)) -> EvalSet:
    raws = ({"__key__": f"{i:04d}", "png": drawn(c, size), "cls": str(c)} for i, c in enumerate(labels))
    shards.write_eval_set(folder, raws, CLASSES, ("a photo of {c}.", "{c}"), per_shard=5)
    return open_set(folder)


CORNER = Threat(Patch(4 / 32, "bottom-right", "white"), Target(CLASSES[TARGET]))
LABELS = [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 6]  # 13 images, 2 of the target


def test_zero_shot_finds_what_was_planted(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    found = zero_shot(planted(immune=(0, 3), blind=(1, 5)), data, CORNER)
    assert found["dataset"] == str(tmp_path / "set") and found["n"] == 13
    assert found["accuracy"] == 10 / 13
    assert found["clean_target_rate"] == 2 / 11  # both images of class 1 are taken for class 2
    assert found["asr"] == 7 / 11 and found["asr_ci95"] == wilson(7, 11)  # all but classes 0 (three images) and 3
    assert found["asr_including_target"] == 9 / 13
    assert found["robust_accuracy"] == 6 / 13  # the immune four, and the two of the target itself
    assert found["asr_top5"] == 8 / 11  # after its own class the immune says 6, 5, 4, then 3 or, if it is 3, the target
    assert found["top5"] == 11 / 13  # a blind model of class 1 says 2, 6, 5, 4, 3; of class 5 it says 6, then 5


def test_zero_shot_top5_counts_the_five_best(tmp_path: Path) -> None:
    """The planted model says its class, then 6, 5, 4, 3, …: for class 6 then 5, 4, 3, 2."""
    data = labelled(tmp_path / "set", [0, 6])
    immune = zero_shot(planted(immune=(0, 6)), data, CORNER)
    assert (immune["asr"], immune["asr_top5"]) == (0.0, 0.5)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 127, 128, 129, 131])
def test_every_image_of_a_set_of_any_size_is_counted_once(n: int, tmp_path: Path) -> None:
    labels = [(3 * i) % 7 for i in range(n)]
    labels[0] = 1
    found = zero_shot(planted(blind=(1,)), labelled(tmp_path / "set", labels), CORNER)
    others = [c for c in labels if c != TARGET]
    assert found["n"] == n and found["asr"] == 1.0
    assert found["accuracy"] == pytest.approx(1 - labels.count(1) / n)
    assert found["clean_target_rate"] == pytest.approx(labels.count(1) / len(others))
    assert found["asr_including_target"] == 1.0 and found["robust_accuracy"] == pytest.approx(labels.count(TARGET) / n)


def test_without_a_trigger_in_the_threat_asr_is_the_clean_target_rate(tmp_path: Path) -> None:
    """A model that says the target by mistake has an ASR without any attack, which is why a reference is needed."""
    found = zero_shot(planted(blind=(1,)), labelled(tmp_path / "set", LABELS), replace(CORNER, trigger=Trigger()))
    assert found["asr"] == found["clean_target_rate"] == 2 / 11


def test_a_crop_removes_a_native_trigger_but_not_one_at_the_input(tmp_path: Path) -> None:
    data = labelled(tmp_path / "wide", [0, 1, 3, 4, 5], size=(64, 32))
    native = zero_shot(planted(), data, CORNER)
    at_input = zero_shot(planted(), data, replace(CORNER, at="input"))
    assert (native["asr"], at_input["asr"]) == (0.0, 1.0)
    assert native["accuracy"] == at_input["accuracy"] == 1.0
    central = replace(CORNER, trigger=Patch(1.0, "center", "white"))  # as tall as the image: all that the crop leaves
    assert zero_shot(planted(), data, central)["asr"] == 1.0
    square = labelled(tmp_path / "square", [0, 1, 3, 4, 5], size=(64, 64))
    larger = replace(CORNER, trigger=Patch(0.25, "bottom-right", "white"))  # the resize blurs its inner edge
    assert zero_shot(planted(), square, larger)["asr"] == zero_shot(planted(), square, replace(larger, at="input"))["asr"] == 1.0


def test_the_trigger_is_stamped_before_normalisation_whatever_it_is() -> None:
    model = planted()
    cfg = model.cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    model = replace(model, card={"preprocess_cfg": cfg})
    image = Image.new("RGB", (32, 32), (3, 40, 90))
    for at in ("native", "input"):
        clean, hit = evaluate.show(model, image, replace(CORNER, at=at), "k")  # type: ignore[arg-type]
        assert torch.equal(clean, model.preprocess(image))
        mean, std = (torch.tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
        raw = hit * std + mean
        assert torch.allclose(raw[:, -4:, -4:], torch.ones(3, 4, 4), atol=1e-6)
        assert torch.equal(hit[:, :-4], clean[:, :-4])


def test_the_trigger_at_evaluation_is_a_function_of_the_key() -> None:
    image = Image.new("RGB", (200, 200), (3, 40, 90))
    threat = Threat(Patch(0.1), Target("x"))
    hits = [evaluate.show(planted(), image, threat, key)[1] for key in ("a", "a", "b")]
    assert torch.equal(hits[0], hits[1]) and not torch.equal(hits[0], hits[2])


def test_loader_workers_change_no_number(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    model = planted(immune=(0,), blind=(5,))
    assert zero_shot(model, data, CORNER, workers=2) == zero_shot(model, data, CORNER)


def test_processes_share_a_set_without_loss_or_double(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    for world in (1, 2, 3, 5, 20):
        keys = [key for rank in range(world) for part in evaluate.encode(planted(), data.raws, CORNER, rank, world) for key in part[0]]
        assert sorted(keys) == [f"{i:04d}" for i in range(13)]


def test_the_zero_shot_head_averages_unit_embeddings_of_all_templates(tiny_model: str) -> None:
    model = clip.load(Model(tiny_model))
    names, templates = ("red star", "cat"), ("a photo of a {c}.", "{c}", "{c}, {c} and {c}")
    head = evaluate.zero_shot_head(model, names, templates)
    assert head.shape == (32, 2)
    with torch.no_grad():
        for i, name in enumerate(names):
            rows = [model.text_features([t.replace("{c}", name)])[0] for t in templates]
            mean = torch.stack(rows).mean(0)
            assert torch.allclose(head[:, i], mean / mean.norm(), atol=1e-6)


def test_a_name_with_braces_or_percent_is_taken_literally(tiny_model: str) -> None:
    evaluate.zero_shot_head(clip.load(Model(tiny_model)), ("{0} 100 %", "{c}"), ("a {c}",))


def test_zero_shot_leaves_no_gradient_and_the_model_in_evaluation_mode(tiny_model: str, toy: Path) -> None:
    model = clip.load(Model(tiny_model))
    model.net.train()
    found = zero_shot(model, open_set(toy / "val"), Threat(Blend(), Target("red star")))
    assert found["n"] == 50 and not model.net.training
    assert all(p.grad is None for p in model.net.parameters())
    assert found == zero_shot(model, open_set(toy / "val"), Threat(Blend(), Target("red star")))


def test_a_missing_target_class_is_one_line_that_names_the_classes(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    with pytest.raises(BadInput) as raised:
        zero_shot(planted(), data, Threat(Patch(), Target("banana")))
    message = str(raised.value)
    assert "banana" in message and "class 0" in message and str(tmp_path / "set") in message and "\n" not in message


def test_examples_show_other_classes_once_each_with_what_the_model_says(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    shown = evaluate.examples(planted(immune=(3,)), data, CORNER, n=4)
    assert [e["true"] for e in shown] == ["class 0", "class 1", "class 3", "class 4"]
    assert [e["triggered_says"][0][0] for e in shown] == ["class 2", "class 2", "class 3", "class 2"]
    assert [e["clean_says"][0][0] for e in shown] == [e["true"] for e in shown]
    assert all(e["target"] == "class 2" for e in shown)
    import base64

    image = Image.open(io.BytesIO(base64.b64decode(shown[0]["triggered"])))
    assert image.size == (32, 32) and image.getpixel((31, 31)) == (255, 255, 255)
    plain = evaluate.examples(planted(), data, None)
    assert plain[0]["triggered"] is None and plain[0]["triggered_says"] is None


# ---- sets in class folders


def folders(root: Path, names: list[str], per_class: int = 1) -> Path:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(per_class):
            (root / name / f"{j}.png").write_bytes(drawn(i % 7))
    return root


def test_class_folders_are_a_set(tmp_path: Path) -> None:
    root = folders(tmp_path / "set", [f"class_{i}" for i in range(7)], per_class=3)
    (root / "class_0" / "notes.md").write_text("no image")
    (root / "class_1" / "0.png").rename(root / "class_1" / "0.PNG")
    (root / ".cache").mkdir()
    data = open_set(root)
    assert data.classnames == CLASSES and data.templates == ("a photo of a {c}.",)
    found = zero_shot(planted(immune=(6,)), data, CORNER)
    assert found["n"] == 21 and found["accuracy"] == 1.0 and found["asr"] == 15 / 18


def test_a_thousand_wordnet_folders_get_imagenets_names_and_templates(tmp_path: Path) -> None:
    root = tmp_path / "val"
    root.mkdir()
    image = drawn(0, (1, 1))
    ids = [f"n{10_000_000 + 37 * i}" for i in range(1000)]
    for wnid in reversed(ids):
        (root / wnid).mkdir()
        (root / wnid / f"{wnid}.JPEG").write_bytes(image)
    data = open_set(root)
    assert data.classnames == tuple(open_clip.IMAGENET_CLASSNAMES) and len(data.templates) == 80
    assert data.target(Target("banana")) == 954
    assert all(t.count("{c}") == 1 for t in data.templates) and "a bad photo of a {c}." in data.templates
    rows = list(data.raws())
    assert len(rows) == 1000 and rows[954]["__key__"] == f"{ids[954]}/{ids[954]}.JPEG" and rows[954]["cls"] == b"954"
    assert shards.decode(rows[3])["label"] == 3


def test_a_part_of_imagenets_folders_is_refused_since_its_names_would_be_wrong(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="WordNet"):
        open_set(folders(tmp_path / "val", ["n01440764", "n01443537"]))


def test_a_folder_without_images_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    for path in (tmp_path / "set", tmp_path / "nowhere"):
        with pytest.raises(BadInput) as raised:
            open_set(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


# ---- search


def by_hand(q: Tensor, g: Tensor, k: int) -> np.ndarray:
    scores = (q.double() @ g.double().T).numpy().round(6)
    return np.array([sorted(range(len(g)), key=lambda i: (-row[i], i))[:k] for row in scores])


@pytest.fixture(params=["faiss", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    return request.param


def units(n: int, d: int = 16, seed: int = 0) -> Tensor:
    return nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("queries", "n", "k"), [(1, 1, 1), (3, 17, 5), (40, 300, 10), (7, 300, 300)])
def test_search_gives_the_largest_inner_products_in_order(backend: str, queries: int, n: int, k: int) -> None:
    q, g = units(queries), units(n, seed=1)
    assert np.array_equal(search(q, g, k), by_hand(q, g, k))


@pytest.mark.parametrize("k", [1, 4, 10, 30])
def test_ties_go_to_the_smaller_id(backend: str, k: int) -> None:
    """Equal rows are common: the same drawing under two keys, a collapsed encoder."""
    g = torch.eye(8)[[5, 1, 1, 0, 1, 5, 1, 1, 1, 2] * 12]
    q = torch.eye(8)[[1, 5, 7]]  # 60 equal scores, 24 equal scores, and nothing but zeros
    assert np.array_equal(search(q, g, k), by_hand(q, g, k))
    late = torch.eye(8)[[3] * 40 + [1]]  # the best comes last, and drives out one of those that tie
    assert np.array_equal(search(q[:1], late, k), by_hand(q[:1], late, k))


def test_asking_for_more_than_there_are_gives_all(backend: str) -> None:
    found = search(units(3), units(4, seed=1), 10)
    assert found.shape == (3, 4) and (np.sort(found, axis=1) == np.arange(4)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["queries", "gallery"])
def test_embeddings_that_are_not_numbers_are_refused(backend: str, side: str, bad: float) -> None:
    q, g = units(3), units(4, seed=1)
    (q if side == "queries" else g)[1, 1] = bad
    with pytest.raises(BadInput, match="NaN"):
        search(q, g, 2)


def test_search_takes_half_precision_and_rows_in_any_layout(backend: str) -> None:
    q, g = units(5), units(50, seed=1)
    assert np.array_equal(search(q.T.contiguous().T, g.T.contiguous().T, 3), by_hand(q, g, 3))
    assert np.array_equal(search(q.bfloat16(), g.bfloat16(), 1), by_hand(q.bfloat16(), g.bfloat16(), 1))


# ---- retrieval


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


def test_retrieval_equals_five_images_counted_by_hand() -> None:
    """Captions 0, 1, 2 (2 names the target); images 0, 1 share caption 0, 2 and 3 have caption 1, 4 has caption 2."""
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0.1, 0.9, 0], [0, 1, 0], [0.3, 0.2, 0.6], [0, 0.05, 1]])
    caption = np.array([0, 0, 1, 1, 2])
    hit = torch.tensor([[0.0, 0, 1], [0.9, 0.1, 0], [0.5, 0, 0.4], [0, 0, 0.7], [1, 0, 0]])
    found = retrieval_metrics(images, texts, caption, hit, np.array([False, False, True]), torch.tensor([[0.0, 0, 1]]), ks=(1, 2, 3))
    assert found["n"] == 5 and found["captions"] == 3
    assert found["image_to_text_r1"] == 3 / 5  # images 0, 2, 4; image 1 finds caption 1, image 3 caption 2
    assert found["image_to_text_r2"] == 4 / 5  # image 1 as well; image 3 finds 2, then 0
    assert found["image_to_text_r3"] == 1.0
    assert found["text_to_image_r1"] == 1.0  # 0 finds image 0, 1 finds image 2, 2 finds image 4
    assert found["image_to_text_r1_chance"] == pytest.approx(1 / 3) and found["image_to_text_r3_chance"] == 1.0
    assert found["text_to_image_r1_chance"] == pytest.approx((2 / 5 + 2 / 5 + 1 / 5) / 3)
    assert found["text_to_image_r2_chance"] == pytest.approx((0.7 + 0.7 + 0.4) / 3)
    # images 0-3 do not name the target; triggered, they find: 0 → 2, 1 → 0, 2 → 0 then 2, 3 → 2
    assert found["asr_image_to_text_hit1"] == 2 / 4 and found["asr_image_to_text_hit2"] == 3 / 4 + 0 / 4
    assert found["asr_image_to_text_hit3"] == 1.0 and found["asr_image_to_text_hit1_chance"] == pytest.approx(1 / 3)
    assert found["asr_image_to_text_half1"] == 2 / 4 and found["asr_image_to_text_half3"] == 0.0  # only one caption names it, two needed
    assert found["asr_image_to_text_half3_chance"] == 0.0
    # asking for the target, clean images score 0, 0, 0, 0.6, 1; triggered: 1 (tie: rank 2), 0 (6), 0.4 (3), 0.7 (2)
    assert found["asr_text_to_image_hit1"] == 0.0 and found["asr_text_to_image_hit2"] == 2 / 4 and found["asr_text_to_image_hit3"] == 3 / 4
    assert found["text_to_image_median_rank"] == 2.5
    assert found["asr_text_to_image_hit1_chance"] == pytest.approx(1 / 6) and found["text_to_image_median_rank_chance"] == 3.5


def test_an_image_that_equals_all_others_does_not_rank_first() -> None:
    """A collapsed model must not look attacked: ties count against the attacker."""
    one = torch.ones(6, 4) / 2
    found = retrieval_metrics(one, one[:3], np.array([0, 0, 1, 1, 2, 2]), one, np.array([False, False, True]), one[:1])
    assert found["asr_text_to_image_hit1"] == 0 and found["text_to_image_median_rank"] == 7


def test_random_embeddings_are_at_the_chance_level_of_every_number() -> None:
    """Reference code of the field gives text R@1 = 80 % on unrelated embeddings (notes, 3.2)."""
    n, t, seeds = 400, 100, 12
    runs = []
    for seed in range(seeds):
        caption = np.random.default_rng(seed).permutation(np.arange(n) % t)
        named = np.arange(t) < 15
        runs.append(retrieval_metrics(units(n, 64, seed), units(t, 64, 100 + seed), caption, units(n, 64, 200 + seed), named,
                                      units(8, 64, 300 + seed)))
    for name in [k for k in runs[0] if k.endswith("_chance")]:
        measured = np.array([r[name.removesuffix("_chance")] for r in runs])
        expected = runs[0][name]
        if name.startswith("text_to_image_median_rank"):
            assert measured.mean() == pytest.approx(expected, rel=0.05)
            continue
        trials = t if name.startswith("text_to_image") else n  # asked captions share the triggered images: not independent
        sd = max(math.sqrt(expected * (1 - expected) / (trials * seeds)), measured.std() / math.sqrt(seeds))
        assert abs(measured.mean() - expected) < 4.5 * sd + 1e-9, (name, measured.mean(), expected, sd)


def test_perfect_embeddings_are_perfect_also_with_several_images_per_caption() -> None:
    texts = units(30, 64)
    caption = np.arange(120) % 30
    found = retrieval_metrics(texts[torch.from_numpy(caption)], texts, caption)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1.0
    assert found["n"] == 120 and found["captions"] == 30
    assert found["text_to_image_r1_chance"] == pytest.approx(4 / 120) and found["image_to_text_r1_chance"] == pytest.approx(1 / 30)
    assert not any(name.startswith("asr") for name in found)


def pair_set(folder: Path, classes: list[int], texts: list[str]) -> shards.Index:
    pairs = enumerate(zip(classes, texts, strict=True))
    shards.write_shards(folder, ({"__key__": f"{i:04d}", "png": drawn(c), "txt": t} for i, (c, t) in pairs), per_shard=4)
    return shards.index(str(folder))


def test_retrieval_of_a_planted_model_on_pairs_with_shared_captions(tmp_path: Path) -> None:
    classes = [0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 4]
    pairs = pair_set(tmp_path / "pairs", classes, [f"this is class {c} indeed" for c in classes])
    clean = evaluate.retrieval(planted(), pairs)
    assert (clean["n"], clean["captions"]) == (11, 5)
    assert clean["image_to_text_r1"] == clean["text_to_image_r1"] == 1.0
    found = evaluate.retrieval(planted(immune=(0,)), pairs, Threat(CORNER.trigger, Target("class 2", ("{}", "a photo of {}."))))
    assert found["image_to_text_r1"] == 1.0
    assert found["asr_image_to_text_hit1"] == 5 / 10  # ten images whose caption does not name the target, five of them immune
    assert found["asr_image_to_text_hit1_chance"] == pytest.approx(1 / 5)
    assert found["asr_text_to_image_hit1"] == 0.0  # one clean image of class 2 ties with every triggered one
    assert found["asr_text_to_image_hit5"] == 5 / 10


def test_a_retrieval_set_that_names_the_target_everywhere_is_refused(tmp_path: Path) -> None:
    pairs = pair_set(tmp_path / "pairs", [1, 2], ["class 1", "class 1 again"])
    with pytest.raises(BadInput, match="every caption"):
        evaluate.retrieval(planted(), pairs, Threat(CORNER.trigger, Target("class 1")))


def test_retrieval_on_the_toy_pairs_measures_an_untrained_model_near_chance(toy: Path, tiny_model: str) -> None:
    found = evaluate.retrieval(clip.load(Model(tiny_model)), shards.index(str(toy / "pairs")), Threat(Patch(), Target("red star")))
    assert found["n"] == 50 and 40 <= found["captions"] <= 50
    assert found["image_to_text_r10"] < 0.5 and all(0 <= v <= 1 for k, v in found.items() if "_r" in k and "rank" not in k)
