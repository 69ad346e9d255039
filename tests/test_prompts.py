"""Learned prompts: where they stand, that they travel with a model, and that nothing else of it changes."""
from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from torch import Tensor

from mmbackdoor import clip, prompts, sets
from mmbackdoor.clip import CLIP, Model
from mmbackdoor.defenses.rvpt import RVPT
from mmbackdoor.evaluate import zero_shot_head
from mmbackdoor.fit import Schedule, fit
from mmbackdoor.index import find
from mmbackdoor.stream import Stream
from mmbackdoor.types import BadInput

NAMES = ("red star", "blue ring", "cross")


def given(model: CLIP, **told: object) -> CLIP:
    """A copy of the model with prompts."""
    other = replace(model, net=copy.deepcopy(model.net), card=copy.deepcopy(model.card) | {"prompts": told})
    prompts.attach(other.net, other.tokenizer, other.card)
    return other


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_image_prompts_are_seen_by_every_block_and_by_nothing_behind_them(model: CLIP) -> None:
    changed = given(model, image=5)
    lengths: list[int] = []
    block = changed.net.visual.transformer.resblocks[0]
    block.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    behind: list[int] = []
    changed.net.visual.ln_post.register_forward_hook(lambda m, args, out: behind.append(out.shape[1]))
    with torch.no_grad():
        x = changed.image_features(images())
    places = 1 + (32 // 8) ** 2
    assert lengths == [places + 5] and behind == [places]
    assert x.shape == (3, 32) and not torch.allclose(x, model.image_features(images()))


def test_a_block_puts_its_own_tokens_in_the_place_of_those_of_the_block_before(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text(json.dumps(TINY | {"vision_cfg": TINY["vision_cfg"] | {"layers": 2}}))  # type: ignore[operator]
    changed = given(clip.load(Model(str(tmp_path / "two.json"))), image=2)
    tokens = changed.net.visual.prompts.tokens
    assert tokens.shape == (2, 2, 32)
    seen: list[Tensor] = []
    for block in changed.net.visual.transformer.resblocks:
        block.ln_1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        changed.image_features(images(1))
    first, second = (x if changed.net.visual.transformer.batch_first else x.transpose(0, 1) for x in seen)
    assert first.shape == second.shape and torch.equal(first[0, 1:3], tokens[0]) and torch.equal(second[0, 1:3], tokens[1])


def test_learned_words_stand_before_the_names_and_other_texts_are_as_they_were(model: CLIP) -> None:
    changed = given(model, classes=list(NAMES), words=3)
    with torch.no_grad():
        assert torch.equal(changed.text_features(["a red star"]), model.text_features(["a red star"]))
        before = changed.class_features(NAMES)
        changed.net.class_prompts.words[1].mul_(3)
        after = changed.class_features(NAMES)
    assert before is not None and after is not None and before.shape == (3, 32)
    assert torch.allclose(before[[0, 2]], after[[0, 2]], atol=1e-6) and not torch.allclose(before[1], after[1], atol=1e-3)


def test_placeholders_with_the_embedding_of_a_word_are_that_word(model: CLIP) -> None:
    changed = given(model, classes=list(NAMES), words=2)
    with torch.no_grad():
        dog = changed.tokenize("dog")[1]
        changed.net.class_prompts.words.copy_(changed.net.token_embedding.weight[dog].expand(3, 2, -1))
        assert torch.allclose(changed.class_features(NAMES), model.text_features([f"dog dog {name}." for name in NAMES]), atol=1e-6)  # type: ignore[arg-type]


def test_evaluation_takes_learned_prompts_for_just_these_classes(model: CLIP, toy: Path) -> None:
    data = sets.open_set(str(toy / "test"))
    changed = given(model, classes=sorted(data.classnames), words=2)
    with torch.no_grad():
        head = zero_shot_head(changed, data.classnames, data.templates)
        assert torch.equal(head.T, changed.class_features(data.classnames))  # type: ignore[arg-type]
        others = ("a dog", *data.classnames)
        assert torch.allclose(zero_shot_head(changed, others, data.templates), zero_shot_head(model, others, data.templates), atol=1e-6)


def test_a_saved_model_comes_back_with_its_prompts(model: CLIP, tmp_path: Path) -> None:
    changed = given(model, image=4, classes=list(NAMES), words=3)
    with torch.no_grad():
        changed.net.class_prompts.words.normal_()
        changed.net.visual.prompts.tokens.normal_()
    changed.save(tmp_path / "run")
    again = clip.load_run(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(again.image_features(images()), changed.image_features(images()))
        assert torch.equal(again.class_features(NAMES), changed.class_features(NAMES))  # type: ignore[arg-type]
    assert again.fingerprint() == changed.fingerprint() != model.fingerprint()


def test_classes_are_encoded_in_parts_and_without_a_graph(model: CLIP) -> None:
    changed = given(model, classes=list(NAMES), words=2)
    whole, parts = changed.class_features(NAMES), changed.class_features(NAMES, batch=2)
    assert whole is not None and parts is not None and not whole.requires_grad
    assert torch.allclose(whole, parts, atol=1e-6)


def test_a_run_under_way_is_loaded_with_its_prompts_and_is_a_start(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    started = clip.load(Model(str(tiny_model)))
    stream = Stream(find(str(toy / "train")), started, RVPT.views, 64)
    fit(started, RVPT(n=2), stream, Accelerator(cpu=True), Schedule(epochs=1, lr=1e-2, warmup=1), tmp_path / "run")
    assert not (tmp_path / "run/open_clip_model.safetensors").exists()
    for again in (clip.load_run(tmp_path / "run"), clip.load(Model(str(tiny_model)), tmp_path / "run")):
        with torch.no_grad():
            assert torch.allclose(again.image_features(images()), started.image_features(images()), atol=1e-6)
    with pytest.raises(BadInput, match="learned prompts already"):
        RVPT(n=2).setup(again)


def test_two_models_with_new_prompts_are_the_same(model: CLIP) -> None:
    one, other = (given(model, image=4, classes=list(NAMES), words=3).net.state_dict() for _ in range(2))
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(("told", "said"), [({"classes": ["a very long name " * 5, "dog"], "words": 2}, "longest name"),
                                            ({"classes": ["dog", "cat"], "words": 14}, "use fewer words")])
def test_words_that_do_not_fit_are_refused_in_one_line(model: CLIP, told: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        given(model, **told)
    assert "\n" not in str(raised.value)


def test_a_network_that_cannot_have_image_prompts_is_refused_in_one_line() -> None:
    resnet = clip.load(Model("configs/toy/rn_tiny.json"))
    with pytest.raises(BadInput, match="use a ViT"):
        given(resnet, image=2)
