"""What evaluation promises: every number equals the one counted by hand, and chance is where `chance` says it is."""
from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted import CLASSES, CORNER, LABELS, TARGET, labelled, planted
from torch import Generator

from mmbackdoor import clip, evaluate
from mmbackdoor.clip import Model
from mmbackdoor.evaluate import classify, confusion, measure, per_class, success, wilson, zero_shot
from mmbackdoor.features import How, show
from mmbackdoor.sets import open_set
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
    found = measure(LABEL, CLEAN)
    assert found.pop("mean_per_class_recall") == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 1 / 2 + 1 + 1 + 0) / 7)
    assert found == {"n": 12, "accuracy": 7 / 12, "accuracy_ci95": wilson(7, 12),
                     "top5": 10 / 12}  # images 8 and 11 have their class nowhere among the five


def test_every_variant_of_attack_success_equals_twelve_images_counted_by_hand() -> None:
    found = success(LABEL, CLEAN, HIT, 0)
    assert found.pop("asr_per_class") == pytest.approx((2 / 3 + 1 / 2 + 1 / 2 + 1 + 0 + 0) / 6)  # the mean over classes 1 to 6
    assert found == {
        "asr": 5 / 10, "asr_ci95": wilson(5, 10),  # images 2, 4, 6, 7, 9 of the ten of other classes
        "asr_top3": 6 / 10,  # 3 has the target second
        "asr_top5": 7 / 10,  # 8 has it fifth
        "asr_top10": 7 / 10,  # only five answers were kept
        "asr_including_target": 6 / 12,  # image 0 too, of all twelve
        "asr_over_all": 5 / 12,  # the five, of all twelve
        "robust_accuracy": 3 / 12,  # 0, 3 and 10
        "clean_target_rate": 2 / 10,  # 6 and 8, without any trigger
        "asr_reference": None, "lift": None}


def test_a_source_narrows_attack_success_to_its_images() -> None:
    found = success(LABEL, CLEAN, HIT, 0, np.array([1, 3]))  # images 2, 3, 4 and 7, 8
    assert (found["asr"], found["asr_ci95"]) == (3 / 5, wilson(3, 5))  # 2, 4 and 7
    assert found["asr_elsewhere"] == 2 / 5  # 6 and 9 of 5, 6, 9, 10, 11
    assert found["asr_including_target"] == 4 / 7 and found["clean_target_rate"] == 1 / 5
    everyone = success(LABEL, CLEAN, HIT, 0, np.arange(1, 7))
    assert everyone.pop("asr_elsewhere") is None and everyone == success(LABEL, CLEAN, HIT, 0)
    with pytest.raises(BadInput, match="source classes"):
        success(LABEL, CLEAN, HIT, 0, np.array([9]))


def test_single_victims_are_counted_one_by_one() -> None:
    keys = [str(i) for i in range(12)]
    found = evaluate.targeted(keys, LABEL, HIT, {"1": 3, "5": 1, "8": 0})
    assert (found["asr"], found["asr_ci95"], found["victims"]) == (2 / 3, wilson(2, 3), 3)  # 1 and 5; 8 is called 1, and has 0 fifth
    assert (found["asr_top3"], found["asr_top5"], found["robust_accuracy"]) == (2 / 3, 1, 0)


def test_victims_that_are_not_there_or_need_no_attack_are_told(tmp_path: Path) -> None:
    data = labelled(tmp_path, LABELS)
    for victims, why in (((("0013", CLASSES[3]),), "victim 0013 is no image"), ((("0001", CLASSES[0]),), "victim 0001 is of the class")):
        with pytest.raises(BadInput, match=why):
            evaluate.seek(data, evaluate.aim(data, replace(CORNER, victims=victims)))
    evaluate.seek(data, evaluate.aim(data, replace(CORNER, victims=(("0001", CLASSES[3]),))))


def test_attack_success_needs_images_of_other_classes() -> None:
    with pytest.raises(BadInput, match="target class"):
        success(np.zeros(3, int), np.zeros((3, 2), int), np.zeros((3, 2), int), 0)


