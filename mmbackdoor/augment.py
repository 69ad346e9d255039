"""Augmented views of images and captions, all of whose randomness comes from an argument. """
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image, ImageFilter
from torch import Generator, Tensor
from torchvision.transforms import AutoAugment, RandAugment, v2

from .keyed import drawing_from
from .types import BadInput, Sample

Policy = Literal["auto", "rand", "colour", "tone", "none"]


# ---- images


def blur(image: Image.Image) -> Image.Image:
    """A Gaussian of 0.1 to 2 pixels at a width of 224, in proportion on other sizes."""
    sigma = float(torch.empty(()).uniform_(0.1, 2.0))
    return image.filter(ImageFilter.GaussianBlur(sigma * image.width / 224))


def simclr(hue: bool) -> v2.Compose:
    """Colours, blur and a mirror as SimCLR's at strength 1/2, which are MoCo v2's; or all of it that leaves an object's colour its name."""
    grey = [v2.RandomGrayscale(p=0.2)] if hue else []
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1) if hue else v2.ColorJitter(0.4, 0.4)
    return v2.Compose([v2.RandomApply([jitter], p=0.8), *grey, v2.RandomApply([v2.Lambda(blur)], p=0.5), v2.RandomHorizontalFlip()])


@lru_cache(maxsize=8)
def policy(kind: Policy) -> Callable[[Image.Image], Image.Image]:
    """What a policy does to a PIL image: torchvision's AutoAugment (ImageNet's policy) or RandAugment; or the colours of SimCLR
    (Chen et al., 2020, arXiv:2002.05709) and MoCo v2: jitter, grey, blur and a mirror, without their crop; or, where an image's class may
    be a colour, no more of them than brightness, contrast, blur and mirror ("tone")."""
    steps: dict[Policy, Callable[[], Any]] = {"auto": AutoAugment, "rand": RandAugment, "colour": lambda: simclr(hue=True),
                                              "tone": lambda: simclr(hue=False), "none": lambda: lambda image: image}
    return steps[kind]()


def alter(kind: Policy, image: Image.Image, rng: Generator) -> Image.Image:
    """PIL RGB -> a new one of the same size."""
    with drawing_from(rng):
        return policy(kind)(image)


def auto_augment(image: Image.Image, rng: Generator) -> Image.Image:
    """AutoAugment (Cubuk et al., 2019, arXiv:1805.09501) with randomness from `rng`."""
    return alter("auto", image, rng)


def augmented_image(clip: Any, sample: Sample, rng: Generator, kind: Policy = "auto") -> Tensor:
    """A view: the image after a policy, in the model's training transform. (3, H, W), normalised."""
    return clip.augment(alter(kind, sample["image"], rng), rng)


def cropped_image(clip: Any, sample: Sample, rng: Generator, scale: tuple[float, float] | None = None,
                  kind: Policy = "colour") -> Tensor:
    """A view: the training transform's crop, or one of `scale` of the area, in other colours. (3, H, W), normalised."""
    crop = clip.crop(sample["image"], rng, scale)
    return clip.to_input(alter(kind, crop, rng))


# ---- captions


def edit_words(text: str, rng: Generator, share: float = 0.1, synonyms: bool = False) -> str:
    """EDA (Wei and Zou, 2019, arXiv:1901.11196): swaps, deletes or repeats `share` of the words, at least one, or, with `synonyms`,
    puts another word of WordNet's in their place. Raises BadInput when synonyms are asked for and WordNet is not installed."""
    words = text.split()
    if len(words) < 2:
        return text
    kind = int(torch.randint(4 if synonyms else 3, (), generator=rng))
    for _ in range(max(1, round(share * len(words)))):
        i, j = torch.randint(len(words), (2,), generator=rng).tolist()
        if kind == 0:
            words[i], words[j] = words[j], words[i]
        elif kind == 1 and len(words) > 1:
            del words[i]
        elif kind == 2:
            words.insert(j, words[i])
        elif kind == 3 and (known := synonyms_of(words[i])):
            words[i] = known[int(torch.randint(len(known), (), generator=rng))]
    return " ".join(words)


@lru_cache(maxsize=65_536)
def synonyms_of(word: str) -> tuple[str, ...]:
    """What WordNet has in the sets of meanings that hold the word, in order of the alphabet; nothing for an unknown word."""
    try:
        from nltk.corpus import wordnet

        bare = word.strip(".,;:!?\"'()")
        found = {name.replace("_", " ") for s in wordnet.synsets(bare) for name in s.lemma_names()}
    except (ImportError, LookupError) as error:
        raise BadInput("--objective.synonyms: needs nltk and its WordNet, which are not here; pip install 'mmbackdoor[synonyms]' and "
                       "python -m nltk.downloader wordnet, or leave synonyms out") from error
    return tuple(sorted(name for name in found if name.lower() != bare.lower()))


def check_synonyms(wanted: bool) -> None:
    """Raises BadInput where synonyms are asked for and cannot be had."""
    if wanted:
        synonyms_of("word")


def augmented_text(clip: Any, sample: Sample, rng: Generator, share: float = 0.1, synonyms: bool = False) -> Tensor:
    """A view: the caption with some words edited. (context length,) int64."""
    return clip.tokenize(edit_words(sample["text"], rng, share, synonyms))
