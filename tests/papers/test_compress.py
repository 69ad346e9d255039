"""CompRess: the student starts anew, the teacher never changes, and likenesses to anchors are what is distilled."""
from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from oracles import gradients
from torch import Tensor

from mmbackdoor import clip, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.compress import CompRess
from mmbackdoor.huggingface import HuggingFace
from mmbackdoor.stream import collate

N = 6
RN = str(ROOT / "configs/toy/rn_tiny.json")


def victim(network: str, seed: int, tiny_model: str) -> CLIP:
    if network != "transformers":
        return clip.load(Model(tiny_model if network == "vit" else RN), seed=seed)
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"max_position_embeddings": 16, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
    torch.manual_seed(seed)
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}, projection_dim=24))
    return replace(clip.load(Model(tiny_model)), net=HuggingFace(net))


@pytest.fixture(scope="module")
def batches(toy: Path, tiny_model: str) -> list[dict[str, Any]]:
    front = clip.load(Model(tiny_model))
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(4 * N), strict=False)]
    return [collate(front, CompRess().views, samples[i:i + N], seed=0, epoch=0) for i in range(0, 4 * N, N)]


@pytest.fixture(scope="module")
def distilled(tiny_model: str) -> tuple[CLIP, CompRess]:
    """A student and its objective, of which only the banks are to be changed."""
    student = victim("vit", 2, tiny_model)
    objective = CompRess()
    objective.setup(student)
    return student, objective


def emptied(objective: CompRess, **options: Any) -> CompRess:
    """The same teacher, with other options and no anchors yet."""
    fresh = CompRess(**options)
    fresh.teacher = objective.teacher
    fresh.banks = {name: losses.Bank(fresh.anchors) for name in objective.banks}
    return fresh