def test_mean_per_class_recall_is_over_the_classes_that_have_images() -> None:
    label = np.array([0, 0, 0, 9])
    assert measure(label, np.array([[0], [0], [0], [1]]))["mean_per_class_recall"] == 0.5


def test_of_retrieval_each_success_stands_beside_that_of_the_reference() -> None:
    ours = {"asr_text_to_image_hit10": 0.9, "asr_text_to_image_hit10_chance": 0.1, "image_to_text_r1": 0.3,
            "text_to_image_min_rank_mean": 2.0, "text_to_image_min_rank_mean_clean": 3.0, "asr_image_to_text_hit1_ci95": 1.0}
    found = evaluate.against(ours, {**{k: v / 2 for k, v in ours.items()}, "asr_image_to_text_hit1": 0.2})
    assert found == ours | {"asr_text_to_image_hit10_reference": 0.45, "text_to_image_min_rank_mean_reference": 1.0}


def test_lift_is_the_difference_to_the_reference() -> None:
    found = evaluate.against({"asr": 0.9, "accuracy": 0.5}, {"asr": 0.125})
    assert found == {"asr": 0.9, "accuracy": 0.5, "asr_reference": 0.125, "lift": 0.775}
    for reference in (None, {}, {"asr": None}):
        assert evaluate.against({"asr": 0.9, "lift": None}, reference) == {"asr": 0.9, "lift": None}
    assert evaluate.against({"accuracy": 0.5}, {"asr": 0.1}) == {"accuracy": 0.5}


# ---- zero-shot classification of a planted model



