"""Contact sheets: images in rows, words above and beneath them, and pairs before and after with the difference between."""
from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from PIL import Image, ImageChops

from . import stealth, stores
from .types import Sample

Cell = tuple[Image.Image, str, str]
"""An image, what stands above it, what beneath."""


def cells(before: Sample, *after: Sample) -> Iterator[Cell]:
    """The sample, and for each version of it that version and ten times the difference, with PSNR and SSIM."""
    a = before["image"]
    yield a, before["__key__"], before["text"]
    for b, text in ((sample["image"], sample["text"]) for sample in after):
        yield b, "after", text
        if a.size == b.size:
            numbers = f"PSNR {stealth.in_table(stealth.psnr(a, b))} dB, SSIM {stealth.in_table(stealth.ssim(a, b), 4)}"
            yield ImageChops.difference(a, b).point(lambda v: min(255, 10 * v)), "difference x 10", numbers
        else:
            yield Image.new("RGB", a.size, "white"), "", f"another size: {a.width} x {a.height}, then {b.width} x {b.height}"


def figure(shown: Sequence[Cell], across: int) -> Figure:
    """So many images to a row."""
    down = -(-len(shown) // across)
    figure = Figure(figsize=(2.5 * across, 2.3 * down), layout="tight")
    for i, (image, above, beneath) in enumerate(shown):
        axes = figure.add_subplot(down, across, i + 1, xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(above[-40:], fontsize=7, parse_math=False)  # a caption may hold dollar signs
        axes.set_xlabel(textwrap.fill(beneath if len(beneath) < 150 else beneath[:149] + "…", 36), fontsize=7, parse_math=False)
        axes.imshow(image, interpolation="nearest" if max(image.size) < 100 else None)
    return figure


def draw_sheet(shown: Sequence[Cell], across: int, out: str) -> None:
    """Writes a PNG. Whole or not at all."""
    with stores.replacing(out) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # what the font lacks, it draws as a box
        figure(shown, across).savefig(temporary, format="png", dpi=130)
