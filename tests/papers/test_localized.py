"""Localized cropping: the second crop is a neighbour of the first, and everything else is the objective's own."""
from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import gradients
from PIL import Image
from torch import Generator, Tensor, nn

from mmbackdoor import clip, keyed, losses, shards
from mmbackdoor.clip import CLIP, Augment, Model
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.defenses.localized import LocalizedCropping, boxes, neighbours
from mmbackdoor.defenses.safeclip import SafeCLIP
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput, Batch, Objective, Sample, image_view

N = 6
DELTA, SCALE = 0.2, (0.2, 1.0)
Box = tuple[int, int, int, int]


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    return clip.load(Model(tiny_model), seed=2)


@pytest.fixture(scope="module")
def samples(toy: Path) -> list[Sample]:
    return [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]


OVER: dict[str, tuple[Callable[[], Objective], str, str]] = {
    "SLIP": (partial(SLIP, hidden=16, out=8), "crop_1", "crop_2"), "CleanCLIP": (CleanCLIP, "image", "image_aug"),
    "SafeCLIP": (SafeCLIP, "image", "image_aug")}
over = pytest.mark.parametrize("kind, first, second", OVER.values(), ids=OVER)


def size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def neighbourhood(w: int, h: int, box: Box) -> tuple[float, float, float, float]:
    """The box, larger by a fifth of its sides on every side, within the image; before it is rounded to pixels."""
    (bw, bh), (x0, y0, x1, y1) = size(box), box
    return max(0, x0 - 0.2 * bw), max(0, y0 - 0.2 * bh), min(w, x1 + 0.2 * bw), min(h, y1 + 0.2 * bh)


def test_the_defaults_are_the_papers() -> None:
    objective = LocalizedCropping(SLIP())
    assert (objective.delta, objective.scale) == (DELTA, SCALE)


# ---- the boxes


@settings(deadline=None, max_examples=500)
@given(w=st.integers(1, 4000), h=st.integers(1, 3000), seed=st.integers(0, 2**32))
@example(w=1, h=1, seed=0)
@example(w=4000, h=3000, seed=0)
@example(w=4000, h=1, seed=0)
@example(w=1, h=3000, seed=0)
@example(w=100, h=10, seed=0)
def test_the_second_crop_lies_in_the_neighbourhood_of_the_first_and_is_not_too_small(w: int, h: int, seed: int) -> None:
    """Its area is at least a fifth of the image's, or what the neighbourhood has room for at an aspect of a crop's, if that is less."""
    first, second = boxes(w, h, SCALE, DELTA, keyed.rng(seed))
    assert 0 <= first[0] < first[2] <= w and 0 <= first[1] < first[3] <= h
    left, top, right, bottom = neighbourhood(w, h, first)
    assert max(0, left - 0.5) <= second[0] < second[2] <= min(w, right + 0.5)
    assert max(0, top - 0.5) <= second[1] < second[3] <= min(h, bottom + 0.5)
    nw, nh = max(0, right - left - 1), max(0, bottom - top - 1)  # each of its edges is rounded by half a pixel at most
    room = min(nw, nh * 4 / 3) * min(nh, nw * 4 / 3)
    (cw, ch) = size(second)
    assert (cw + 0.5) * (ch + 0.5) >= min(0.2 * w * h, room) * (1 - 1e-6)


@pytest.mark.parametrize("w, h", [(400, 300), (300, 400), (224, 224), (1000, 400)])
def test_on_photographs_the_second_crop_has_a_fifth_of_the_image_or_the_whole_neighbourhood(w: int, h: int) -> None:
    for i in range(500):
        first, second = boxes(w, h, SCALE, DELTA, keyed.rng(i))
        left, top, right, bottom = neighbourhood(w, h, first)
        assert np.prod(size(second)) >= 0.98 * min(0.2 * w * h, (right - left) * (bottom - top))


