"""LastLayer: the two projections and the temperature are all that training changes, and they start anew or where the victim left them."""
from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY
from torch import Tensor

from mmbackdoor import clip, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.last_layer import LastLayer
from mmbackdoor.fit import groups
from mmbackdoor.huggingface import HuggingFace
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput

N = 6
LAST = {"vit": {"visual.proj", "text_projection", "logit_scale"},
        "custom": {"visual.proj", "text.text_projection", "logit_scale"},
        "resnet": {"visual.attnpool.c_proj.weight", "visual.attnpool.c_proj.bias", "text_projection", "logit_scale"},
        "transformers": {"clip.visual_projection.weight", "clip.text_projection.weight", "clip.logit_scale"}}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = SHAPE | {"max_position_embeddings": 16, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
PICTURES = SHAPE | {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def victims(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CLIP]:
    from transformers import CLIPConfig, CLIPModel

    custom = tmp_path_factory.mktemp("custom") / "custom.json"
    custom.write_text(json.dumps(TINY | {"custom_text": True}))
    found = {name: clip.load(Model(path), seed=2)
             for name, path in (("vit", tiny_model), ("custom", str(custom)), ("resnet", str(ROOT / "configs/toy/rn_tiny.json")))}
    torch.manual_seed(3)
    theirs = CLIPModel(CLIPConfig(text_config=WORDS, vision_config=PICTURES, projection_dim=24))
    return found | {"transformers": replace(found["vit"], net=HuggingFace(theirs))}


@pytest.fixture
def victim(victims: dict[str, CLIP], network: str) -> CLIP:
    return replace(victims[network], net=copy.deepcopy(victims[network].net))


@pytest.fixture(scope="module")
def batch(toy: Path, victims: dict[str, CLIP]) -> dict[str, Any]:
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]
    return collate(victims["vit"], LastLayer().views, samples, seed=0, epoch=0)


def state(model: CLIP) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.net.state_dict().items()}


def train(model: CLIP, objective: LastLayer, batch: dict[str, Any], steps: int = 3) -> list[float]:
    """As the loop does it: its groups, weight decay, and a network in training mode. What the loss was before each step."""
    optimizer = torch.optim.AdamW(groups(model.net, 0.2), lr=1e-4)
    model.net.train()
    found = []
    for _ in range(steps):
        out = objective.loss(model.net, batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(out["loss"].detach()))
    return found


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("network", LAST)
def test_only_the_projections_and_the_temperature_are_trained(network: str, reset: bool, victim: CLIP, batch: dict[str, Any]) -> None:
    objective = LastLayer(reset=reset)
    objective.setup(victim)
    assert {name for name, p in victim.net.named_parameters() if p.requires_grad} == LAST[network]
    before = state(victim)
    seen = train(victim, objective, batch)
    changed = {k for k, v in victim.net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == LAST[network] and seen[-1] < seen[0]


@pytest.mark.parametrize("network", ["resnet"])
def test_statistics_of_batches_neither_change_nor_enter_the_loss(network: str, victim: CLIP, batch: dict[str, Any]) -> None:
    statistics = {k: v.clone() for k, v in victim.net.named_buffers() if "running" in k or "tracked" in k}
    assert len(statistics) > 6
    objective = LastLayer()
    objective.setup(victim)
    victim.net.train()
    with torch.no_grad():
        whole = objective.loss(victim.net, batch)["loss"]
        victim.net.eval()
        assert torch.equal(whole, losses.Clip().loss(victim.net, batch)["loss"])
    assert all(torch.equal(dict(victim.net.named_buffers())[k], v) for k, v in statistics.items())


@pytest.mark.parametrize("network", LAST)
def test_without_a_reset_it_starts_where_the_victim_is_with_clips_loss(network: str, victim: CLIP, batch: dict[str, Any]) -> None:
    before = state(victim)
    victim.net.eval()
    expected = losses.Clip().loss(victim.net, batch)["loss"].detach()
    objective = LastLayer(reset=False)
    objective.setup(victim)
    assert all(torch.equal(v, before[k]) for k, v in victim.net.state_dict().items())
    assert torch.equal(objective.loss(victim.net, batch)["loss"].detach(), expected)


@pytest.mark.parametrize("network", LAST)
def test_a_reset_draws_new_projections_of_the_same_spread_and_nothing_else(network: str, victim: CLIP) -> None:
    before = state(victim)
    LastLayer().setup(victim)
    drawn = {k for k, v in victim.net.state_dict().items() if not torch.equal(v, before[k])}
    assert drawn == {k for k in LAST[network] if before[k].ndim == 2}
    for name in drawn:
        new = victim.net.state_dict()[name]
        assert float(new.std()) == pytest.approx(float(before[name].std()), rel=0.1)
        assert abs(float(torch.corrcoef(torch.stack([new.flatten(), before[name].flatten()]))[0, 1])) < 0.2


@pytest.mark.parametrize("network", ["vit"])
def test_new_projections_are_the_same_on_every_process_and_differ_between_towers(network: str, victim: CLIP,
                                                                                 victims: dict[str, CLIP]) -> None:
    again = replace(victims[network], net=copy.deepcopy(victims[network].net))
    LastLayer().setup(victim)
    torch.manual_seed(99)
    LastLayer().setup(again)
    assert all(torch.equal(v, state(again)[k]) for k, v in victim.net.state_dict().items())
    image, text = victim.net.get_parameter("visual.proj"), victim.net.get_parameter("text_projection")
    assert not torch.allclose(image / image.std(), text / text.std(), atol=0.1)


def no_projection(tiny_model: str, tmp_path: Path) -> CLIP:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY | {"text_cfg": TINY["text_cfg"] | {"proj_type": "none"}}))
    return clip.load(Model(str(path)))


def siglip(tiny_model: str, tmp_path: Path) -> CLIP:
    from transformers import SiglipConfig, SiglipModel

    net = SiglipModel(SiglipConfig(text_config=SHAPE | {"max_position_embeddings": 16, "vocab_size": 99}, vision_config=PICTURES))
    return replace(clip.load(Model(tiny_model)), net=HuggingFace(net))


@pytest.mark.parametrize("build", [no_projection, siglip])
def test_a_network_without_two_last_layers_is_one_line(build: Callable[[str, Path], CLIP], tiny_model: str, tmp_path: Path) -> None:
    model = build(tiny_model, tmp_path)
    before = state(model)
    with pytest.raises(BadInput, match="linear layer") as raised:
        LastLayer().setup(model)
    assert len(str(raised.value).splitlines()) == 1 and re.match(type(model.net).__name__, str(raised.value))
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())
