"""CLIP models behind one face: open_clip by name, JSON, checkpoint or directory, and Hugging Face's CLIP and SigLIP.

Preprocessing travels with the model: a saved directory holds mean, std, size and interpolation, and loads back with
them. Most "the attack success rate is 0" reports in this field are a normalisation mismatch.
"""
from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from . import prompts
from .huggingface import CARD, RESAMPLING, HuggingFace, build_hf, hf_card, hub_errors, is_hf, is_saved_hf, save_hf
from .keyed import drawing_from, rng
from .stores import read_json, replacing, write_json
from .types import BadInput, to_pixels

WEIGHTS = "open_clip_model.safetensors"
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's checkpoints keep among the weights."""


@dataclass(frozen=True)
class Augment:
    """The training transform: a random crop of `scale` of the area and `ratio` of aspect, resized; maybe mirrored.

    The defaults are open_clip's.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False

    def box(self, w: int, h: int, rng: Generator) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the crop, drawn as torchvision's RandomResizedCrop draws it."""
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for u, v in torch.rand(10, 2, generator=rng).tolist():
            area = w * h * (self.scale[0] + u * (self.scale[1] - self.scale[0]))
            aspect = math.exp(log_ratio[0] + v * (log_ratio[1] - log_ratio[0]))
            cw, ch = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < cw <= w and 0 < ch <= h:
                left = int(torch.randint(w - cw + 1, (), generator=rng))
                top = int(torch.randint(h - ch + 1, (), generator=rng))
                return left, top, left + cw, top + ch
        cw, ch = min(w, round(h * self.ratio[1])), min(h, round(w / self.ratio[0]))
        return (w - cw) // 2, (h - ch) // 2, (w + cw) // 2, (h + ch) // 2


@dataclass(frozen=True)
class Model:
    """Which network, and where its weights come from.

    `name`: an open_clip name (RN50, ViT-B-32), a JSON model config, a directory with open_clip_config.json (a run of
    ours, `local-dir:…`), `hf-hub:org/name`, or a directory or hub name of a Hugging Face CLIPModel or SiglipModel as
    `hf:…`. `pretrained`: a tag that open_clip knows (openai, laion2b_s34b_b79k) or a checkpoint file.
    """

    name: str = "RN50"
    pretrained: str = ""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    force_quick_gelu: bool = False
    siglip: bool = False
    grad_checkpointing: bool = False


@lru_cache(maxsize=65_536)
def tokens(tokenizer: Callable[[list[str]], Tensor], text: str) -> Tensor:
    return tokenizer([text])[0]