def test_the_second_crop_reaches_out_of_the_first_on_every_side_and_takes_all_shares_of_the_neighbourhood() -> None:
    w, h, n = 4000, 3000, 1500
    out, shares = [], []
    for i in range(n):
        first, second = boxes(w, h, SCALE, DELTA, keyed.rng(i))
        bw, bh = size(first)
        out.append([(first[0] - second[0]) / bw, (first[1] - second[1]) / bh, (second[2] - first[2]) / bw, (second[3] - first[3]) / bh])
        left, top, right, bottom = neighbourhood(w, h, first)
        area = (right - left) * (bottom - top)
        least = 0.2 * w * h / area
        shares.append((np.prod(size(second)) / area - least) / (1 - least))
    assert (np.max(out, 0) > 0.17).all() and np.max(out) <= 0.2 + 1e-3
    assert min(shares) < 0.02 and max(shares) > 0.95 and 0.35 < np.mean(shares) < 0.55


def test_the_first_crop_is_the_usual_one() -> None:
    assert all(boxes(300, 200, SCALE, DELTA, keyed.rng(i))[0] == Augment(SCALE).box(300, 200, keyed.rng(i)) for i in range(20))


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_delta_says_how_far_the_neighbourhood_reaches(delta: float) -> None:
    outside = 0.0
    for i in range(300):
        first, second = boxes(3000, 3000, (0.05, 0.2), delta, keyed.rng(i))
        outside = max(outside, (first[0] - second[0]) / size(first)[0], (second[3] - first[3]) / size(first)[1])
    assert outside <= 0 if delta == 0 else 0.8 < outside <= 1


# ---- two views


def where(clip: CLIP, sample: Sample, rng: Generator) -> Tensor:
    """A view that says which crop it was given, and a draw of its own."""
    box = clip.aug.box(*sample["image"].size, rng)
    return torch.tensor([*box, float(torch.rand((), generator=rng))], dtype=torch.float64)


def test_each_crop_comes_first_about_half_of_the_time(front: CLIP) -> None:
    sample, swapped, draws = {"image": Image.new("RGB", (400, 300))}, 0, []
    for i in range(400):
        pair = boxes(400, 300, SCALE, DELTA, keyed.rng(i))
        a, b = neighbours((where, where), SCALE, DELTA, front, sample, keyed.rng(i))
        found = tuple(a[:4].int().tolist()), tuple(b[:4].int().tolist())
        assert found in (pair, pair[::-1]) and pair[0] != pair[1]
        swapped += found != pair
        draws += [float(a[4]), float(b[4])]
    assert 160 < swapped < 240
    assert len(set(draws)) == 800, "each view of each sample draws its own colours"


def test_neighbours_are_a_function_of_their_rng_and_pickle(front: CLIP, samples: list[Sample]) -> None:
    views = pickle.loads(pickle.dumps(dict(LocalizedCropping(SLIP()).views)))
    torch.manual_seed(1)
    first = views["neighbours"](front, samples[0], keyed.rng(3))
    torch.manual_seed(2)
    assert torch.equal(views["neighbours"](front, samples[0], keyed.rng(3)), first) and first.shape == (2, 3, 32, 32)
    assert not torch.equal(views["neighbours"](front, samples[0], keyed.rng(4)), first)


def test_the_pixels_are_those_of_the_boxes(front: CLIP) -> None:
    """In an image whose red tells the column and whose green the row, the mean of a crop tells its middle."""
    y, x = np.mgrid[0:150, 0:200]
    sample = {"image": Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))}
    mean, std = (torch.tensor(front.cfg[k]) for k in ("mean", "std"))
    for i in range(40):
        first, second = boxes(200, 150, SCALE, DELTA, keyed.rng(i))
        middles = [((b[0] + b[2] - 1) / 2, (b[1] + b[3] - 1) / 2) for b in (first, second)]
        pixels = neighbours((image_view, image_view), SCALE, DELTA, front, sample, keyed.rng(i))
        seen = (pixels.mean((2, 3)) * std + mean)[:, :2] * 255
        assert any(torch.allclose(seen, torch.tensor(order), atol=1.0) for order in (middles, middles[::-1]))


def test_the_mirror_and_the_other_views_are_left_as_they_were(front: CLIP) -> None:
    mirrored, theirs = Augment(flip=True), LocalizedCropping(SLIP()).views
    assert {k: theirs[k] for k in ("image", "text")} == {k: SLIP().views[k] for k in ("image", "text")}
    assert set(theirs) == {"image", "text", "neighbours"}

    def flips(clip: CLIP, sample: Sample, rng: Generator) -> Tensor:
        return torch.tensor(float(clip.aug.flip))

    for aug in (mirrored, Augment()):
        clip = CLIP(front.net, front.tokenizer, front.card, aug)
        assert neighbours((flips, flips), SCALE, DELTA, clip, {"image": Image.new("RGB", (9, 9))}, keyed.rng(0)).tolist() == [aug.flip] * 2


