"""Fine-Pruning: which units go, that the rest stays, and that what went is gone: for the output, and through further training."""
from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from torch import Tensor, nn

from mmbackdoor import clip, losses, shards
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.fine_pruning import FinePruning
from mmbackdoor.fit import groups
from mmbackdoor.huggingface import HuggingFace
from mmbackdoor.stream import collate
from mmbackdoor.types import BadInput

N = 12
KINDS = ["vit", "resnet", "convnext", "transformers"]
LAYER = {"vit": "visual.transformer.resblocks.0.mlp", "resnet": "visual.layer4.0", "convnext": "visual.trunk.stages.3.blocks.1.mlp",
         "transformers": "clip.vision_model.encoder.layers.1.mlp"}
PARTS = {"vit": ("c_fc", "gelu", "c_proj"), "resnet": ("bn2", "act2", "conv3"), "convnext": ("fc1", "act", "fc2"),
         "transformers": ("fc1", "activation_fn", "fc2")}
"""What leads into the hidden units, gives their activations, and leads out of them."""


@pytest.fixture(scope="module")
def batches(toy: Path, front: CLIP) -> list[dict[str, Any]]:
    """Of 8 and 4 pairs."""
    samples = [s for s, _ in zip(shards.read(str(toy / "train")), range(N), strict=False)]
    return [collate(front, FinePruning().views, part, seed=0, epoch=0) for part in (samples[:8], samples[8:])]