def train(model: CLIP, objective: losses.Objective, batches: list[dict[str, Any]]) -> None:
    model.net.train()
    optimizer = torch.optim.AdamW([p for p in model.net.parameters() if p.requires_grad], lr=1e-3)
    for batch in batches:
        objective.loss(model.net, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def rows(seed: int, n: int = 5) -> Tensor:
    return F.normalize(torch.randn(n, 7, generator=torch.Generator().manual_seed(seed)), dim=1)


def slow_distance(z: Tensor, anchors: Tensor, z0: Tensor, anchors0: Tensor, tau: float) -> float:
    """mean_i sum_j p⁰_ij log(p⁰_ij / p_ij), p a softmax over anchors, by loops."""
    def shares(row: list[float], anchors: Tensor) -> list[float]:
        weights = [math.exp(sum(u * v for u, v in zip(row, a, strict=True)) / tau) for a in anchors.double().tolist()]
        return [w / sum(weights) for w in weights]

    pairs = [(shares(a, anchors), shares(b, anchors0)) for a, b in zip(z.double().tolist(), z0.double().tolist(), strict=True)]
    return sum(q * math.log(q / p) for ours, theirs in pairs for p, q in zip(ours, theirs, strict=True)) / len(pairs)


def test_the_defaults_are_the_papers() -> None:
    assert (CompRess().anchors, CompRess().tau) == (128_000, 0.04)


@pytest.mark.parametrize("network", ["vit", "resnet", "transformers"])
def test_the_student_starts_from_weights_that_know_nothing_of_the_victim(network: str, tiny_model: str) -> None:
    victims = [victim(network, 2, tiny_model)]
    victims.append(replace(victims[0], net=copy.deepcopy(victims[0].net)))
    with torch.no_grad():
        for x in (*victims[1].net.parameters(), *(b for b in victims[1].net.buffers() if b.is_floating_point())):
            x.add_(0.5)
    were = {k: v.clone() for k, v in victims[0].net.state_dict().items()}
    for model in victims:
        CompRess().setup(model)
    students = [v.net.state_dict() for v in victims]
    assert all(torch.equal(students[0][k], students[1][k]) for k in students[0])
    drawn = [k for k in students[0] if students[0][k].ndim >= 2]
    assert drawn and not any(torch.equal(students[0][k], were[k]) for k in drawn)
    CompRess(seed=1).setup(victims[1])
    assert not any(torch.equal(students[0][k], victims[1].net.state_dict()[k]) for k in drawn)


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_the_teacher_is_the_victim_and_stays_so_while_the_student_trains(network: str, tiny_model: str,
                                                                         batches: list[dict[str, Any]]) -> None:
    model = victim(network, 2, tiny_model)
    was = {k: v.clone() for k, v in model.net.state_dict().items()}
    objective = CompRess()
    objective.setup(model)
    started = {k: v.clone() for k, v in model.net.state_dict().items()}
    train(model, objective, batches[:3])
    kept = objective.teacher.state_dict()
    assert kept.keys() == was.keys() and all(torch.equal(kept[k], was[k]) for k in was)
    assert not any(m.training for m in objective.teacher.modules()) and all(p.grad is None for p in objective.teacher.parameters())
    assert not all(torch.equal(v, started[k]) for k, v in model.net.state_dict().items())


def test_rows_like_the_teachers_are_at_no_distance(distilled: tuple[CLIP, CompRess]) -> None:
    objective = emptied(distilled[1])
    for seed in range(4):
        z = rows(seed).requires_grad_()
        distance = objective.distance("image", z, z.detach())
        distance.backward()
        assert float(distance.detach()) == pytest.approx(0, abs=1e-5) and z.grad.abs().max() < 1e-5
    assert objective.distance("image", rows(9), rows(10)) > 0.1


def test_rows_that_are_turned_together_are_at_no_distance(distilled: tuple[CLIP, CompRess]) -> None:
    """What is distilled is which inputs are alike, not where they lie: the student may even be of another width."""
    objective, turn = emptied(distilled[1]), torch.linalg.qr(torch.randn(9, 7, generator=torch.Generator().manual_seed(5)))[0]
    for seed in range(3):
        assert float(objective.distance("text", rows(seed) @ turn.T, rows(seed))) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("tau", [0.04, 0.5])
@pytest.mark.parametrize("anchors", [128_000, 12, 5, 3])
def test_the_distance_is_the_divergence_of_likenesses_to_the_last_rows(anchors: int, tau: float,
                                                                       distilled: tuple[CLIP, CompRess]) -> None:
    objective = emptied(distilled[1], anchors=anchors, tau=tau)
    seen, seen0 = rows(50, 0), rows(50, 0)
    for i in range(6):
        z, z0 = rows(i), rows(i + 20)
        a, a0 = (seen[-anchors:], seen0[-anchors:]) if i else (z, z0)  # with nothing before it a batch is its own anchors
        z.requires_grad_()
        distance = objective.distance("image", z, z0)
        assert float(distance.detach()) == pytest.approx(slow_distance(z.detach(), a, z0, a0, tau), rel=1e-4, abs=1e-6), i
        distance.backward()
        p, p0 = ((r @ k.T / tau).softmax(1) for r, k in ((z.detach(), a), (z0, a0)))
        assert torch.allclose(z.grad, (p - p0) @ a / tau / len(z), atol=1e-5, rtol=1e-4), i
        seen, seen0 = torch.cat([seen, z.detach()]), torch.cat([seen0, z0])


def test_images_and_captions_have_anchors_of_their_own(distilled: tuple[CLIP, CompRess]) -> None:
    objective = emptied(distilled[1])
    objective.distance("image", rows(0), rows(1))
    alone = slow_distance(rows(2), rows(2), rows(3), rows(3), 0.04)
    assert float(objective.distance("text", rows(2), rows(3))) == pytest.approx(alone, rel=1e-4)


def test_the_terms_are_of_the_features_and_the_teachers(distilled: tuple[CLIP, CompRess], batches: list[dict[str, Any]]) -> None:
    student, kept = distilled
    batch, objective = batches[0], emptied(kept, cross=0.7)
    out = gradients(student.net, objective, batch)[0]
    with torch.no_grad():
        ours, theirs = student.net(batch["image"], batch["text"]), objective.teacher(batch["image"], batch["text"])
    for part in ("image", "text"):
        z, z0 = ours[f"{part}_features"], theirs[f"{part}_features"]
        assert float(out[part]) == pytest.approx(slow_distance(z, z, z0, z0, 0.04), rel=1e-3, abs=1e-5) and out[part] > 1e-3
    assert torch.allclose(out["cross"], losses.Clip().loss(student.net, batch)["loss"], atol=1e-6)
    assert torch.allclose(out["loss"], out["image"] + out["text"] + 0.7 * out["cross"], atol=1e-6)


def test_without_clips_loss_it_does_not_matter_which_caption_belongs_to_which_image(distilled: tuple[CLIP, CompRess],
                                                                                    batches: list[dict[str, Any]]) -> None:
    student, kept = distilled
    turned = batches[0] | {"text": batches[0]["text"].roll(1, 0)}
    (a, g), (b, h) = (gradients(student.net, emptied(kept, cross=0.0), batch) for batch in (batches[0], turned))
    assert torch.allclose(a["loss"], a["image"] + a["text"], atol=1e-6) and torch.allclose(a["loss"], b["loss"], atol=1e-5)
    assert g.keys() == h.keys() and all(torch.allclose(g[k], h[k], atol=1e-5, rtol=1e-3) for k in g)
    assert "logit_scale" not in g or not g["logit_scale"].any()
    with_clip = [gradients(student.net, emptied(kept), batch)[0]["loss"] for batch in (batches[0], turned)]
    assert not torch.allclose(*with_clip, atol=1e-4)


@pytest.mark.parametrize("anchors", [128_000, N + 2])
def test_training_draws_the_student_to_the_teacher(anchors: int, tiny_model: str, batches: list[dict[str, Any]]) -> None:
    model = victim("vit", 2, tiny_model)
    objective = CompRess(anchors=anchors, cross=0.0)
    objective.setup(model)
    first = gradients(model.net, emptied(objective, cross=0.0), batches[0])[0]["loss"]
    train(model, objective, batches[:1] * 20)
    assert gradients(model.net, emptied(objective, cross=0.0), batches[0])[0]["loss"] < 0.5 * first


@pytest.mark.parametrize("anchors", [128_000, N + 2])
def test_a_resumed_run_has_the_teacher_and_the_anchors(anchors: int, tiny_model: str, batches: list[dict[str, Any]]) -> None:
    model, other = (victim("vit", seed, tiny_model) for seed in (2, 7))
    objective, resumed = CompRess(anchors=anchors), CompRess(anchors=anchors)
    objective.setup(model)
    for batch in batches[:3]:
        gradients(model.net, objective, batch)
    torch.save(objective.state_dict(), file := io.BytesIO())
    file.seek(0)
    resumed.setup(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[3:] * 2:
        a, b = (gradients(model.net, o, batch)[0] for o in (objective, resumed))
        assert all(torch.equal(a[k], b[k]) for k in a)
