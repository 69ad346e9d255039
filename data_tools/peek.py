"""A contact sheet of shards: images and captions, or planned poisons before and after and how much of them can be seen.

    python data_tools/peek.py SHARDS [--n 8] [--out sheet.png]
    python data_tools/peek.py SHARDS --recipe configs/toy/badnets.py [--plan plan.parquet]   before | after | difference x 10
    python data_tools/peek.py SHARDS --patch PATCHES                                         the same from a patch set
    python data_tools/peek.py SHARDS --against POISONED [--plan POISONED/plan.parquet]       the same from two shard sets

Samples come in the order of the shards. Where a plan says which, only those shown are read. Beneath each difference stand
PSNR and SSIM; their means over the sheet are printed, or with --json all of its summary (null for an infinite PSNR).
"""
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import islice, tee
from json import dumps

import tyro

from mmbackdoor import forms, poison, shards, stealth, stores
from mmbackdoor import recipe as recipes
from mmbackdoor.index import Index, find
from mmbackdoor.sheet import cells, draw_sheet
from mmbackdoor.types import BadInput, Sample

Row = tuple[shards.Raw, ...]


def samples(index: Index, keys: frozenset[str]) -> Iterator[shards.Raw]:
    for part in index.parts:
        if there := keys.intersection(part.all_keys()):
            yield from part.raws(there)


def versions(index: Index, against: str, keys: frozenset[str] | None) -> Iterator[Row]:
    """Both versions of these samples, or of those that differ."""
    theirs = {stores.name_of(part.shard): part for part in find(against, "skip").parts}
    for part in index.parts:
        other, here = theirs.get(stores.name_of(part.shard)), part.all_keys()
        if other is None or other.all_keys() != here:
            raise BadInput(f"{against}: has no shard of the same name and keys as {part.shard}; name another version of the same shards")
        there = frozenset(here if keys is None else keys.intersection(here))
        for one, two in zip(part.raws(there), other.raws(there), strict=True) if there else ():
            if keys is not None or one != two | {"__url__": one["__url__"]}:
                yield one, two


def changes(urls: str, recipe: str, plan: str, patch: str, against: str, n: int, seed: int | None, where: str) -> Iterator[Row]:
    index, truth = find(urls, "skip", where), poison.Plan.load(plan) if plan else None

    def chosen(plan: poison.Plan) -> frozenset[str]:
        there = plan.keys.intersection(index.keys())
        if plan.keys and not there:
            raise BadInput(f"{urls}: holds none of the {len(plan.keys)} samples of the plan; name the shards that it was made from")
        return there if seed is None else frozenset(random.Random(seed).sample(sorted(there), min(n, len(there))))

    if against:
        yield from versions(index, against, chosen(truth) if truth else None)
    elif patch:
        _, stages, whole = forms.lay_over(index, patch, "skip")
        before, after = tee(samples(index, chosen(whole & truth.keys if truth else whole)))
        yield from zip(before, stages[0](after) if stages else after, strict=True)
    else:
        r = recipes.load(recipe)
        if (attack := r.attack) is None:
            raise BadInput(f"{recipe}: its recipe poisons nothing; name one with poison=…")
        truth = truth or (poison.Plan.load(r.plan) if r.plan else poison.plan(attack, index, r.seed))
        attack = poison.scouted(attack, index, truth.seed)
        yield from ((raw, poison.poisoned(raw, attack, truth.seed, r.codec)) for raw in samples(index, chosen(truth)))


def decoded(rows: Iterable[Row]) -> Iterator[list[Sample]]:
    for row in rows:
        try:
            yield [shards.decode(raw) for raw in row]
        except BadInput as error:
            print(f"not shown: {error}", file=sys.stderr)


def main(urls: tyro.conf.Positional[str], recipe: str = "", plan: str = "", patch: str = "", against: str = "", n: int = 8,
         seed: int | None = None, index: str = "", json: bool = False, out: str = "sheet.png") -> None:
    """Draws a contact sheet.

    Args:
        urls: Shards.
        recipe: Config whose attack is shown on the pairs that it plans.
        plan: Plan to show instead of the recipe's own, or what to show of a patch set or of two shard sets.
        patch: Patch set made from the shards.
        against: Other version of the same shards, to show the pairs that differ.
        n: Pairs to show.
        seed: Choose them at random among those that are planned, instead of the first.
        index: Folder of the shards' index, where it is not beside them.
        json: Print the summary as JSON.
        out: PNG to write.
    """
    poisons = bool(recipe) + bool(patch) + bool(against)
    if not 1 <= n <= 100:  # a PNG of 975 x 30,000 pixels
        raise BadInput(f"--n {n}: a sheet shows 1 to 100 pairs; give such a number")
    if poisons > 1 or ((plan or json) and not poisons) or (seed is not None and not (recipe or patch or (against and plan))):
        raise BadInput("--recipe, --patch and --against exclude each other, --plan and --json need one of them, --seed a plan; mend that")
    clean = ((raw,) for url in shards.expand(urls) for raw in shards.read_pairs(url))
    rows = list(islice(decoded(changes(urls, recipe, plan, patch, against, n, seed, index) if poisons else clean), n))
    if not rows:
        raise BadInput(f"{urls}: no pair {'differs' if poisons else 'is whole'}, so there is nothing to show; check the rate and the paths")
    draw_sheet([cell for row in rows for cell in cells(*row)], 3 if poisons else min(4, len(rows)), out)
    found = stealth.summarise((r[0]["image"], r[-1]["image"]) for r in rows if poisons and r[0]["image"].size == r[-1]["image"].size)
    words = ", ".join(f"{k} {stealth.in_table(v, 0 if k == 'n' else 4 if 'ssim' in k else 2)}" for k, v in found.items())
    print(dumps({name: stealth.in_json(value) for name, value in found.items()}) if json else f"{out}: {words}" if poisons else out)


if __name__ == "__main__":
    recipes.command(main)
