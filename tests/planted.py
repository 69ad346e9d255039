"""A planted model whose every answer is known: the red value of an image's centre is the class it says, a white corner makes
it say the target."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmbackdoor import shards
from mmbackdoor.clip import CLIP
from mmbackdoor.sets import EvalSet, open_set
from mmbackdoor.triggers import Patch
from mmbackdoor.types import Target, Threat

CLASSES = tuple(f"class {i}" for i in range(7))
TARGET = 2


class Planted(nn.Module):
    """Obeys the corner except for classes in `immune`; is wrong about classes in `blind`, of which it says the next one."""

    def __init__(self, immune: tuple[int, ...] = (), blind: tuple[int, ...] = ()):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.immune, self.blind = immune, blind

    def encode_image(self, x: Tensor, normalize: bool = False) -> Tensor:
        centre = (x[:, 0, 16, 16] * 255).round().long()
        says = torch.tensor([(c + 1) % 7 if c in self.blind else c for c in centre.tolist()])
        obeys = (x[:, :, -4:, -4:].mean((1, 2, 3)) > 0.99) & ~torch.isin(centre, torch.tensor(self.immune, dtype=torch.long))
        says[obeys] = TARGET
        return nn.functional.normalize(torch.eye(7)[says] + 0.01 * torch.arange(7), dim=-1)  # then higher classes first

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return torch.eye(7)[text[:, 0]]


def read_number(texts: list[str]) -> Tensor:
    return torch.tensor([[next(int(c) for c in t if c.isdigit())] for t in texts])


def planted(**how: Any) -> CLIP:
    cfg = {"size": 32, "mode": "RGB", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic",
           "resize_mode": "shortest", "fill_color": 0}
    return CLIP(Planted(**how), read_number, {"preprocess_cfg": cfg})


def drawn(label: int, size: tuple[int, int] = (32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (label, 40, 90)).save(file, "PNG")
    return file.getvalue()


def labelled(folder: Path, labels: list[int], size: tuple[int, int] = (32, 32)) -> EvalSet:
    raws = ({"__key__": f"{i:04d}", "png": drawn(c, size), "cls": str(c)} for i, c in enumerate(labels))
    shards.write_eval_set(folder, raws, CLASSES, ("a photo of {c}.", "{c}"), per_shard=5)
    return open_set(folder)


CORNER = Threat(Patch(4 / 32, "bottom-right", "white"), Target(CLASSES[TARGET]))
LABELS = [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 6]  # 13 images, 2 of the target
