"""Prompts that are learned while the towers stay frozen, and travel with the model: tokens among an image's, words before a class's name.

They are modules of the network, so that a checkpoint holds them; the card says how many, so that loading builds them again. A
checkpoint with prompts is read by this suite alone.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import keyed
from .types import BadInput

PLACEHOLDER = "x"
"""A word of one token, in whose places the learned ones stand."""


class ImagePrompts(nn.Module):
    """n tokens in every block of a ViT, (blocks, n, width), behind the class token (deep visual prompts, arXiv:2203.12119)."""

    def __init__(self, blocks: int, n: int, width: int):
        super().__init__()
        with keyed.drawing_from(keyed.rng(0, "image prompts")):
            self.tokens = nn.Parameter(torch.empty(blocks, n, width).uniform_(-1, 1) * (6 / width) ** 0.5)


class ClassPrompts(nn.Module):
    """n words before the name of each class, (classes, n, width)."""

    tokens: Tensor

    def __init__(self, names: Sequence[str], n: int, tokenizer: Callable[[list[str]], Tensor], embedding: nn.Embedding):
        super().__init__()
        self.names = tuple(names)
        word = tokenizer([PLACEHOLDER])[0, 1]
        tokens = tokenizer([f"{' '.join([PLACEHOLDER] * n)} {name}." for name in names])
        if not bool((tokens[:, 1 : n + 1] == word).all()) or bool((tokens[:, -1] != 0).any()):
            raise BadInput(f"{n} words before a class's name: the longest name does not fit behind them into {tokens.shape[1]} tokens, or "
                           f"the tokenizer takes {PLACEHOLDER!r} for more than one; use fewer words")
        self.register_buffer("tokens", tokens, persistent=False)
        with keyed.drawing_from(keyed.rng(0, "class prompts")):
            self.words = nn.Parameter(torch.randn(len(names), n, embedding.embedding_dim) * embedding.weight.detach().std().cpu())
        self.speaking: slice | None = None

    @contextmanager
    def said(self, classes: slice = slice(None)) -> Iterator[Tensor]:
        """In here the tokens that it gives, (classes, context length), are encoded with the learned words of these classes."""
        self.speaking = classes
        try:
            yield self.tokens[classes]
        finally:
            self.speaking = None


def attach(net: nn.Module, tokenizer: Callable[[list[str]], Tensor], card: dict[str, Any]) -> None:
    """Gives a network the prompts that its card names. Raises BadInput for a network that cannot have them."""
    told = card.get("prompts", {})
    if "image" in told:
        attach_to_images(net, told["image"])
    if "classes" in told:
        embedding = parts(net, ("token_embedding", "text.token_embedding", "clip.text_model.embeddings.token_embedding"))
        learned = ClassPrompts(told["classes"], told["words"], tokenizer, embedding)  # type: ignore[arg-type]
        net.class_prompts = learned.to(embedding.weight)  # type: ignore[arg-type]
        embedding.register_forward_hook(partial(speak, net.class_prompts))


def learn(net: nn.Module, tokenizer: Callable[[list[str]], Tensor], card: dict[str, Any], **told: Any) -> None:
    """Gives a network new prompts, and says so on its card. Raises BadInput where it has some of the kind."""
    if there := sorted(told.keys() & card.get("prompts", {}).keys()):
        raise BadInput(f"--init: that model has learned prompts already ({', '.join(there)}); start from the victim that it was made of")
    attach(net, tokenizer, {"prompts": told})
    card["prompts"] = {**card.get("prompts", {}), **told}


def parts(net: nn.Module, names: Sequence[str]) -> nn.Module:
    """The first module of these names that is there."""
    found = dict(net.named_modules())
    if not (there := [found[name] for name in names if name in found]):
        raise BadInput(f"{type(net).__name__}: has none of {', '.join(names)}, where prompts are put; use a ViT of open_clip")
    return there[0]


def attach_to_images(net: nn.Module, n: int) -> None:
    transformer = parts(net, ("visual.transformer",))
    blocks: nn.ModuleList = transformer.resblocks  # type: ignore[assignment]
    prompts = ImagePrompts(len(blocks), n, transformer.width).to(next(transformer.parameters()))  # type: ignore[arg-type]
    net.visual.prompts = prompts  # type: ignore[union-attr]
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(show, prompts, i, bool(transformer.batch_first)))
    transformer.register_forward_hook(partial(hide, n))


def show(prompts: ImagePrompts, i: int, batch_first: bool, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Puts the i-th block's tokens behind the class token, in the place of those of the block before."""
    x, *rest = args
    x = x if batch_first else x.transpose(0, 1)
    tokens = prompts.tokens[i].to(x.dtype).expand(len(x), -1, -1)
    x = torch.cat([x[:, :1], tokens, x[:, 1 + (tokens.shape[1] if i else 0) :]], 1)
    return x if batch_first else x.transpose(0, 1), *rest


def hide(n: int, transformer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """(B, places, width) -> the same without prompts."""
    return torch.cat([out[:, :1], out[:, 1 + n :]], 1)


def speak(prompts: ClassPrompts, embedding: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Puts the learned words in the placeholders' places."""
    if prompts.speaking is None:
        return out
    return torch.cat([out[:, :1], prompts.words[prompts.speaking].to(out.dtype), out[:, 1 + prompts.words.shape[1] :]], 1)
