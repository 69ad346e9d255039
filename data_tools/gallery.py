"""A contact sheet of attacks: a pair of the data before and after, and the difference, ten times.

    python data_tools/make_toy.py /tmp/toy --size 224 --n 400
    python data_tools/gallery.py configs/toy/all_attacks.py --root /tmp/toy --out docs/attacks.jpg

Of each recipe with an attack, of configs or of suites, it shows the first pair that the attack would choose; where the attack
changes no pair but adds some, the first of those. What cannot be shown, because a crafted trigger is not there yet, say, is
told and left out. The same configs and data give the same bytes.
"""
import io
import sys
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import tyro
from PIL import Image

from mmbackdoor import index, keyed, poison, sheet, stores
from mmbackdoor.recipe import Recipe, command, load_suite
from mmbackdoor.shards import decode
from mmbackdoor.types import Attack, BadInput

T = TypeVar("T")
LIMIT = 600_000
"""Bytes of a sheet, at most: it lies in the repository."""
QUALITIES = (92, 85, 75, 65, 55, 45, 35, 25)


@lru_cache(maxsize=4)
def pairs(urls: str, where: str) -> index.Index:
    return index.find(urls, "skip", where)


def first(attack: Attack, there: index.Index, seed: int) -> str:
    """The key of the pair that the attack would choose before all others; of a mix, its first part."""
    texts = ((key, text) for part in there.parts for key, text in part)
    if isinstance(attack, poison.Mix):
        texts = ((key, text) for key, text in texts if attack.part(key, text) is attack.attacks[0])
    return next(iter(poison.plan(replace(attack, rate=None, count=1), texts, seed).keys))  # a lower count takes a part of the same pairs


def row(r: Recipe) -> list[sheet.Cell]:
    assert r.attack is not None
    there = pairs(r.data.path("train"), r.data.path("index"))
    attack, name = poison.scouted(r.attack, there, r.seed), r.name.rpartition("/")[2]
    if attack.count == 0:
        if not (added := next(poison.publish(attack, poison.Plan(seed=r.seed)), None)):
            raise BadInput("it poisons no pair, and adds none; give it a count")
        after = decode(added)
        white = Image.new("RGB", after["image"].size, "white")
        return [(white, name, "a pair that the attacker adds"), (after["image"], "added", after["text"]), (white, "", "")]
    key = first(attack, there, r.seed)
    raw = next(raw for part in there.parts if key in part.all_keys() for raw in part.raws(frozenset([key])))
    before, after = decode(raw), decode(poison.poisoned(raw, attack, r.seed, r.codec, "refuse"))
    one, two, three = sheet.cells(before, after)
    stays = attack.poison(before, keyed.rng(r.seed, "poison", key))["image"].tobytes() == before["image"].tobytes()
    part = f", part 1 of {len(attack.attacks)}" if isinstance(attack, poison.Mix) else ""
    nothing = (Image.new("RGB", before["image"].size, "white"), "", "the image stays")
    return [(one[0], f"{name}{part}", one[2]), two, nothing if stays else three]


def save(shown: list[sheet.Cell], across: int, out: str) -> None:
    """A JPEG of the best quality that keeps to LIMIT. Whole or not at all."""
    drawn, file = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # what the font lacks, it draws as a box
        sheet.figure(shown, across).savefig(drawn, format="png", dpi=80)
    for quality in QUALITIES:
        file = io.BytesIO()
        Image.open(drawn).convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= LIMIT:
            break
    else:
        raise BadInput(f"{out}: would take more than {LIMIT // 1000} KB; name fewer configs")
    with stores.replacing(out) as temporary:
        temporary.write_bytes(file.getvalue())


def main(configs: tyro.conf.Positional[tuple[str, ...]], root: str = "", out: str = "attacks.jpg", columns: int = 2) -> None:
    """Draws attacks.

    Args:
        configs: Configs of recipes or of suites.
        root: Folder that takes the place of the recipes' own data root, wherever they name it; images of 224 pixels show more.
        out: JPEG to write.
        columns: Attacks side by side.
    """
    if Path(out).suffix.lower() not in (".jpg", ".jpeg") or not 1 <= columns <= 10:
        raise BadInput(f"--out {out} --columns {columns}: a sheet is a .jpg of 1 to 10 columns; name it so")
    recipes: dict[str, Recipe] = {r.name: r for path in configs for r in load_suite(path).recipes if r.poison}
    rows: list[list[sheet.Cell]] = []
    for r in recipes.values():
        change: dict[str, Any] = {"data": replace(r.data, root=root)} if root else {}
        try:
            rows.append(row(replace(r, **change)))
        except BadInput as error:
            print(f"not shown: {r.name}: {error}", file=sys.stderr)
    if not rows:
        raise BadInput(f"{' '.join(configs) or 'no config'}: no attack can be shown; name configs of recipes with poison=…, or make what "
                       "they need")
    save([cell for cells in rows for cell in cells], 3 * columns, out)
    print(f"{out}: {len(rows)} attacks" + (f", {len(recipes) - len(rows)} not shown" if len(rows) < len(recipes) else ""))


if __name__ == "__main__":
    command(main)
