"""What loading a model promises: open_clip's pixels and features, one line for what cannot be loaded, nothing executed."""
from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from mmbackdoor import clip, keyed, losses
from mmbackdoor.clip import CLIP, Augment, Model
from mmbackdoor.types import BadInput, to_pixels

TEXTS = ["a red star", "a photo of a banana.", ""]


def picture(mode: str = "RGB", size: tuple[int, int] = (50, 41), seed: int = 0) -> Image.Image:
    """Noise of any PIL mode, the hardest case for a resize."""
    r = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = r.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


@pytest.fixture(scope="module")
def tiny(tiny_model: str) -> CLIP:
    """The tiny model, with weights that no default seed gives."""
    model = clip.load(Model(tiny_model), seed=11)
    model.net.eval()
    return model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub cannot be reached and its cache is empty, as on a node of a cluster. Gives the cache's folder."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def images(n: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def same_features(ours: CLIP, net: Any, tokenizer: Callable[[list[str]], torch.Tensor]) -> bool:
    ours.net.eval()
    net.eval()
    with torch.no_grad():
        by_image = torch.equal(ours.image_features(images()), net.encode_image(images(), normalize=True))
        by_text = torch.equal(ours.text_features(TEXTS), net.encode_text(tokenizer(TEXTS), normalize=True))
    return by_image and by_text


def one_line(raised: pytest.ExceptionInfo[BadInput]) -> str:
    message = str(raised.value)
    assert message and "\n" not in message and len(message) < 500, message
    return message


# ---- preprocessing


@pytest.fixture(scope="module")
def rn50() -> tuple[CLIP, Any]:
    """(ours without its network, open_clip's evaluation transform)."""
    theirs = open_clip.create_model_and_transforms("RN50", load_weights=False)[2]
    return clip.load(Model("RN50")).front(), theirs


SIZES = {"square": (64, 64), "small": (9, 9), "tall": (37, 120), "wide": (301, 50), "exact": (32, 32), "odd": (33, 31)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_preprocess_is_open_clips_bit_for_bit(size: tuple[int, int], tiny: CLIP, rn50: tuple[CLIP, Any], tmp_path: Path) -> None:
    tiny.save(tmp_path)
    theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    image = picture(size=size)
    assert torch.equal(tiny.preprocess(image), theirs(image))
    ours, theirs = rn50
    assert ours.size == (224, 224)
    assert torch.equal(ours.preprocess(image), theirs(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "CMYK"])
def test_preprocess_is_open_clips_for_images_that_are_not_rgb(mode: str, rn50: tuple[CLIP, Any]) -> None:
    ours, theirs = rn50
    image = picture(mode, (260, 300))
    assert torch.equal(ours.preprocess(image), theirs(image))


def test_preprocess_of_a_decoded_image_is_open_clips(rn50: tuple[CLIP, Any]) -> None:
    """What shards.decode gives is RGB; there the order of conversion and resize cannot matter."""
    ours, theirs = rn50
    for mode in ("L", "RGBA", "CMYK"):
        image = picture(mode, (260, 300)).convert("RGB")
        assert torch.equal(ours.preprocess(image), theirs(image))


@pytest.mark.parametrize("change", [{"resize_mode": "squash"}, {"resize_mode": "longest"}, {"resize_mode": "longest", "fill_color": 77},
                                    {"interpolation": "bilinear"}, {"size": [32, 48]}, {"size": [32, 48], "resize_mode": "squash"}],
                         ids=lambda c: "-".join(f"{k}_{v}" for k, v in c.items()))
def test_preprocess_follows_the_preprocess_cfg_of_a_directory(change: dict[str, Any], tiny: CLIP, tmp_path: Path) -> None:
    card = json.loads(json.dumps(tiny.card))
    card["preprocess_cfg"] |= change
    (tmp_path / clip.CARD).write_text(json.dumps(card))
    ours = clip.load(Model(str(tmp_path / clip.CARD)))
    theirs = image_transform_v2(PreprocessCfg(**card["preprocess_cfg"]), is_train=False)
    for size in SIZES.values():
        assert torch.equal(ours.preprocess(picture(size=size)), theirs(picture(size=size)))


def test_geometry_and_normalise_are_the_two_halves_of_preprocess(tiny: CLIP) -> None:
    image = picture(size=(70, 40))
    inner = tiny.geometry(image)
    assert inner.size == (32, 32) and inner.mode == "RGB"
    assert torch.equal(tiny.normalise(to_pixels(inner)), tiny.preprocess(image))


def test_mean_and_std_can_be_overridden(tiny_model: str, tiny: CLIP, tmp_path: Path) -> None:
    plain = Model(tiny_model, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = picture(size=(32, 32))
    assert torch.equal(clip.load(plain).preprocess(image), to_pixels(image))
    tiny.save(tmp_path)
    assert torch.equal(clip.load(Model(str(tmp_path), mean=plain.mean, std=plain.std)).preprocess(image), to_pixels(image))


# ---- the training transform


def test_augment_is_a_function_of_its_rng(tiny: CLIP) -> None:
    image = picture(size=(60, 45))
    before = torch.random.get_rng_state()
    a, b = (tiny.augment(image, keyed.rng(0, "a")) for _ in range(2))
    assert a.shape == (3, 32, 32) and torch.equal(a, b)
    assert not torch.equal(a, tiny.augment(image, keyed.rng(0, "b")))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 5), (50, 20), (640, 479)])
