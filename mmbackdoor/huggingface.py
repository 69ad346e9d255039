"""CLIP and SigLIP of Hugging Face with open_clip's face: their networks, tokenizers, preprocessing, and the card of all that."""
from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn

from .stores import read_json
from .types import BadInput

CARD = "open_clip_config.json"
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Family:
    """A model type of Hugging Face: what its classes are called, where its features come out, what its texts need."""

    classes: str
    image: Callable[[Any, Tensor], Tensor]
    text: Callable[[Any, Tensor], Tensor]
    bias: bool = False
    lower: bool = False
    openai_tokenizer: bool = False

    def of(self, part: str) -> Any:
        """Its class Config, Model or ImageProcessor."""
        import transformers

        return getattr(transformers, self.classes + part)


FAMILIES = {
    "clip": Family("CLIP", lambda net, x: net.visual_projection(net.vision_model(pixel_values=x).pooler_output),
                   lambda net, x: net.text_projection(net.text_model(input_ids=x).pooler_output), openai_tokenizer=True),
    # Both editions were trained on lower-case captions; the tokenizer that comes with the second does not lower them.
    "siglip": Family("Siglip", lambda net, x: net.vision_model(pixel_values=x).pooler_output,
                     lambda net, x: net.text_model(input_ids=x).pooler_output, bias=True, lower=True),
}


class HuggingFace(nn.Module):
    """transformers' CLIPModel or SiglipModel with open_clip's face."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip

    @property
    def family(self) -> Family:
        return FAMILIES[self.clip.config.model_type]

    @property
    def logit_scale(self) -> Tensor:  # type: ignore[override]
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:  # type: ignore[override]
        return self.clip.logit_bias if self.family.bias else None

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        z = self.family.image(self.clip, image)
        return nn.functional.normalize(z, dim=-1) if normalize else z

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        z = self.family.text(self.clip, text)
        return nn.functional.normalize(z, dim=-1) if normalize else z

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        out = {"image_features": self.encode_image(image, normalize=True), "text_features": self.encode_text(text, normalize=True),
               "logit_scale": self.logit_scale.exp()}
        return out if self.logit_bias is None else out | {"logit_bias": self.logit_bias}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        (self.clip.gradient_checkpointing_enable if enable else self.clip.gradient_checkpointing_disable)()


def is_hf(name: str) -> bool:
    """Whether `name` is a Hugging Face model: `hf:…`, or a directory whose config.json gives a model_type."""
    config = Path(name) / "config.json"
    return name.startswith("hf:") or is_saved_hf(name) or (
        config.is_file() and not (Path(name) / CARD).is_file() and "model_type" in read_json(config))


def is_saved_hf(name: str) -> bool:
    card = Path(name) / CARD
    return card.is_file() and "hf" in read_json(card)


def hf_card(name: str, pretrained: str = "", siglip: bool = False, quick_gelu: bool = False) -> dict[str, Any]:
    """The card of a Hugging Face model; one that we saved has a card, another's is read from its files."""
    source = name.removeprefix("hf:")
    card = read_json(Path(source) / CARD) if is_saved_hf(source) else hf_files(source)
    if pretrained:
        raise BadInput(f"{name}: has weights of its own, so --model.pretrained {pretrained} cannot be loaded; leave it out")
    if siglip and not FAMILIES[card["hf"]["model_type"]].bias:
        raise BadInput(f"{name}: a Hugging Face CLIP has no bias for SigLIP's loss; name a SigLIP, or a network of open_clip")
    if quick_gelu:
        for tower in ("text_config", "vision_config"):
            card["hf"][tower]["hidden_act"] = "quick_gelu"
    return card


def hf_files(source: str) -> dict[str, Any]:
    """The card of a Hugging Face model, from its config.json and preprocessor_config.json."""
    from transformers import PretrainedConfig

    with hub_errors(source):
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind not in FAMILIES:
        raise BadInput(f"{source}: its config.json says model_type {kind!r}, and only {' and '.join(FAMILIES)} are read here "
                       "(SigLIP 2 of fixed resolution says siglip); name another model, or a copy in open_clip's format")
    with hub_errors(source):
        config = FAMILIES[kind].of("Config").from_pretrained(source).to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        for told in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):  # of the file, not of the network
            part.pop(told, None)
    preprocess = asdict(PreprocessCfg()) | {"size": config["vision_config"]["image_size"]} | hf_preprocess(FAMILIES[kind], source)
    return {"hf": config, "source": source, "preprocess_cfg": json.loads(json.dumps(preprocess)), "tokenizer": source}


