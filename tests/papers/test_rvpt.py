"""RVPT: only tokens among the image's are learned, captions are found as before, and the deeper blocks say something else."""
from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

from mmbackdoor import clip, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.rvpt import RVPT, watched
from mmbackdoor.losses import cross_entropy
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput

LAYERS = 3


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> CLIP:
    path = tmp_path_factory.mktemp("model") / "deep.json"
    path.write_text(json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"layers": LAYERS}}))  # type: ignore[operator]
    return clip.load(Model(str(path)), seed=3)


@pytest.fixture(scope="module")
def batch(toy: Path, victim: CLIP) -> dict[str, Any]:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(8), strict=False)]
    return collate(victim, RVPT().views, samples, 0, 0)


def begun(victim: CLIP, **numbers: Any) -> tuple[CLIP, RVPT]:
    model = replace(victim, net=copy.deepcopy(victim.net), card=copy.deepcopy(victim.card))
    objective = RVPT(**numbers)
    objective.setup(model)
    return model, objective


def test_the_tokens_are_the_share_of_vit_b_16_that_the_paper_tunes() -> None:
    assert 12 * RVPT().n * 768 / 149.62e6 == pytest.approx(0.0027, abs=2e-5)


def test_only_the_tokens_are_trained(victim: CLIP, batch: dict[str, Any]) -> None:
    model, objective = begun(victim, n=2)
    assert [name for name, p in model.net.named_parameters() if p.requires_grad] == ["visual.prompts.tokens"]
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.net.parameters() if p.requires_grad], lr=0.1)
    objective.loss(model.net, batch)["loss"].backward()
    optimizer.step()
    changed = {k for k, v in model.net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"visual.prompts.tokens"}


def test_the_loss_is_the_cross_entropy_and_the_likeness_of_the_deeper_blocks(victim: CLIP, batch: dict[str, Any]) -> None:
    model, objective = begun(victim, n=2, alpha=0.5)
    with torch.no_grad():
        out = objective.loss(model.net, batch)
        with watched(model.net) as now:
            x = model.image_features(batch["image"])
        with watched(victim.net) as then:
            victim.image_features(batch["image"])
        t, s = victim.net.encode_text(batch["text"], normalize=True), victim.net.logit_scale.exp()
    alike = torch.stack([F.cosine_similarity(a, b).clamp(min=0).mean() for a, b in zip(now[1:], then[1:], strict=True)]).mean()
    assert len(now) == LAYERS and now[0].shape == (8, 32)
    assert float(out["alike"].detach()) == pytest.approx(float(alike), abs=1e-6) and 0 < float(alike) < 1
    assert float(out["cross"]) == pytest.approx(float(cross_entropy(x, t, s)), abs=1e-5)
    assert float(out["loss"]) == pytest.approx(float(out["cross"] + 0.5 * out["alike"]), abs=1e-6)


def test_training_makes_the_deeper_blocks_unlike_what_they_were(victim: CLIP, batch: dict[str, Any]) -> None:
    model, objective = begun(victim, n=4, alpha=10.0)
    optimizer = torch.optim.AdamW([p for p in model.net.parameters() if p.requires_grad], lr=0.05)
    alike = []
    for _ in range(40):
        out = objective.loss(model.net, batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        alike.append(float(out["alike"].detach()))
    assert alike[-1] < 0.6 * alike[0]


def test_a_resnet_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match="use a ViT"):
        RVPT().setup(clip.load(Model("configs/toy/rn_tiny.json")))