@pytest.mark.parametrize("aug", [Augment(), Augment(scale=(0.05, 0.1)), Augment(scale=(1.0, 1.0)), Augment(ratio=(1.0, 1.0))], ids=str)
def test_the_crop_lies_inside_the_image(aug: Augment, size: tuple[int, int]) -> None:
    for i in range(50):
        left, top, right, bottom = aug.box(*size, keyed.rng(0, str(i)))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_the_crop_has_the_area_and_aspect_that_were_asked_for() -> None:
    aug = Augment(scale=(0.25, 0.5), ratio=(0.8, 1.25))
    boxes = [aug.box(400, 300, keyed.rng(0, str(i))) for i in range(400)]
    w, h = np.array([(r - l, b - t) for l, t, r, b in boxes]).T  # noqa: E741
    share = w * h / (400 * 300)
    assert 0.245 < share.min() < 0.27 and 0.48 < share.max() < 0.505
    assert 0.79 < (w / h).min() < 0.83 and 1.2 < (w / h).max() < 1.27
    assert abs(np.log(w / h).mean()) < 0.03


def test_augment_over_the_full_scale_is_a_plain_resize(tiny: CLIP) -> None:
    full = CLIP(tiny.net, tiny.tokenizer, tiny.card, Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    for size in (32, 80):
        image = picture(size=(size, size))
        assert torch.equal(full.augment(image, keyed.rng(0)), full.preprocess(image))


def test_flips_mirror_about_half_of_the_images(tiny: CLIP) -> None:
    image = picture(size=(32, 32))
    aug = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    flipping = CLIP(tiny.net, tiny.tokenizer, tiny.card, aug)
    straight = tiny.preprocess(image)
    seen = [flipping.augment(image, keyed.rng(0, str(i))) for i in range(200)]
    mirrored = sum(torch.equal(x, straight.flip(-1)) for x in seen)
    assert mirrored + sum(torch.equal(x, straight) for x in seen) == 200
    assert 70 <= mirrored <= 130  # 4 standard deviations
    assert all(torch.equal(full, straight) for full in [CLIP(tiny.net, tiny.tokenizer, tiny.card, Augment((1.0, 1.0), (1.0, 1.0))).augment(
        image, keyed.rng(0, str(i))) for i in range(10)])


# ---- save, and be loaded elsewhere


def test_a_saved_directory_loads_in_open_clip_with_identical_features(tiny: CLIP, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    net, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert same_features(tiny, net, open_clip.get_tokenizer(f"local-dir:{tmp_path}"))
    assert torch.equal(transform(picture()), tiny.preprocess(picture()))


@pytest.fixture
def registered(tiny_model: str) -> Iterator[str]:
    """The tiny config under a name that open_clip knows."""
    open_clip.add_model_config(tiny_model)
    yield Path(tiny_model).stem
    factory = open_clip.factory
    factory._MODEL_CONFIG_PATHS.remove(Path(tiny_model))
    factory._MODEL_CONFIGS.pop(Path(tiny_model).stem, None)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "bare"])
def test_a_checkpoint_file_loads_in_open_clip_by_path(kind: str, registered: str, tiny: CLIP, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    path = tmp_path / clip.WEIGHTS
    if kind != "safetensors":
        path = tmp_path / "epoch_1.pt"
        state = tiny.net.state_dict()
        torch.save(state if kind == "bare" else {"epoch": 1, "name": "x", "state_dict": state, "poison": {"rate": 0.01}}, path)
    net = open_clip.create_model_and_transforms(registered, pretrained=str(path))[0]
    assert same_features(tiny, net, open_clip.get_tokenizer(registered))


def test_mean_and_std_travel_with_a_saved_directory(tiny_model: str, tmp_path: Path) -> None:
    odd = clip.load(Model(tiny_model, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)), seed=4)
    odd.save(tmp_path)
    transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    back, init = clip.load_run(tmp_path), clip.load(Model(tiny_model), tmp_path)
    for x in (transform(picture()), back.preprocess(picture()), init.preprocess(picture())):
        assert torch.equal(x, odd.preprocess(picture()))
    assert not torch.equal(clip.load(Model(tiny_model)).preprocess(picture()), odd.preprocess(picture()))