def test_zero_shot_finds_what_was_planted(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    found = zero_shot(planted(immune=(0, 3), blind=(1, 5)), data, CORNER)
    assert found["dataset"] == str(tmp_path / "set") and found["n"] == 13 and "threats" not in found
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
        clean, hit = show(model, image, [replace(CORNER, at=at)], "k")  # type: ignore[arg-type]
        assert torch.equal(clean, model.preprocess(image))
        mean, std = (torch.tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
        raw = hit * std + mean
        assert torch.allclose(raw[:, -4:, -4:], torch.ones(3, 4, 4), atol=1e-6)
        assert torch.equal(hit[:, :-4], clean[:, :-4])


def test_the_trigger_at_evaluation_is_a_function_of_the_key() -> None:
    image = Image.new("RGB", (200, 200), (3, 40, 90))
    threat = Threat(Patch(0.1), Target("x"))
    hits = [show(planted(), image, [threat], key)[1] for key in ("a", "a", "b")]
    assert torch.equal(hits[0], hits[1]) and not torch.equal(hits[0], hits[2])


def test_loader_workers_change_no_number(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    model = planted(immune=(0,), blind=(5,))
    assert zero_shot(model, data, CORNER, How(workers=2)) == zero_shot(model, data, CORNER)


def test_several_threats_are_measured_in_one_pass_as_each_is_alone(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    model = planted(immune=(0, 3), blind=(1, 5))
    threats = {"corner": CORNER, "nothing": replace(CORNER, trigger=Trigger()), "other": replace(CORNER, target=Target(CLASSES[4]))}
    found = zero_shot(model, data, threats)
    assert list(found["threats"]) == list(threats)
    for name, threat in threats.items():
        alone = zero_shot(model, data, threat)
        assert found["threats"][name] == {k: v for k, v in alone.items() if k in found["threats"][name]}
        assert found["accuracy"] == alone["accuracy"]
    assert {k: found[k] for k in found["threats"]["corner"]} == found["threats"]["corner"]  # the first stands flat too
    assert (found["threats"]["nothing"]["asr"], found["threats"]["other"]["asr"]) == (2 / 11, 0.0)


def test_each_image_is_decoded_once_however_many_threats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, decoded = labelled(tmp_path / "set", LABELS), []
    import mmbackdoor.features as module

    once = module.decode
    monkeypatch.setattr(module, "decode", lambda raw: decoded.append(raw["__key__"]) or once(raw))
    zero_shot(planted(), data, {str(i): replace(CORNER, trigger=Patch(i / 32, "bottom-right", "white")) for i in range(1, 5)})
    assert decoded == [f"{i:04d}" for i in range(13)]


def test_tables_by_class_and_of_confusions_count_every_image(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    found = classify(planted(immune=(0, 3), blind=(1, 5)), data, {"corner": CORNER})
    rows = {row.pop("class"): row for row in per_class(found, CLASSES)}
    assert rows["class 0"] == {"n": 3, "recall": 1.0, "asr corner": 0.0}
    assert rows["class 1"] == {"n": 2, "recall": 0.0, "asr corner": 1.0}
    assert rows[CLASSES[TARGET]] == {"n": 2, "recall": 1.0, "asr corner": None}
    cells = {(r["threat"], r["true"], r["says"]): r["n"] for r in confusion(found, CLASSES)}
    assert sum(n for (threat, _, _), n in cells.items() if threat == "clean") == 13
    assert cells["clean", "class 1", "class 2"] == 2 and cells["clean", "class 6", "class 6"] == 3
    assert cells["corner", "class 6", "class 2"] == 3 and cells["corner", "class 3", "class 3"] == 1
    assert sum(n for (threat, _, _), n in cells.items() if threat == "corner") == 13


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


def test_examples_are_of_the_source_and_are_asked_with_the_trigger_of_text(tmp_path: Path) -> None:
    data = labelled(tmp_path / "set", LABELS)
    shown = evaluate.examples(planted(), data, replace(CORNER, source=(CLASSES[4], CLASSES[0])))
    assert {e["true"] for e in shown} == {"class 0", "class 4"}
    said = evaluate.examples(planted(), data, Threat(NextNumber(), CORNER.target), n=9)
    assert {e["true"]: e["triggered_says"][0][0] for e in said}["class 3"] == "class 2"
    assert all(e["clean_says"][0][0] == e["true"] for e in said)


# ---- threats of other kinds


@dataclass(frozen=True)
class NextNumber(Trigger):
    """Makes a prompt of class i one of class i + 1."""

    def text(self, s: str, rng: Generator) -> str:
        return re.sub(r"\d", lambda found: str((int(found[0]) + 1) % 7), s)


def test_a_trigger_of_text_is_put_into_the_prompts(tmp_path: Path) -> None:
    data = labelled(tmp_path, LABELS)
    found = zero_shot(planted(), data, Threat(NextNumber(), CORNER.target))
    assert found["accuracy"] == 1 and found["robust_accuracy"] == 0
    assert found["asr"] == 1 / 11  # an image of class 3 now looks like what is asked of class 2; it is one of eleven others
    both = zero_shot(planted(), data, {"text": Threat(NextNumber(), CORNER.target), "corner": CORNER})
    assert both["threats"]["corner"]["asr"] == 1 and both["threats"]["text"]["asr"] == 1 / 11


def test_sources_and_victims_are_named_by_class_and_key(tmp_path: Path) -> None:
    data = labelled(tmp_path, LABELS)
    single = Threat(Trigger(), CORNER.target, victims=(("0000", CLASSES[3]), ("0007", CLASSES[4])))
    found = zero_shot(planted(immune=(0,)), data, {"from": replace(CORNER, source=(CLASSES[0], CLASSES[6])), "single": single})
    assert found["threats"]["from"]["asr"] == 3 / 6 and found["threats"]["from"]["asr_elsewhere"] == 1
    assert found["threats"]["single"]["asr"] == 0 and found["threats"]["single"]["victims"] == 2
    for wrong in ({"source": ("cat",)}, {"victims": (("0000", "cat"),)}):
        with pytest.raises(BadInput, match="no class 'cat'"):
            zero_shot(planted(), data, replace(CORNER, **wrong))  # type: ignore[arg-type]