def hf_preprocess(family: Family, source: str) -> dict[str, Any]:
    """Mean, std, interpolation and way of resizing that come with a Hugging Face model, in open_clip's words."""
    processor = family.of("ImageProcessor")
    with hub_errors(source):
        try:
            theirs = processor.from_pretrained(source).to_dict()
        except OSError:  # without a file of its own a model has its family's
            if any((Path(source) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
                raise
            theirs = processor().to_dict()
            warnings.warn(f"{source}: no preprocessor_config.json can be had, so images are prepared as {family.classes}'s are",
                          stacklevel=2)
    size, crop = theirs["size"], theirs.get("crop_size") if theirs.get("do_center_crop") else None
    edge = size.get("shortest_edge")
    ways = {"shortest": edge and crop == {"height": edge, "width": edge}, "squash": "height" in size and crop in (None, size)}
    way = next((name for name, fits in ways.items() if fits and theirs["do_resize"]), None)
    interpolation = next((name for name, value in RESAMPLING.items() if value == theirs["resample"]), None)
    if not way or not interpolation or not math.isclose(theirs["do_rescale"] and theirs["rescale_factor"], 1 / 255):
        raise BadInput(f"{source}: its preprocessor resizes to {size if theirs['do_resize'] else None}, crops to {crop}, resample "
                       f"{int(theirs['resample'])}, rescale_factor {theirs['rescale_factor']}; open_clip can squash, or crop a shortest "
                       "edge of the crop's size, by bicubic (3) or bilinear (2), from 1/255; save its images so beforehand")
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    mean, std = (list((theirs if theirs["do_normalize"] else plain)[name]) for name in plain)
    return {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": way}


def hf_processor(family: Family, cfg: dict[str, Any]) -> Any:
    """The inverse of `hf_preprocess`, so that transformers reads what we save as we do."""
    h, w = (cfg["size"],) * 2 if isinstance(cfg["size"], int) else cfg["size"]
    exact = {"height": h, "width": w}
    ways = {"shortest": {"size": {"shortest_edge": min(h, w)}, "do_center_crop": True, "crop_size": exact}}
    way = ways.get(cfg["resize_mode"], {"size": exact, "do_center_crop": False})
    resample = int(RESAMPLING.get(cfg["interpolation"], Image.Resampling.BICUBIC))
    return family.of("ImageProcessor")(image_mean=list(cfg["mean"]), image_std=list(cfg["std"]), resample=resample, **way)


def build_hf(name: str, card: dict[str, Any]) -> tuple[HuggingFace, Callable[[list[str]], Tensor]]:
    """The network and tokenizer of a card; where we saved the model, its weights are still to be loaded."""
    source, family = name.removeprefix("hf:"), FAMILIES[card["hf"]["model_type"]]
    config = family.of("Config").from_dict(card["hf"])
    if saved := is_saved_hf(source):
        clip = family.of("Model")(config)
    else:
        with hub_errors(source):
            clip, report = family.of("Model").from_pretrained(source, config=config, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise BadInput(f"{source}: its weights lack {missing[0]} and {len(missing) - 1} more of its config.json; get it anew")
    ours = os.path.join(source, "hf")  # of a finished run; one under way has its start's
    place = ours if saved and os.path.isdir(ours) else card["tokenizer"]
    tokenizer = hf_tokenizer(family, place, card["hf"]["text_config"]["max_position_embeddings"])
    return HuggingFace(clip.float()), tokenizer  # transformers keeps the half precision of a file


def save_hf(net: HuggingFace, tokenizer: Callable[[list[str]], Tensor], cfg: dict[str, Any], folder: Path) -> None:
    """Adds a directory that transformers reads: the network, its preprocessing and tokenizer."""
    net.clip.save_pretrained(folder / "hf")
    hf_processor(net.family, cfg).save_pretrained(folder / "hf")
    if isinstance(tokenizer, HFTokens):
        tokenizer.tokenizer.save_pretrained(folder / "hf")


def hf_tokenizer(family: Family, source: str, length: int) -> Callable[[list[str]], Tensor]:
    from transformers import AutoTokenizer

    files = [Path(source) / name for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "spiece.model")]
    if not os.path.isdir(source) or any(f.is_file() for f in files):
        with hub_errors(source):
            return HFTokens(AutoTokenizer.from_pretrained(source), length, family.lower)
    if not family.openai_tokenizer:
        raise BadInput(f"{source}: holds no tokenizer; save the one it was trained with beside it (tokenizer.save_pretrained)")
    return open_clip.SimpleTokenizer(context_length=length)


@dataclass(frozen=True, eq=False)
class HFTokens:
    """A transformers tokenizer with open_clip's face: texts -> (N, length) int64."""

    tokenizer: Any
    length: int
    lower: bool = False

    def __call__(self, texts: list[str]) -> Tensor:
        texts = [t.lower() for t in texts] if self.lower else texts
        return self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")["input_ids"]


class hub_errors:
    """Turns a failed download into one line that says how to go on without the network."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        said = (str(error).strip().splitlines() or [""])[0][:120]
        if isinstance(error, ImportError):
            raise BadInput(f"{self.name}: needs a package that is not here ({said}); pip install it") from error
        if isinstance(error, (OSError, RuntimeError, ValueError)) and not isinstance(error, BadInput):
            download = "download it where there is a network (hf download …) and give the local path"
            mend = "mend its files" if os.path.isdir(self.name) else download
            raise BadInput(f"{self.name}: cannot be had ({said}); {mend}") from error