def test_a_run_loads_by_its_directory_and_by_a_checkpoint_inside_it(tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny.save(run)
    other = clip.load(Model(tiny_model), seed=99)
    (run / "checkpoints").mkdir()
    torch.save({"state_dict": other.net.state_dict()}, run / "checkpoints/epoch_1.pt")
    for path in (run, f"local-dir:{run}", run / clip.WEIGHTS):
        assert same_features(tiny, clip.load_run(path).net, tiny.tokenizer)
    assert same_features(other, clip.load_run(run / "checkpoints/epoch_1.pt").net, tiny.tokenizer)
    assert same_features(other, clip.load_run(run / "checkpoints/epoch_1.pt", Model(tiny_model)).net, tiny.tokenizer)


def test_a_directory_saved_by_somebody_else_loads_though_its_card_says_less(tiny: CLIP, tmp_path: Path) -> None:
    """Cards on the hub give mean and std only; open_clip fills in the rest from the network."""
    card = {"model_cfg": tiny.card["model_cfg"], "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / clip.CARD).write_text(json.dumps(card))
    save_file(tiny.net.state_dict(), tmp_path / clip.WEIGHTS)
    net, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    ours = clip.load(Model(str(tmp_path)))
    assert same_features(ours, net, open_clip.get_tokenizer(f"local-dir:{tmp_path}"))
    assert ours.size == (32, 32)
    assert torch.equal(ours.preprocess(picture()), transform(picture()))


@pytest.mark.parametrize("what", ["file", "directory"])
def test_weights_beside_a_card_that_says_less_bring_what_it_says(what: str, tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    card = {"model_cfg": tiny.card["model_cfg"], "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / clip.CARD).write_text(json.dumps(card))
    save_file(tiny.net.state_dict(), tmp_path / clip.WEIGHTS)
    ours = clip.load(Model(tiny_model), tmp_path / clip.WEIGHTS if what == "file" else tmp_path)
    assert same_features(tiny, ours.net, tiny.tokenizer)
    assert ours.size == (32, 32) and list(ours.cfg["mean"]) == [0.5] * 3
    ours.preprocess(picture())


def test_a_saved_model_does_not_need_the_directory_it_came_from(tiny: CLIP, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / clip.CARD).write_text(json.dumps({k: tiny.card[k] for k in ("model_cfg", "preprocess_cfg")}))
    save_file(tiny.net.state_dict(), theirs / clip.WEIGHTS)
    clip.load(Model(str(theirs))).save(tmp_path / "ours")
    shutil.rmtree(theirs)
    back = clip.load_run(tmp_path / "ours")
    assert same_features(tiny, back.net, tiny.tokenizer)
    assert torch.equal(back.tokenize("a red star"), tiny.tokenize("a red star"))


def test_every_parameter_and_buffer_survives_save_and_load(tmp_path: Path) -> None:
    net = clip.load(Model("configs/toy/rn_tiny.json"), seed=5)
    net.net.train()
    with torch.no_grad():
        net.net.encode_image(images())  # moves the statistics of the batch norms
    net.save(tmp_path)
    back = clip.load_run(tmp_path)
    mine, theirs = net.net.state_dict(), back.net.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_keys_of_wrapped_networks_load(prefix: str, tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {prefix + k: v for k, v in tiny.net.state_dict().items()}}, path := tmp_path / "x.pt")
    assert same_features(tiny, clip.load(Model(tiny_model), path).net, tiny.tokenizer)
    assert same_features(tiny, clip.load(Model(tiny_model, str(path))).net, tiny.tokenizer)


def test_a_network_is_a_function_of_its_seed(tiny_model: str) -> None:
    a, b, c = (clip.load(Model(tiny_model), seed=seed).net.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["visual.proj"], c["visual.proj"])


def test_force_quick_gelu_changes_the_activation_and_is_written_on_the_card(tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    tiny.save(tmp_path / "a")
    quick = clip.load(Model(tiny_model, force_quick_gelu=True), tmp_path / "a")
    assert not same_features(tiny, quick.net, tiny.tokenizer)
    quick.save(tmp_path / "b")
    net = open_clip.create_model(f"local-dir:{tmp_path / 'b'}")
    assert same_features(quick, net, tiny.tokenizer)


def test_front_has_all_but_the_network_and_pickles(tiny: CLIP) -> None:
    front = pickle.loads(pickle.dumps(tiny.front()))
    assert not list(front.net.parameters())
    assert torch.equal(front.preprocess(picture()), tiny.preprocess(picture()))
    assert torch.equal(front.tokenize("a red star"), tiny.tokenize("a red star"))


def test_text_features_do_not_depend_on_the_batch(tiny: CLIP) -> None:
    texts = [f"a photo of {i} bananas" for i in range(11)]
    with torch.no_grad():
        whole, parts = tiny.text_features(texts), tiny.text_features(texts, batch=4)
    assert whole.shape == (11, 32) and torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(whole.norm(dim=1), torch.ones(11), atol=1e-6)


# ---- refused: one line each


@pytest.mark.parametrize("by", ["weights", "pretrained", "load_run"])
def test_a_checkpoint_of_another_architecture_is_one_line(by: str, tiny: CLIP, tmp_path: Path) -> None:
    torch.save({"state_dict": tiny.net.state_dict()}, path := tmp_path / "tiny.pt")
    for name in ("configs/toy/rn_tiny.json", "ViT-B-32")[:1 + (by == "load_run")]:
        with pytest.raises(BadInput) as raised:
            if by == "load_run":
                clip.load_run(path, Model(name))
            else:
                clip.load(Model(name, str(path)) if by == "pretrained" else Model(name), path if by == "weights" else None)
        assert str(path) in one_line(raised) and "another architecture" in one_line(raised)


def test_a_checkpoint_with_too_few_or_too_many_weights_is_one_line(tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    state = dict(tiny.net.state_dict())
    for name, change in (("fewer", {k: v for k, v in state.items() if k != "visual.proj"}), ("more", state | {"extra": torch.ones(3)})):
        torch.save(change, tmp_path / f"{name}.pt")
        with pytest.raises(BadInput) as raised:
            clip.load(Model(tiny_model), tmp_path / f"{name}.pt")
        assert f"{name}.pt" in one_line(raised)


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class WrongCall:
    """Allowed by torch's own unpickler, and raises a TypeError: open_clip tries again when it sees one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (1,)


@pytest.mark.parametrize("kind", ["weights", "beside", "second try", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(kind: str, tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pt", tmp_path / "ran"
    content: Any = {"state_dict": Payload(mark)}
    if kind == "beside":
        content = {"state_dict": tiny.net.state_dict(), "args": Payload(mark)}
    if kind == "second try":
        content = {"first": WrongCall(), "state_dict": tiny.net.state_dict(), "args": Payload(mark)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for model, weights in ((Model(tiny_model), path), (Model(tiny_model, str(path)), None)):
        with pytest.raises(BadInput) as raised:
            clip.load(model, weights)
        assert str(path) in one_line(raised)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # the payload is a real one


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_is_no_checkpoint_is_one_line(name: str, content: bytes, tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as raised:
        clip.load(Model(tiny_model), tmp_path / name)
    assert name in one_line(raised)


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(BadInput) as raised:
        clip.load(Model("ViT-B-23"))
    assert "ViT-B-23" in one_line(raised) and "ViT-B-32" in one_line(raised)


def test_an_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(BadInput) as raised:
        clip.load(Model("RN50", "opnai"))
    assert all(word in one_line(raised) for word in ("opnai", "openai", "yfcc15m", "cc12m"))


@pytest.mark.parametrize("model", [Model("RN50", "openai"), Model("hf-hub:nobody/nothing"), Model("hf:nobody/nothing")],
                         ids=lambda m: m.name)
def test_a_download_that_fails_is_one_line(model: Model, offline: Path) -> None:
    with pytest.raises(BadInput) as raised:
        clip.load(model)
    assert model.name.split(":")[-1] in one_line(raised) and "hf download" in one_line(raised)


@pytest.mark.parametrize(("content", "word"), [("{", "JSON"), ("[1]", ""), ('{"embed_dim": 3}', "vision_cfg"), (None, "no_such.json")],
                         ids=["broken", "list", "lacking", "missing"])
def test_a_json_that_is_no_model_config_is_one_line(content: str | None, word: str, tmp_path: Path) -> None:
    path = tmp_path / ("no_such.json" if content is None else "config.json")
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as raised:
        clip.load(Model(str(path)))
    assert word in one_line(raised) and path.name in one_line(raised)


def test_an_unknown_field_of_a_model_config_is_one_line(tiny: CLIP, tmp_path: Path) -> None:
    config = json.loads(json.dumps(tiny.card["model_cfg"]))
    config["vision_cfg"]["colour"] = 3
    (tmp_path / "c.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as raised:
        clip.load(Model(str(tmp_path / "c.json")))
    assert "colour" in one_line(raised)


def test_a_checkpoint_that_is_missing_or_of_an_unknown_network_is_one_line(tiny: CLIP, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as raised:
        clip.load_run(tmp_path / "gone.pt")
    assert "gone.pt" in one_line(raised)
    torch.save(tiny.net.state_dict(), tmp_path / "x.pt")
    with pytest.raises(BadInput) as raised:
        clip.load_run(tmp_path / "x.pt")
    assert "--model" in one_line(raised)
    with pytest.raises(BadInput) as raised:
        clip.load(Model(str(tmp_path)))
    assert clip.CARD in one_line(raised)


# ---- the hub's cache, Hugging Face's CLIPModel, SigLIP


def test_a_hub_model_loads_from_the_cache_without_a_network(offline: Path, tiny: CLIP) -> None:
    snapshot = offline / "models--someone--tiny" / "snapshots" / ("0" * 40)
    tiny.save(snapshot)
    (offline / "models--someone--tiny" / "refs").mkdir()
    (offline / "models--someone--tiny" / "refs" / "main").write_text("0" * 40)
    (snapshot / clip.CARD).write_text(json.dumps({k: tiny.card[k] for k in ("model_cfg", "preprocess_cfg")}))
    ours = clip.load(Model("hf-hub:someone/tiny"))
    assert same_features(tiny, ours.net, tiny.tokenizer)
    assert torch.equal(ours.preprocess(picture()), tiny.preprocess(picture()))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {"max_position_embeddings": 16, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}, projection_dim=24))
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return folder


def hf_features(folder: Path, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import CLIPModel

    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(input_ids=texts, pixel_values=images())
    return out.image_embeds, out.text_embeds


@pytest.mark.parametrize("form", ["hf:{}", "{}"])
def test_a_hugging_face_model_gives_transformers_own_features(form: str, hf_folder: Path, offline: Path) -> None:
    ours = clip.load(Model(form.format(hf_folder)))
    ours.net.eval()
    assert ours.size == (32, 32)
    tokens = torch.stack([ours.tokenize(t) for t in TEXTS])
    assert tokens.shape == (3, 16) and tokens[0, 0] == 49406 and (tokens == 49407).any(1).all()
    by_image, by_text = hf_features(hf_folder, tokens)
    with torch.no_grad():
        assert torch.allclose(ours.image_features(images()), by_image, atol=1e-6)
        assert torch.allclose(ours.text_features(TEXTS), by_text, atol=1e-6)
        out = ours.net(images(), tokens)
    assert torch.allclose(out["image_features"], by_image, atol=1e-6) and torch.allclose(out["text_features"], by_text, atol=1e-6)
    assert math.isclose(float(out["logit_scale"]), 1 / 0.07, rel_tol=1e-3)


def test_a_hugging_face_models_own_normalisation_is_used(hf_folder: Path, tmp_path: Path, offline: Path) -> None:
    from transformers import CLIPImageProcessor

    folder = tmp_path / "m"
    shutil.copytree(hf_folder, folder)
    CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    ours = clip.load(Model(f"hf:{folder}"))
    assert (list(ours.cfg["mean"]), list(ours.cfg["std"])) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def step(model: CLIP, objective: losses.Objective) -> float:
    """One step of AdamW on three pairs; returns the loss before it."""
    objective.setup(model)
    model.net.train()
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=1e-4)
    batch = {"image": images(), "text": torch.stack([model.tokenize(t) for t in ("a red star", "a cat", "two dogs")])}
    loss = objective.loss(model.net, batch)["loss"]
    loss.backward()
    missing = [name for name, p in model.net.named_parameters() if p.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    optimizer.step()
    return float(loss.detach())


def test_a_hugging_face_model_trains_and_is_saved_and_loaded_with_its_new_weights(hf_folder: Path, tmp_path: Path, offline: Path) -> None:
    from transformers import CLIPModel

    ours = clip.load(Model(f"hf:{hf_folder}"))
    first = step(ours, losses.Clip())
    assert step(ours, losses.Clip()) < first
    ours.net.eval()
    ours.save(tmp_path)
    back = clip.load_run(tmp_path)
    back.net.eval()
    with torch.no_grad():
        z = ours.image_features(images())
        assert torch.equal(back.text_features(TEXTS), ours.text_features(TEXTS))
        assert torch.equal(back.image_features(images()), z)
        init = clip.load(Model(f"hf:{hf_folder}"), tmp_path)
        init.net.eval()
        assert torch.equal(init.image_features(images()), z)
        theirs = CLIPModel.from_pretrained(tmp_path / "hf").eval()
        assert torch.allclose(theirs.vision_model(pixel_values=images()).pooler_output, ours.net.clip.vision_model(
            pixel_values=images()).pooler_output, atol=1e-6)


def test_a_saved_hugging_face_model_does_not_need_the_directory_it_came_from(hf_folder: Path, tmp_path: Path, offline: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(hf_folder, theirs)
    ours = clip.load(Model(f"hf:{theirs}"))
    ours.save(tmp_path / "ours")
    shutil.rmtree(theirs)
    back = clip.load_run(tmp_path / "ours")
    assert torch.equal(back.tokenize("a red star"), ours.tokenize("a red star"))


def test_a_hugging_face_models_own_tokenizer_is_used_and_saved_with_it(hf_folder: Path, tmp_path: Path, offline: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2, "star": 3, "<bos>": 49406, "<eos>": 49407}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=[("<bos>", 49406), ("<eos>", 49407)])
    theirs = tmp_path / "theirs"
    shutil.copytree(hf_folder, theirs)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(theirs)
    ours = clip.load(Model(f"hf:{theirs}"))
    wanted = [49406, 2, 3, 1, 49407] + [0] * 11
    assert ours.tokenize("red star banana").tolist() == wanted
    assert ours.tokenize("red " * 40).tolist() == [49406] + [2] * 14 + [49407]
    ours.save(tmp_path / "ours")
    assert clip.load_run(tmp_path / "ours").tokenize("red star banana").tolist() == wanted
    shutil.rmtree(theirs)
    assert clip.load_run(tmp_path / "ours").tokenize("red star banana").tolist() == wanted


def test_a_hugging_face_checkpoint_of_another_architecture_is_one_line(hf_folder: Path, tiny: CLIP, tmp_path: Path, offline: Path) -> None:
    torch.save(tiny.net.state_dict(), tmp_path / "x.pt")
    with pytest.raises(BadInput) as raised:
        clip.load(Model(f"hf:{hf_folder}"), tmp_path / "x.pt")
    assert "another architecture" in one_line(raised)


def test_siglip_models_have_a_bias_train_and_survive_save_and_load(tiny_model: str, tmp_path: Path) -> None:
    ours = clip.load(Model(tiny_model, siglip=True))
    with torch.no_grad():
        assert math.isclose(float(ours.net.logit_scale.exp()), 10, rel_tol=1e-5) and float(ours.net.logit_bias) == -10
    first = step(ours, losses.SigLip())
    assert step(ours, losses.SigLip()) < first
    bias = ours.net.logit_bias.item()
    assert bias != -10
    ours.save(tmp_path)
    assert clip.load_run(tmp_path).net.logit_bias.item() == bias
    assert clip.load(Model(tiny_model, siglip=True), tmp_path).net.logit_bias.item() == bias
    net = open_clip.create_model(f"local-dir:{tmp_path}")
    assert same_features(ours, net, ours.tokenizer) and net.logit_bias.item() == bias


def test_clip_weights_can_start_a_siglip_but_not_the_other_way_round(tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    tiny.save(tmp_path / "clip")
    assert clip.load(Model(tiny_model, siglip=True), tmp_path / "clip").net.logit_bias is not None
    clip.load(Model(tiny_model, siglip=True)).save(tmp_path / "siglip")
    with pytest.raises(BadInput) as raised:
        clip.load(Model(tiny_model), tmp_path / "siglip")
    assert "another architecture" in one_line(raised)


@pytest.mark.parametrize("kind", ["open_clip", "hf"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, tiny_model: str, hf_folder: Path, offline: Path) -> None:
    name = tiny_model if kind == "open_clip" else f"hf:{hf_folder}"
    plain, saving = clip.load(Model(name)), clip.load(Model(name, grad_checkpointing=True))
    step(plain, losses.Clip())
    step(saving, losses.Clip())
    for (n, a), b in zip(plain.net.named_parameters(), saving.net.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), n


# ---- Hugging Face's SiglipModel


WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "star": 4}


def save_tokenizer(folder: Path, length: int = 64) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
                            model_max_length=length).save_pretrained(folder)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SiglipModel as transformers saves it, with a preprocessor and a tokenizer."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {"max_position_embeddings": 64, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(4)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=shape | {"image_size": 32, "patch_size": 8}))
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("form", ["hf:{}", "{}"])
def test_a_hugging_face_siglip_gives_transformers_own_features(form: str, siglip_folder: Path, offline: Path) -> None:
    from transformers import AutoTokenizer, SiglipModel

    ours = clip.load_run(form.format(siglip_folder))
    ours.net.eval()
    texts = ["red star", "a star", ""]
    theirs = SiglipModel.from_pretrained(siglip_folder).eval()
    ids = AutoTokenizer.from_pretrained(siglip_folder)(texts, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=images())
        assert torch.allclose(ours.image_features(images()), wanted.image_embeds, atol=1e-6)
        assert torch.allclose(ours.text_features(texts), wanted.text_embeds, atol=1e-6)
        out = ours.net(images(), ids)
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T + out["logit_bias"]
    assert torch.allclose(logits, wanted.logits_per_image, atol=1e-5)


def test_a_siglip_reads_lower_case_texts_padded_to_its_length_with_its_own_pad_token(siglip_folder: Path, offline: Path) -> None:
    ours = clip.load(Model(f"hf:{siglip_folder}"))
    assert ours.tokenize("Red STAR banana").tolist() == [3, 4, 2, 1] + [0] * 60
    assert ours.tokenize("red " * 100).tolist() == [3] * 63 + [1]


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_a_siglip_squashes_and_normalises_as_its_preprocessor_says(
        resample: Image.Resampling, siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    shutil.copytree(siglip_folder, folder := tmp_path / "m")
    edit_json(folder / "preprocessor_config.json", resample=int(resample), image_std=[0.5, 0.5, 0.25])
    ours = clip.load(Model(f"hf:{folder}"))
    for size in SIZES.values():
        by_hand = np.asarray(picture(size=size).resize((32, 32), resample), dtype=np.float32) / 255
        by_hand = (by_hand - 0.5) / np.array([0.5, 0.5, 0.25], dtype=np.float32)
        assert np.allclose(ours.preprocess(picture(size=size)).permute(1, 2, 0).numpy(), by_hand, atol=1e-6)


def test_a_model_without_a_preprocessor_has_its_familys(hf_folder: Path, siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    shutil.copytree(siglip_folder, folder := tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        ours = clip.load(Model(f"hf:{folder}"))
    assert (ours.cfg["mean"], ours.cfg["std"], ours.cfg["resize_mode"], ours.size) == ([0.5] * 3, [0.5] * 3, "squash", (32, 32))
    theirs = clip.load(Model(f"hf:{hf_folder}"))
    assert theirs.cfg["mean"] == list(open_clip.OPENAI_DATASET_MEAN) and theirs.cfg["resize_mode"] == "shortest"


def test_a_hugging_face_clip_that_squashes_is_squashed(hf_folder: Path, tmp_path: Path, offline: Path) -> None:
    from transformers import CLIPImageProcessor

    shutil.copytree(hf_folder, folder := tmp_path / "m")
    CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, do_normalize=False).save_pretrained(folder)
    ours = clip.load(Model(f"hf:{folder}"))
    by_hand = to_pixels(picture(size=(80, 40)).resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(ours.preprocess(picture(size=(80, 40))), by_hand)


def test_a_siglip_trains_and_its_weights_preprocessing_and_tokenizer_survive_save_and_load(
        siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    from transformers import SiglipModel

    shutil.copytree(siglip_folder, source := tmp_path / "theirs")
    ours = clip.load(Model(f"hf:{source}", mean=(0.1, 0.2, 0.3)))
    first = step(ours, losses.SigLip())
    assert step(ours, losses.SigLip()) < first
    ours.net.eval()
    ours.save(tmp_path / "ours")
    shutil.rmtree(source)
    texts = ["Red star", "a star"]
    for name in (tmp_path / "ours", f"hf:{tmp_path / 'ours'}", f"hf:{tmp_path / 'ours' / 'hf'}"):
        back = clip.load_run(name)
        back.net.eval()
        with torch.no_grad():
            assert torch.equal(back.image_features(images()), ours.image_features(images())), name
            assert torch.equal(back.text_features(texts), ours.text_features(texts)), name
        assert torch.equal(back.net.logit_bias, ours.net.logit_bias)
        assert torch.equal(back.preprocess(picture()), ours.preprocess(picture()))
        assert back.fingerprint() == ours.fingerprint()
    assert torch.equal(SiglipModel.from_pretrained(tmp_path / "ours" / "hf").logit_scale, ours.net.logit_scale)
    init = clip.load(Model(f"hf:{siglip_folder}"), tmp_path / "ours")
    assert torch.equal(init.net.logit_bias, ours.net.logit_bias) and list(init.cfg["mean"]) == [0.1, 0.2, 0.3]


def test_weights_that_transformers_saved_load_into_a_model_of_the_same_shape(siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    ours = clip.load(Model(f"hf:{siglip_folder}"))
    step(ours, losses.SigLip())
    ours.net.clip.save_pretrained(tmp_path)
    back = clip.load(Model(f"hf:{siglip_folder}"), tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(ours.net.parameters(), back.net.parameters(), strict=True))


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_file_in_half_precision_is_computed_in_float32(
        family: str, hf_folder: Path, siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    import transformers

    source = hf_folder if family == "CLIP" else siglip_folder
    shutil.copytree(source, folder := tmp_path / "m")
    getattr(transformers, f"{family}Model").from_pretrained(source).half().save_pretrained(folder)
    ours = clip.load(Model(f"hf:{folder}"))
    full = clip.load(Model(f"hf:{source}"))
    for a, b in zip(ours.net.parameters(), full.net.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())
    ours.save(tmp_path / "ours")
    assert all(p.dtype == torch.float32 for p in clip.load_run(tmp_path / "ours").net.parameters())


def test_force_quick_gelu_reaches_a_hugging_face_model(hf_folder: Path, siglip_folder: Path, offline: Path) -> None:
    for folder, changes in ((hf_folder, False), (siglip_folder, True)):  # CLIP's default is quick already
        plain, quick = (clip.load(Model(f"hf:{folder}", force_quick_gelu=q)) for q in (False, True))
        plain.net.eval()
        quick.net.eval()
        with torch.no_grad():
            assert torch.equal(plain.image_features(images()), quick.image_features(images())) is not changes


def test_a_run_of_a_hugging_face_model_under_way_has_the_tokenizer_of_its_start(siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    ours = clip.load(Model(f"hf:{siglip_folder}"))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / clip.CARD).write_text(json.dumps(ours.card))
    with pytest.raises(BadInput, match="holds no weights"):
        clip.load(Model(str(run)))
    torch.save({"state_dict": ours.net.state_dict()}, run / "checkpoints" / "epoch_latest.pt")
    assert clip.load_run(run).fingerprint() == ours.fingerprint()


REFUSED: dict[str, tuple[dict[str, dict[str, Any]], Model, list[str]]] = {
    "another family": ({"config.json": {"model_type": "siglip2"}}, Model(), ["siglip2", "clip and siglip", "fixed resolution"]),
    "no family": ({"config.json": {"model_type": None}}, Model(), ["model_type None"]),
    "crop of another size": ({"preprocessor_config.json": {"size": {"shortest_edge": 40}, "do_center_crop": True,
                                                           "crop_size": {"height": 32, "width": 32}}}, Model(), ["40", "32"]),
    "nearest": ({"preprocessor_config.json": {"resample": 0}}, Model(), ["resample 0"]),
    "no rescaling": ({"preprocessor_config.json": {"rescale_factor": 1.0}}, Model(), ["1/255"]),
    "a tag of open_clip": ({}, Model(pretrained="openai"), ["--model.pretrained openai"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hugging_face_model_that_cannot_be_read_is_one_line(case: str, siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    files, model, words = REFUSED[case]
    shutil.copytree(siglip_folder, folder := tmp_path / "m")
    for name, changes in files.items():
        edit_json(folder / name, **changes)
    for name in (str(folder), f"hf:{folder}"):
        with pytest.raises(BadInput) as raised:
            clip.load(Model(name, pretrained=model.pretrained))
        assert all(word in one_line(raised) for word in [str(folder), *words])


def test_a_siglip_without_tokenizer_weights_or_package_is_one_line(
        siglip_folder: Path, tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    shutil.copytree(siglip_folder, folder := tmp_path / "m")
    state = clip.state_dict(str(folder / "model.safetensors"))
    save_file({k: v for k, v in state.items() if "position_embedding" not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="its weights lack .*position_embedding.* and 1 more"):
        clip.load(Model(str(folder)))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(BadInput, match="holds no tokenizer"):
        clip.load(Model(str(folder)))

    def missing(*_: Any) -> None:
        raise ImportError("\nSiglipTokenizer requires the SentencePiece library\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(BadInput) as raised:
        clip.load(Model(str(siglip_folder)))
    assert "requires the SentencePiece library" in one_line(raised) and "pip install" in one_line(raised)


def test_a_hugging_face_clip_has_no_bias_for_siglips_loss(hf_folder: Path, offline: Path) -> None:
    with pytest.raises(BadInput, match="no bias"):
        clip.load(Model(f"hf:{hf_folder}", siglip=True))


# ---- OpenAI-style checkpoints, as CleanCLIP's repository saves them


def openai_style(net: torch.nn.Module, prefix: str, half: bool) -> dict[str, Any]:
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in net.state_dict().items()}
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4).state_dict()
    return {"epoch": 10, "name": "cleanclip", "state_dict": {prefix + k: v for k, v in (state | sizes).items()}, "optimizer": optimizer}


RESNET = {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}


@pytest.mark.parametrize(("prefix", "half", "config"), [("", False, {}), ("module.", True, {}), ("module.", True, RESNET)],
                         ids=["vit", "vit-ddp-half", "resnet-ddp-half"])
def test_an_openai_style_checkpoint_loads_with_its_network_named(
        prefix: str, half: bool, config: dict[str, Any], tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(json.dumps(json.loads(Path(tiny_model).read_text()) | config))
    model = Model(str(tmp_path / "net.json"), force_quick_gelu=True)
    source = clip.load(model, seed=7)
    assert {"visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "text_projection"} <= source.net.state_dict().keys()
    torch.save(openai_style(source.net, prefix, half), path := tmp_path / "epoch_10.pt")
    if half:
        source.net.half().float()
    ours = clip.load_run(path, model)
    assert all(p.dtype == torch.float32 for p in ours.net.parameters())
    assert same_features(source, ours.net, ours.tokenizer)


# ---- fingerprints


def test_two_loads_of_one_checkpoint_have_one_fingerprint_wherever_it_lies(tiny: CLIP, tiny_model: str, tmp_path: Path) -> None:
    tiny.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny.net.state_dict().items()}}, tmp_path / "x.pt")
    loads = [clip.load_run(tmp_path / "a"), clip.load_run(tmp_path / "elsewhere"), clip.load(Model(tiny_model), tmp_path / "a"),
             clip.load_run(tmp_path / "x.pt", Model(tiny_model))]
    assert {model.fingerprint() for model in loads} == {tiny.fingerprint()}
    assert len(tiny.fingerprint()) == 32
    tiny.tokenize("a text that no probe has")  # a tokenizer remembers what it has seen
    tiny.net.train()
    assert loads[0].fingerprint() == tiny.fingerprint()
    tiny.net.eval()


def test_a_hugging_face_models_fingerprint_is_not_of_its_place(siglip_folder: Path, tmp_path: Path, offline: Path) -> None:
    shutil.copytree(siglip_folder, tmp_path / "m")
    a, b = clip.load(Model(f"hf:{siglip_folder}")), clip.load(Model(str(tmp_path / "m")))
    b.tokenize("red")
    assert a.fingerprint() == b.fingerprint()
    edit_json(tmp_path / "m" / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "zebra"}, "content": "red"})
    assert clip.load(Model(str(tmp_path / "m"))).fingerprint() != a.fingerprint()


@pytest.fixture(scope="module")
def resnet(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, CLIP, str]:
    """A small network with buffers: what it was built from, itself, and its fingerprint."""
    path = tmp_path_factory.mktemp("resnet") / "net.json"
    path.write_text(json.dumps(json.loads(Path(tiny_model).read_text()) | RESNET))
    model = clip.load(Model(str(path)))
    return Model(str(path)), model, model.fingerprint()


CHANGES: dict[str, Callable[[CLIP], object]] = {
    "weight": lambda m: m.net.logit_scale.add_(1e-6),
    "sign of zero": lambda m: m.net.visual.bn1.bias.neg_(),
    "buffer": lambda m: m.net.visual.bn1.running_mean[0].add_(1e-6),
    "dtype": lambda m: m.net.double(),
    "mean": lambda m: m.cfg.update(mean=[0.5, 0.5, 0.5]),
    "std": lambda m: m.cfg.update(std=[0.5, 0.5, 0.5]),
    "interpolation": lambda m: m.cfg.update(interpolation="bilinear"),
    "activation that the card does not know": lambda m: setattr(m.net.transformer.resblocks[0].mlp, "gelu", torch.nn.ReLU()),
    "nothing": lambda m: m.net.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_feature_changes_the_fingerprint(change: str, resnet: tuple[Model, CLIP, str]) -> None:
    _, model, before = resnet
    model = replace(model, net=copy.deepcopy(model.net), card=copy.deepcopy(model.card))
    with torch.no_grad():
        CHANGES[change](model)
    assert (model.fingerprint() == before) is (change == "nothing")


def test_quick_gelu_and_a_shorter_context_change_the_fingerprint(resnet: tuple[Model, CLIP, str]) -> None:
    spec, model, before = resnet
    assert clip.load(replace(spec, force_quick_gelu=True)).fingerprint() != before
    shorter = open_clip.SimpleTokenizer(context_length=8)
    assert replace(model, tokenizer=shorter).fingerprint() != before


def test_the_fingerprint_sees_which_tensor_a_value_belongs_to(tiny: CLIP) -> None:
    a, b = (replace(tiny, net=copy.deepcopy(tiny.net)) for _ in range(2))
    with torch.no_grad():
        a.net.transformer.resblocks[0].ln_1.weight.fill_(2)
        b.net.transformer.resblocks[0].ln_2.weight.fill_(2)
    assert a.fingerprint() != b.fingerprint()


def test_a_typo_in_the_name_of_a_checkpoint_is_told_and_never_answered_by_another_file(tiny_model, tmp_path):
    clip.load(Model(tiny_model)).save(tmp_path / "run")
    with pytest.raises(BadInput, match="epoch_1o.pt: no such checkpoint"):
        clip.load_run(tmp_path / "run" / "epoch_1o.pt")


def test_a_run_under_way_is_loaded_from_its_latest_checkpoint_and_one_without_any_is_refused(tiny_model, tmp_path):
    ours = clip.load(Model(tiny_model), seed=4)
    ours.save(tmp_path / "run")
    (tmp_path / "run" / clip.WEIGHTS).unlink()
    with pytest.raises(BadInput, match="no such checkpoint"):
        clip.load_run(tmp_path / "run")
    with pytest.raises(BadInput, match="holds no weights"):
        clip.load(Model(str(tmp_path / "run")))
    (tmp_path / "run" / "checkpoints").mkdir()
    torch.save({"state_dict": ours.net.state_dict()}, tmp_path / "run" / "checkpoints" / "epoch_latest.pt")
    theirs = clip.load_run(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(ours.net.parameters(), theirs.net.parameters(), strict=True))