@pytest.fixture(scope="module")
def networks(tiny_model: str, tmp_path_factory: pytest.TempPathFactory, batches: list[dict[str, Any]]) -> dict[str, CLIP]:
    """One of each kind, whose hidden units differ in how active they are."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("convnext") / "convnext.json"
    path.write_text(json.dumps(TINY | {"vision_cfg": {"timm_model_name": "test_convnext", "timm_proj": "linear", "image_size": 32}}))
    names = {"vit": tiny_model, "resnet": str(ROOT / "configs/toy/rn_tiny.json"), "convnext": str(path)}
    found = {kind: clip.load(Model(name), seed=2) for kind, name in names.items()}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {"max_position_embeddings": 16, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
    torch.manual_seed(3)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}, projection_dim=24))
    found["transformers"] = replace(found["vit"], net=HuggingFace(theirs))
    with torch.no_grad():
        for kind, model in found.items():
            for p in parts(kind, model)[0].parameters():
                p.add_(torch.rand(p.shape))
        for block in (m for m in found["resnet"].net.modules() if hasattr(m, "bn3")):
            block.bn3.weight.fill_(1)  # as they come, next to nothing of a block gets through
        for block in (m for m in found["convnext"].net.modules() if hasattr(m, "gamma")):
            block.gamma.fill_(1)
        for _ in range(20):
            found["resnet"].net.train().encode_image(torch.cat([b["image"] for b in batches]))
    return found


@pytest.fixture
def victim(networks: dict[str, CLIP], kind: str) -> CLIP:
    return replace(networks[kind], net=copy.deepcopy(networks[kind].net))


def parts(kind: str, model: CLIP) -> list[nn.Module]:
    return [model.net.get_submodule(f"{LAYER[kind]}.{name}") for name in PARTS[kind]]


@torch.no_grad()
def activations(kind: str, model: CLIP, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, places, U) of the last hidden layer, written out once more."""
    net = model.net.eval()
    if kind == "resnet":
        v = net.visual
        block = v.layer4[0]
        u = v.layer3(v.layer2(v.layer1(v.stem(x))))
        u = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(u))))))
        return u.flatten(2).transpose(1, 2)
    if kind == "vit":
        block, caught = net.visual.transformer.resblocks[-1], []
        hook = block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        net.encode_image(x)
        hook.remove()
        u = caught[0] + block.attention(block.ln_1(caught[0]))
        return F.gelu(block.ln_2(u) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
    if kind == "convnext":
        v, last = net.visual.trunk, net.visual.trunk.stages[-1]
        block, u = last.blocks[-1], last.blocks[:-1](last.downsample(v.stages[:-1](v.stem(x))))
        u = block.norm(block.conv_dw(u).permute(0, 2, 3, 1)).flatten(1, 2)
        return F.gelu(u @ block.mlp.fc1.weight.T + block.mlp.fc1.bias, approximate="tanh")
    tower = net.clip.vision_model
    layer, u = tower.encoder.layers[-1], tower(pixel_values=x, output_hidden_states=True).hidden_states[-2]
    u = u + layer.self_attn(layer.layer_norm1(u), attention_mask=None)[0]
    u = layer.layer_norm2(u) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias
    return u * torch.sigmoid(1.702 * u)


def lowest(kind: str, model: CLIP, x: Tensor, share: float) -> set[int]:
    """Units of lowest mean activation."""
    mean = activations(kind, model, x).double().mean((0, 1))
    ranked, n = mean.sort()
    cut = round(share * len(mean))
    assert ranked[cut] - ranked[cut - 1] > 1e-6, "the example has a tie"
    return set(n[:cut].tolist())


def tensors(kind: str, model: CLIP) -> tuple[list[Tensor], Tensor]:
    """Weights that lead into the hidden layer, U rows each, and those that lead out, U columns."""
    before, _, behind = parts(kind, model)
    return [before.weight.detach(), before.bias.detach()], behind.weight.detach()


def dead(kind: str, model: CLIP) -> set[int]:
    """Units with no weight before and behind them."""
    leads_in, leads_out = tensors(kind, model)
    return {u for u in range(len(leads_in[0])) if not any(w[u].any() for w in leads_in) and not leads_out[:, u].any()}


def replacing(kind: str, model: CLIP, units: set[int], x: Tensor) -> Tensor:
    """Features of images where these units are noise."""
    def drown(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        out = out.clone()
        place: tuple[Any, ...] = (slice(None), sorted(units)) if kind == "resnet" else (..., sorted(units))
        out[place] = 100 * torch.randn_like(out[place])
        return out

    hook = parts(kind, model)[1].register_forward_hook(drown)
    with torch.no_grad():
        found = model.net.eval().encode_image(x)
    hook.remove()
    return found


def test_the_defaults_cut_half() -> None:
    assert FinePruning().share == 0.5


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_units_that_clean_images_excite_least_go_and_nothing_else_changes(kind: str, share: float, victim: CLIP,
                                                                              batches: list[dict[str, Any]]) -> None:
    expected = lowest(kind, victim, torch.cat([b["image"] for b in batches]), share)
    before = {k: v.clone() for k, v in victim.net.state_dict().items()}
    edited = FinePruning(share)(victim, lambda: iter(batches))
    assert edited.net is victim.net and dead(kind, edited) == expected and expected
    leads_in, leads_out = tensors(kind, edited)
    stay = sorted(set(range(len(leads_in[0]))) - expected)
    before_it, _, behind_it = (f"{LAYER[kind]}.{name}" for name in PARTS[kind])
    names = [f"{before_it}.weight", f"{before_it}.bias", f"{behind_it}.weight"]
    for name, v in edited.net.state_dict().items():
        if name not in names:
            assert torch.equal(v, before[name]), name
    assert all(torch.equal(w[stay], before[n][stay]) for w, n in zip(leads_in, names, strict=False))
    assert torch.equal(leads_out[:, stay], before[names[-1]][:, stay])


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_pairs_are_looked_at_than_asked_for(kind: str, victim: CLIP, batches: list[dict[str, Any]]) -> None:
    def first() -> Iterator[dict[str, Any]]:
        yield batches[0]
        raise AssertionError("more pairs were read")

    expected = lowest(kind, victim, batches[0]["image"], 0.5)
    assert dead(kind, FinePruning(pairs=8)(victim, first)) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_0_is_the_model_itself(kind: str, training: bool, victim: CLIP, batches: list[dict[str, Any]]) -> None:
    before = {k: v.clone() for k, v in victim.net.state_dict().items()}
    victim.net.train(training)
    after = FinePruning(0.0)(victim, lambda: iter(batches)).net
    assert all(torch.equal(v, before[k]) for k, v in after.state_dict().items())
    assert after.training is training and not any(m._forward_hooks for m in after.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_does_not_depend_on_cut_units(kind: str, victim: CLIP, batches: list[dict[str, Any]]) -> None:
    x = batches[0]["image"]
    cut = dead(kind, FinePruning()(victim, lambda: iter(batches)))
    with torch.no_grad():
        plain = victim.net.eval().encode_image(x)
    rest = set(range(len(tensors(kind, victim)[0][0]))) - cut
    assert torch.equal(replacing(kind, victim, cut, x), plain)
    assert not torch.allclose(replacing(kind, victim, {min(rest)}, x), plain, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_units_stay_dead_while_the_rest_is_fine_tuned(kind: str, victim: CLIP, batches: list[dict[str, Any]]) -> None:
    cut = dead(kind, FinePruning()(victim, lambda: iter(batches)))
    rest = sorted(set(range(len(tensors(kind, victim)[0][0]))) - cut)
    before = [w.clone() for w in tensors(kind, victim)[0]]
    optimizer = torch.optim.AdamW(groups(victim.net, 0.2), lr=1e-2)
    victim.net.train()
    for batch in batches * 3:
        losses.Clip().loss(victim.net, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert dead(kind, victim) == cut
    active = activations(kind, victim, batches[0]["image"])
    assert not active[..., sorted(cut)].any() and active[..., rest].any()
    after = tensors(kind, victim)[0]
    assert all(not torch.equal(w[rest], b[rest]) for w, b in zip(after, before, strict=True)), "nothing was trained"


@pytest.mark.parametrize("share", [-0.1, 1.0, 50])
@pytest.mark.parametrize("kind", ["vit"])
def test_a_share_that_is_none_is_one_line_and_changes_nothing(kind: str, share: float, victim: CLIP) -> None:
    before = {k: v.clone() for k, v in victim.net.state_dict().items()}
    with pytest.raises(BadInput, match="--edit.share") as raised:
        FinePruning(share)(victim, lambda: iter([]))
    assert len(str(raised.value).splitlines()) == 1
    assert all(torch.equal(v, before[k]) for k, v in victim.net.state_dict().items())


@pytest.mark.parametrize("kind", ["vit"])
def test_a_tower_of_another_kind_is_one_line(kind: str, victim: CLIP) -> None:
    victim.net.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 32))
    with pytest.raises(BadInput, match="image tower") as raised:
        FinePruning()(victim, lambda: iter([]))
    assert len(str(raised.value).splitlines()) == 1