@dataclass(frozen=True, eq=False)
class CLIP:
    """A network with its preprocessing and tokenizer.

    net(image, text) -> {"image_features", "text_features", "logit_scale"}, the features of unit norm; a SigLIP adds
    "logit_bias", which stays as it is unless an objective sets out to train it: few have a use for it, and what is free and not
    used ends a run on several processes.
    """

    net: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    card: dict[str, Any]
    """What is needed to build the network again: model_cfg, preprocess_cfg, tokenizer; JSON."""
    aug: Augment = field(default_factory=Augment)

    @property
    def cfg(self) -> dict[str, Any]:
        return self.card["preprocess_cfg"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        size = self.cfg["size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def width(self) -> int:
        """Of a row of features."""
        return self.text_features(["a"]).shape[1]

    def front(self) -> CLIP:
        """The same without the network: what a loader worker needs."""
        return replace(self, net=nn.Identity())

    def geometry(self, image: Image.Image) -> Image.Image:
        """Resize and crop, as evaluation does: PIL -> PIL RGB of the input size."""
        return geometry(json.dumps(self.cfg, sort_keys=True))(image)

    def normalise(self, x: Tensor) -> Tensor:
        """(..., 3, H, W) in [0, 1] -> what the network takes."""
        mean, std = (x.new_tensor(self.cfg[k])[:, None, None] for k in ("mean", "std"))
        return (x - mean) / std

    def preprocess(self, image: Image.Image) -> Tensor:
        """The evaluation transform: PIL -> (3, H, W), equal to open_clip's."""
        return self.to_input(self.geometry(image))

    def crop(self, image: Image.Image, rng: Generator, scale: tuple[float, float] | None = None) -> Image.Image:
        """The training transform up to tensors: PIL -> PIL of the input size. `scale` takes the place of the transform's own."""
        aug = self.aug if scale is None else replace(self.aug, scale=scale)
        h, w = self.size
        resample = RESAMPLING.get(self.cfg["interpolation"], Image.Resampling.BICUBIC)
        image = image.resize((w, h), resample, box=aug.box(*image.size, rng))
        if aug.flip and torch.rand((), generator=rng) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def to_input(self, image: Image.Image) -> Tensor:
        """PIL of the input size -> (3, H, W), normalised."""
        return self.normalise(to_pixels(image))

    def augment(self, image: Image.Image, rng: Generator) -> Tensor:
        """The training transform: PIL -> (3, H, W). All randomness comes from `rng`."""
        return self.to_input(self.crop(image, rng))

    def tokenize(self, text: str) -> Tensor:
        """(context length,) int64."""
        return tokens(self.tokenizer, text)

    def image_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised -> (B, D) of unit norm."""
        return self.net.encode_image(x, normalize=True)  # type: ignore[operator]

    def text_features(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(N, D) of unit norm."""
        rows = [torch.stack([self.tokenize(t) for t in texts[i : i + batch]]).to(self.device) for i in range(0, len(texts), batch)]
        return torch.cat([self.net.encode_text(r, normalize=True) for r in rows])  # type: ignore[operator]

    @torch.no_grad()
    def class_features(self, names: Sequence[str], batch: int = 256) -> Tensor | None:
        """(C, D) of unit norm, of classes whose prompts were learned; None where one was not."""
        learned = getattr(self.net, "class_prompts", None)
        if learned is None or not set(names) <= set(learned.names):
            return None
        rows = []
        for i in range(0, len(learned.names), batch):
            with learned.said(slice(i, i + batch)) as tokens:
                rows.append(self.net.encode_text(tokens, normalize=True))  # type: ignore[operator]
        return torch.cat(rows)[[learned.names.index(name) for name in names]]

    def save(self, folder: str | Path) -> None:
        """A directory that `open_clip.create_model_and_transforms("local-dir:…")` and `load` read."""
        folder = Path(folder)
        write_json(folder / CARD, self.card)
        state = {k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}
        with replacing(folder / WEIGHTS) as temporary:
            save_file(state, temporary)
        if isinstance(self.net, HuggingFace):
            save_hf(self.net, self.tokenizer, self.cfg, folder)

    def renewed(self, seed: int) -> dict[str, Tensor]:
        """Weights of the same network before any training."""
        with drawing_from(rng(seed, "weights")):
            if isinstance(self.net, HuggingFace):
                return HuggingFace(type(self.net.clip)(self.net.clip.config)).state_dict()
            return build(Model(), self.card, load_text_tower=False).net.state_dict()

    def fingerprint(self) -> str:
        """Hash of all of the model that decides its features: every tensor, the structure, preprocessing, the tokenizer.

        Where it was loaded from and the device do not enter. One thread a core, each about a gigabyte a second.
        """
        def hashed(named: tuple[str, Tensor]) -> str:
            name, x = named
            values = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return f"{name} {x.dtype} {tuple(x.shape)} {hashlib.sha256(values.data).hexdigest()}"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            weights = list(pool.map(hashed, sorted(self.net.state_dict().items())))
        card = {k: v for k, v in self.card.items() if k not in ("source", "tokenizer")}  # names of places; the contents follow
        structure = re.sub(r" at 0x[0-9a-f]+", "", repr(self.net))
        told = json.dumps([weights, card, structure, contents(self.tokenizer)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:32]


@lru_cache(maxsize=8)
def geometry(preprocess_cfg: str) -> Callable[[Image.Image], Image.Image]:
    """The part of open_clip's evaluation transform that comes before tensors."""
    steps = image_transform_v2(PreprocessCfg(**json.loads(preprocess_cfg)), is_train=False).transforms
    cut = next(i for i, step in enumerate(steps) if type(step).__name__.endswith("ToTensor"))

    def apply(image: Image.Image) -> Image.Image:
        for step in steps[:cut]:
            image = step(image)
        return image

    return apply


def load(model: Model, weights: str | Path | None = None, aug: Augment | None = None, seed: int = 0) -> CLIP:
    """Builds the network, on the CPU in float32, and loads its weights.

    `weights` (a run's directory or a checkpoint file) replaces those of `model`, and brings its preprocessing and prompts along.
    Raises BadInput for an unknown name or tag, and for weights of another architecture.
    """
    source = find(weights) if weights is not None else None
    torch.manual_seed(seed)
    card, file = card_of(model)
    if source is not None:
        file, theirs = source
        card["preprocess_cfg"] |= theirs.get("preprocess_cfg", {})
        card |= {"prompts": theirs["prompts"]} if "prompts" in theirs else {}
    for name in ("mean", "std"):
        if getattr(model, name) is not None:
            card["preprocess_cfg"][name] = list(getattr(model, name))
    if not file and (Path(model.name.removeprefix("local-dir:").removeprefix("hf:")) / CARD).is_file():
        raise BadInput(f"{model.name}: holds no weights, only {CARD}; name its JSON to train from scratch")
    clip = build(model, card, load_text_tower=not file)
    if file:
        load_weights(clip.net, file)
    if model.grad_checkpointing:
        clip.net.set_grad_checkpointing(True)  # type: ignore[operator]
    return replace(clip, aug=aug or Augment())


def load_run(path: str | Path, model: Model | None = None, usual: Model | None = None, **changes: Any) -> CLIP:
    """A run's directory, a checkpoint inside one, or any checkpoint file together with its `model`, with fields of it changed. `usual` is
    the network of a file of which nothing says what it is."""
    path = str(path).removeprefix("local-dir:")
    found = Path(path)
    folder = next((p for p in (found, *found.parents[:2]) if (p / CARD).is_file()), None)
    if model is None and folder is not None:
        return load(replace(Model(str(folder)), **changes), found)
    if model is None and (is_hf(path) or path.startswith("hf-hub:")):
        return load(replace(Model(path), **changes))
    if model is None and usual is not None:
        return load(usual, path)
    if model is None:
        find(path)
        raise BadInput(f"{path}: no {CARD} near it says which network this is; add --model.name RN50, say")
    return load(replace(model, **changes), path)


def find(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The weights file that a run's directory or a path names, and the card beside it, {} where there is none."""
    path = Path(str(path).removeprefix("local-dir:"))
    file = str(path) if path.is_file() else weights_in(path)
    if file is None:
        raise BadInput(f"{path}: no such checkpoint; name a run's directory that holds {WEIGHTS}, or a .pt or .safetensors file")
    folder = path if path.is_dir() else path.parent
    card = next((p / CARD for p in (folder, folder.parent) if (p / CARD).is_file()), None)
    return file, read_json(card) if card else {}


def weights_in(folder: str | Path) -> str | None:
    """The weights of a directory: of a finished run, of another's release, or of a run under way."""
    folder = Path(folder)
    found = [folder / WEIGHTS, *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin")), folder / "checkpoints/epoch_latest.pt"]
    return next((str(p) for p in found if p.is_file()), None)


def card_of(model: Model) -> tuple[dict[str, Any], str | None]:
    """Config, preprocessing and weights file of an open_clip name, JSON file or directory, or of a Hugging Face model."""
    if is_hf(model.name):
        card = hf_card(model.name, model.pretrained, model.siglip, model.force_quick_gelu)
        source = model.name.removeprefix("hf:")
        return card, weights_in(source) if is_saved_hf(source) else None
    name = model.name.removeprefix("local-dir:")
    preprocess, file = asdict(PreprocessCfg()), None
    given: dict[str, Any] = {}
    learned: dict[str, Any] = {}
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, CARD)):
            raise BadInput(f"{name}: holds no {CARD}; name a directory that open_clip or this suite has saved")
        card = read_json(os.path.join(name, CARD))
        given, learned = card.get("preprocess_cfg", {}), {"prompts": card["prompts"]} if "prompts" in card else {}
        cfg, preprocess = card.get("model_cfg", card), preprocess | given
        file = weights_in(name)
        tokenizer = card.get("tokenizer", "" if "hf_tokenizer_name" not in cfg.get("text_cfg", {}) else f"local-dir:{name}")
    elif name.endswith(".json"):
        card = read_json(name)
        given = card.get("preprocess_cfg", {})
        cfg, preprocess, tokenizer = card.get("model_cfg", card), preprocess | given, ""
    elif name.startswith("hf-hub:"):
        with hub_errors(name):
            net = open_clip.create_model(name, device="cpu")
            cfg, preprocess, tokenizer = open_clip.get_model_config(name), net.visual.preprocess_cfg, name
            file = open_clip.pretrained.download_pretrained_from_hf(name.removeprefix("hf-hub:"))
    else:
        cfg, tokenizer = open_clip.get_model_config(name), name
        if cfg is None:
            near = ", ".join(nearest(name, open_clip.list_models()))
            mend = f"did you mean {near}?" if near else "open_clip.list_models() names them all"
            raise BadInput(f"model {name}: open_clip knows no such name and no such file or directory exists; {mend}")
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(cfg):
        raise BadInput(f"{name}: a model config needs embed_dim, vision_cfg and text_cfg")
    cfg = json.loads(json.dumps(cfg))
    if model.pretrained:
        file = tag_file(name, model.pretrained, cfg, preprocess)
    if model.force_quick_gelu:
        cfg["quick_gelu"] = True
    if model.siglip:
        cfg |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    image_size = cfg["vision_cfg"].get("image_size", 224)
    preprocess |= {} if "size" in given else {"size": image_size}
    return {"model_cfg": cfg, "preprocess_cfg": preprocess, "tokenizer": tokenizer} | learned, file


def tag_file(name: str, pretrained: str, cfg: dict[str, Any], preprocess: dict[str, Any]) -> str:
    """The file of a tag or path; a tag also sets its preprocessing and activation."""
    if os.path.isfile(pretrained):
        preprocess |= find(pretrained)[1].get("preprocess_cfg", {})
        return pretrained
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise BadInput(f"pretrained {pretrained}: neither a file nor a tag of {name} (its tags: {tags})")
    preprocess |= {k: v for k, v in tag.items() if k in preprocess and v is not None}
    if tag.get("quick_gelu"):
        cfg["quick_gelu"] = True
    with hub_errors(f"{name}/{pretrained}"):
        return open_clip.download_pretrained(tag)


def build(model: Model, card: dict[str, Any], load_text_tower: bool) -> CLIP:
    net, tokenizer = build_hf(model.name, card) if "hf" in card else build_open_clip(model, card, load_text_tower)
    prompts.attach(net, tokenizer, card)
    if (bias := getattr(net, "logit_bias", None)) is not None:
        bias.requires_grad_(False)
    return CLIP(net, tokenizer, card)


def build_open_clip(model: Model, card: dict[str, Any], load_text_tower: bool) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_json(Path(folder) / CARD, card)
        try:
            net = open_clip.create_model(f"local-dir:{folder}", load_weights=False, output_dict=True,
                                         pretrained_text=load_text_tower)
            tokenizer = open_clip.get_tokenizer(card["tokenizer"] or f"local-dir:{folder}")
        except OSError as error:
            raise BadInput(f"{card['tokenizer'] or model.name}: its tokenizer cannot be had; download it where there is a network "
                           "(hf download …) and give the local path") from error
        except (TypeError, KeyError, AssertionError) as error:
            raise BadInput(f"{model.name}: open_clip cannot build this config ({error}); compare with one of its own") from error
    return net, tokenizer


def load_weights(net: nn.Module, file: str) -> None:
    """Ours, open_clip's and OpenAI-style checkpoints (`module.`, `_orig_mod.`), of just this architecture."""
    try:
        if file.endswith(".npz"):
            open_clip.load_checkpoint(net, file)
            return
        state = {k.replace("_orig_mod.", ""): v for k, v in state_dict(file).items()}
        if isinstance(net, HuggingFace):
            state = {k if k.startswith("clip.") else f"clip.{k}": v for k, v in state.items() if not k.endswith("position_ids")}
            net.load_state_dict(state)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, path := os.path.join(folder, "state.pt"))
            open_clip.load_checkpoint(net, path)
    except (RuntimeError, AssertionError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = lines[1] if len(lines) > 1 and "Error(s) in loading" in lines[0] else lines[0]
        raise BadInput(f"{file}: a checkpoint of another architecture than {type(net).__name__} as configured "
                       f"({what[:160]}); set --model.name to the network it was trained as") from error


def state_dict(file: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file. Nothing in it is unpickled but tensors and plain values."""
    try:
        state = open_clip.factory.load_state_dict(file)
        return {k: v for k, v in state.items() if k not in OPENAI_SIZES}
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise BadInput(f"{file}: not a checkpoint of tensors and plain values ({reason}); save a state_dict") from error


@lru_cache(maxsize=8)
def contents(tokenizer: Callable[[list[str]], Tensor]) -> str:
    """Hash of what decides a tokenizer's ids: its rules and vocabulary, and what it makes of texts that show its cleaning and length."""
    inner: Any = getattr(tokenizer, "tokenizer", tokenizer)
    rules = json.loads(inner.backend_tokenizer.to_str()) if hasattr(inner, "backend_tokenizer") else {}
    rules = {k: v for k, v in rules.items() if k not in ("padding", "truncation")}  # set anew by every call
    words = inner.get_vocab() if hasattr(inner, "get_vocab") else getattr(inner, "encoder", None)
    probes = ["", "A  Photo of 2 dogs, the man's &amp; café 北京 🍕!", "red " * 400]
    return hashlib.sha256(json.dumps([rules, words, tokenizer(probes).tolist()], sort_keys=True).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns that a network we give weights afterwards has none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def nearest(name: str, names: Sequence[str]) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, names, 3)