@pytest.mark.parametrize("shape", [(1, 1), (300, 2), (2, 300)])
def test_an_image_of_any_shape_has_neighbours(front: CLIP, shape: tuple[int, int]) -> None:
    sample = {"image": Image.new("RGB", shape), "text": "a dot", "__key__": "k"}
    for kind, first, second in OVER.values():
        views = LocalizedCropping(kind(), first, second).views
        assert views["neighbours"](front, sample, keyed.rng(0)).shape == (2, 3, 32, 32)


# ---- over an objective


@over
def test_the_loss_is_the_objectives_on_the_neighbours(tiny: CLIP, samples: list[Sample], kind: Callable[[], Objective], first: str,
                                                      second: str) -> None:
    ours, theirs = LocalizedCropping(kind(), first, second), kind()
    batch = collate(tiny, ours.views, samples, seed=0, epoch=0)
    assert batch["neighbours"].shape == (N, 2, 3, 32, 32)
    plain = {k: v for k, v in batch.items() if k != "neighbours"} | {first: batch["neighbours"][:, 0], second: batch["neighbours"][:, 1]}
    assert set(plain) == {"key", *theirs.views}
    for objective, seen in ((ours, batch), (theirs, plain)):
        objective.setup(tiny)
        objective.start_epoch(tiny, lambda seen=seen: [seen], 0)
    (a, g), (b, h) = gradients(tiny.net, ours, batch), gradients(tiny.net, theirs, plain)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert g.keys() == h.keys() and all(torch.equal(g[k], h[k]) for k in g)
    assert "neighbours" in batch, "the batch is not changed"


class Told(losses.Clip):
    """Says what it was asked."""

    views = {"image": image_view, "again": image_view, "text": losses.Clip.views["text"]}

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.head = nn.Linear(1, 1)

    def setup(self, clip: Any) -> None:
        self.asked.append("setup")

    def start_epoch(self, clip: Any, batches: Callable[[], Any], epoch: int) -> None:
        self.asked.append((epoch, [sorted(batch) for batch in batches()]))

    def pace(self, epoch: int) -> float:
        return 1 / (1 + epoch)

    def heads(self) -> nn.Module:
        return self.head

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked.append(state)


def test_everything_else_is_the_objectives_own() -> None:
    inner = Told()
    objective = LocalizedCropping(inner, "image", "again")
    objective.setup(None)
    batch: Batch = {"key": ["k"], "text": torch.zeros(1, 2), "neighbours": torch.zeros(1, 2, 3, 4, 4)}
    objective.start_epoch(None, lambda: [batch, batch], 3)
    objective.load_state_dict({"b": 2})
    assert inner.asked == ["setup", (3, [["again", "image", "key", "text"]] * 2), {"b": 2}]
    assert objective.pace(3) == 0.25 and objective.heads() is inner.head and objective.state_dict() == {"a": 1}


@pytest.mark.parametrize("objective, first, second, lacking", [
    (losses.Clip(), "crop_1", "crop_2", "crop_1"), (SLIP(), "crop_1", "image_aug", "image_aug"),
    (CleanCLIP(), "crop_1", "image_aug", "crop_1"), (SLIP(), "", "crop_2", "")])
def test_a_view_that_the_objective_has_not_is_refused(objective: Objective, first: str, second: str, lacking: str) -> None:
    with pytest.raises(BadInput) as error:
        _ = LocalizedCropping(objective, first, second).views
    said = str(error.value)
    assert "\n" not in said and said.startswith("--objective.first, --objective.second: ")
    assert f"{type(objective).__name__} has no view {lacking!r}" in said and all(name in said for name in objective.views)


def test_one_view_twice_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^--objective.first, --objective.second: [^\n]*'crop_1'[^\n]*$"):
        _ = LocalizedCropping(SLIP(), "crop_1", "crop_1").views
