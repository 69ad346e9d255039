"""A contact sheet of shards: images and captions, or planned poisons before and after.

    python data_tools/peek.py SHARDS [--n 8] [--out sheet.png]
    python data_tools/peek.py SHARDS --recipe configs/toy/badnets.py      before | after | difference x 10, captions
    python data_tools/peek.py SHARDS --against POISONED                   the same from two shard sets
"""
from collections.abc import Iterator
from itertools import islice

import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from mmbackdoor import recipe as recipes
from mmbackdoor import shards
from mmbackdoor.poison import plan, poison
from mmbackdoor.types import BadInput, Sample


def poisoned(urls: str, recipe: str) -> Iterator[tuple[Sample, Sample]]:
    """Planned pairs of a recipe, before and after."""
    r = recipes.load(recipe)
    if r.poison is None:
        raise BadInput(f"{recipe}: its recipe poisons nothing; name one with poison=…")
    index = shards.index(urls, "skip")
    truth = plan(r.poison, index, r.seed)
    for url in index.shards:
        for raw in shards.read_pairs(url):
            if raw["__key__"] in truth.keys:
                after, = poison([raw], r.poison, truth)
                yield shards.decode(raw), shards.decode(after)


def changed(urls: str, against: str) -> Iterator[tuple[Sample, Sample]]:
    """Pairs that differ between two shard sets of the same shards."""
    for one, other in zip(shards.expand(urls), shards.expand(against), strict=False):
        theirs = {raw["__key__"]: raw for raw in shards.read_pairs(other)}
        for raw in shards.read_pairs(one):
            new = theirs.get(raw["__key__"], raw)
            if any(raw[f] != new.get(f) for f in raw if not f.startswith("__")):
                yield shards.decode(raw), shards.decode(new)


def cell(axes, image: Image.Image, title: str) -> None:
    axes.imshow(image, interpolation="nearest" if max(image.size) < 100 else None)
    axes.set_title(title, fontsize=7, wrap=True)
    axes.axis("off")


def main(urls: tyro.conf.Positional[str], recipe: str = "", against: str = "", n: int = 8, out: str = "sheet.png") -> None:
    """Draws a contact sheet.

    Args:
        urls: Shards.
        recipe: Config whose attack is shown on the pairs that it plans.
        against: Other version of the same shards, to show the pairs that differ.
        n: Pairs to show.
        out: PNG to write.
    """
    if recipe or against:
        pairs = list(islice(poisoned(urls, recipe) if recipe else changed(urls, against), n))
        if not pairs:
            raise BadInput(f"{urls}: no pair differs, so there is nothing to show; check the recipe's rate and the paths")
        figure = Figure(figsize=(7.5, 1.9 * len(pairs)), layout="tight")
        for row, (before, after) in zip(figure.subplots(len(pairs), 3, squeeze=False), pairs, strict=True):
            difference = ImageChops.difference(before["image"], after["image"]).point(lambda v: min(255, 10 * v))
            cell(row[0], before["image"], before["text"])
            cell(row[1], after["image"], after["text"])
            cell(row[2], difference, "difference x 10")
    else:
        samples = list(islice(shards.read(urls), n))
        across = min(4, len(samples))
        figure = Figure(figsize=(2.4 * across, 2.2 * -(-len(samples) // across)), layout="tight")
        axes = figure.subplots(-(-len(samples) // across), across, squeeze=False).flat
        for a in axes:
            a.axis("off")
        for a, s in zip(axes, samples, strict=False):
            cell(a, s["image"], s["text"])
    with shards.replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    print(out)


if __name__ == "__main__":
    recipes.command(main)
