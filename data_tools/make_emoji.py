"""Draw emoji by three artists as image-caption shards and two labelled test sets.

    git clone --depth 1 https://github.com/svgmoji/svgmoji
    pip install 'mmbackdoor[emoji]'                              # cairosvg; it needs the system library libcairo
    python data_tools/make_emoji.py svgmoji data/emoji           # half a minute: 1,609 concepts, 4,700 drawings
    python data_tools/make_emoji.py svgmoji data/emoji-7 --seed 7 --size 96 --held-out 0.2

A concept is an emoji that Unicode shows as a picture unless told otherwise, without skin tones, and that at least one
artist drew. OUT/train holds image-caption pairs as img2dataset lays them out; OUT/concepts and OUT/groups hold the same
test images, labelled by concept and by Unicode group, as CLIP_benchmark lays them out. A test image is by an artist
whose drawing of this concept is not in the training pairs. The seed decides what is held out, the captions, the
grounds and the order. Some Blobmoji drawings contain text, which is set in the machine's own sans-serif font.
"""
from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from tqdm import tqdm

from mmbackdoor import keyed
from mmbackdoor.recipe import command
from mmbackdoor.shards import new_folder, write_eval_set, write_shards
from mmbackdoor.types import BadInput

ARTISTS = ("noto", "blob", "twemoji")
GROUPS = ("smileys and emotion", "people and body", "component", "animals and nature", "food and drink",
          "travel and places", "activities", "objects", "symbols", "flags")
"""The group numbers of emojibase, in words."""
SKIN_TONE = re.compile("1F3F[B-F]")
CONCEPT_TEMPLATES = ("{c}", "an emoji of {c}", "a picture of {c}", "icon showing {c}")
GROUP_TEMPLATES = ("{c}", "an emoji of {c}")
PER_SHARD = 1000
README = """\
# Emoji drawings with captions

{pairs} image-caption pairs in `train/`, {tests} labelled test images in `concepts/` and `groups/`.
Drawn by `data_tools/make_emoji.py` with seed {seed} from the SVG files of svgmoji/svgmoji.

| set | artists | licence |
|---|---|---|
| noto | Noto Emoji, Google | SIL OFL 1.1 |
| blob | Blobmoji, Google and C1710 | SIL OFL 1.1 / Apache 2.0 |
| twemoji | Twemoji, Twitter and contributors | CC-BY 4.0 |
| names, keywords, groups | Unicode CLDR through emojibase | Unicode licence / MIT |
"""

Render = Callable[[bytes, int], Image.Image]
"""(SVG, side in pixels) -> RGBA; raises whatever it likes on an SVG that it cannot draw."""


@dataclass(frozen=True)
class Concept:
    name: str
    hexcode: str
    group: int
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    concept: Concept
    artist: str
    jpg: bytes


def cairo() -> Render:
    """The renderer of cairosvg, an optional dependency."""
    try:
        import cairosvg
    except ImportError as e:
        raise BadInput("drawing SVG files needs cairosvg: pip install 'mmbackdoor[emoji]'") from e
    except OSError as e:
        raise BadInput("cairosvg does not find the system library libcairo: apt-get install libcairo2") from e

    def render(svg: bytes, size: int) -> Image.Image:
        png = cairosvg.svg2png(bytestring=svg, output_width=size, output_height=size)
        return Image.open(io.BytesIO(png)).convert("RGBA")

    return render


def read_concepts(checkout: Path) -> list[Concept]:
    """The emoji that become concepts, by name."""
    table = checkout / "packages" / "svgmoji" / "emoji.json"
    folders = [svg_folder(checkout, artist) for artist in ARTISTS]
    absent = [p.relative_to(checkout) for p, there in [(table, table.is_file()), *((f, f.is_dir()) for f in folders)]
              if not there]
    if absent:
        raise BadInput(f"{checkout}: holds no {absent[0]}; pass the top folder of a work tree of "
                       "https://github.com/svgmoji/svgmoji, which has packages/svgmoji/emoji.json and "
                       "packages/svgmoji__{noto,blob,twemoji}/svg/")
    try:
        found = {c.name: c for c in map(concept, json.loads(table.read_text(encoding="utf-8"))) if c}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise BadInput(f"{table}: not emojibase's list of emoji ({type(e).__name__}: {e}); "
                       "check the file out again") from e
    return [found[name] for name in sorted(found)]


def concept(emoji: dict[str, Any]) -> Concept | None:
    """One entry of emoji.json, or None where it is text by default, a skin tone, or a bare part of other emoji."""
    if emoji["type"] != 1 or "group" not in emoji or SKIN_TONE.search(emoji["hexcode"]):
        return None
    return Concept(str(emoji["annotation"]), emoji["hexcode"], range(len(GROUPS))[emoji["group"]],
                   tuple(emoji.get("tags", ())))


def svg_folder(checkout: Path, artist: str) -> Path:
    return checkout / "packages" / f"svgmoji__{artist}" / "svg"


def draw_all(checkout: Path, concepts: list[Concept], seed: int, size: int) -> tuple[list[Drawing], list[Path]]:
    """Every drawing that there is, and the SVG files that could not be drawn."""
    render, drawings, failed = cairo(), [], []
    files = [(c, artist, svg) for c in concepts for artist in ARTISTS
             if (svg := svg_folder(checkout, artist) / f"{c.hexcode}.svg").is_file()]
    for c, artist, svg in tqdm(files, desc="drawing", unit="svg", disable=None):
        try:
            image = render(svg.read_bytes(), size)
        except Exception:  # SVG files from the wild fail inside cairosvg with errors of every kind
            image = Image.new("RGBA", (size, size))
        if image.getchannel("A").getextrema() == (0, 0):
            failed.append(svg)
        else:
            drawings.append(Drawing(c, artist, on_ground(image, ground(c, artist, seed))))
    return drawings, failed


def ground(concept: Concept, artist: str, seed: int) -> tuple[int, ...]:
    """A light colour."""
    return tuple(200 + int(56 * keyed.uniform(seed, concept.hexcode, artist, f"ground {channel}")) for channel in "rgb")


def on_ground(drawing: Image.Image, colour: tuple[int, ...]) -> bytes:
    """The drawing on a plain ground, as JPEG."""
    image, out = Image.new("RGB", drawing.size, colour), io.BytesIO()
    image.paste(drawing, mask=drawing)
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def caption(concept: Concept, artist: str, seed: int) -> str:
    """One of six ways to write about the concept, three of them the bare templates."""
    def draw(n: int, purpose: str) -> int:
        return int(n * keyed.uniform(seed, concept.hexcode, artist, purpose))

    name, keywords = concept.name, sorted(concept.keywords, key=lambda k: draw(1 << 32, f"keyword {k}"))
    ways = [template.format(c=name) for template in CONCEPT_TEMPLATES]
    ways += [f"{keywords[0]}: {name}", ", ".join([name, *keywords[:3]])] if keywords else [name, name]
    return ways[draw(len(ways), "caption")]


def chosen_for_test(drawings: Iterable[Drawing], seed: int, share: float) -> frozenset[tuple[str, str]]:
    """(hexcode, artist) of the test drawings: one artist of about `share` of the concepts, never the only one."""
    artists: dict[str, list[str]] = {}
    for d in drawings:
        artists.setdefault(d.concept.hexcode, []).append(d.artist)
    return frozenset((code, drawn_by[int(len(drawn_by) * keyed.uniform(seed, code, "artist"))])
                     for code, drawn_by in artists.items()
                     if len(drawn_by) > 1 and keyed.uniform(seed, code, "held out") < share)


def pairs(drawings: list[Drawing], seed: int) -> Iterator[dict[str, Any]]:
    """Training samples, with the keys that img2dataset would give them."""
    for i, d in enumerate(drawings):
        key = f"{i // PER_SHARD:05d}{i % PER_SHARD:04d}"
        yield {"__key__": key, "jpg": d.jpg, "txt": caption(d.concept, d.artist, seed),
               "json": {"key": key, "concept": d.concept.name, "group": GROUPS[d.concept.group], "set": d.artist,
                        "hexcode": d.concept.hexcode}}


def labelled(drawings: list[Drawing], label: Callable[[Concept], int]) -> Iterator[dict[str, Any]]:
    for i, d in enumerate(drawings):
        yield {"__key__": f"s{i:07d}", "jpg": d.jpg, "cls": label(d.concept)}


def write(root: Path, train: list[Drawing], test: list[Drawing], seed: int) -> None:
    names = sorted({d.concept.name for d in train})
    labels = {name: i for i, name in enumerate(names)}
    write_shards(root / "train", pairs(train, seed), per_shard=PER_SHARD)
    write_eval_set(root / "concepts", labelled(test, lambda c: labels[c.name]), names, CONCEPT_TEMPLATES)
    write_eval_set(root / "groups", labelled(test, lambda c: c.group), GROUPS, GROUP_TEMPLATES)
    (root / "README.md").write_text(README.format(pairs=len(train), tests=len(test), seed=seed), encoding="utf-8")


def main(checkout: tyro.conf.Positional[str], out: tyro.conf.Positional[str], seed: int = 0, size: int = 64,
         held_out: float = 0.44) -> None:
    """Draw the Noto, Blob and Twemoji emoji as image-caption shards and two labelled test sets.

    Args:
        checkout: top folder of a work tree of the public repository svgmoji/svgmoji.
        out: folder to make; it gets train/, concepts/, groups/ and a README.md with the licences.
        seed: decides what is held out, the captions, the grounds and the order.
        size: side of the images in pixels.
        held_out: share of the concepts of which one artist's drawing is kept for the test sets.
    """
    source, target = Path(checkout), Path(out)
    if not 8 <= size <= 4096:
        raise BadInput(f"--size {size}: images need 8 to 4096 pixels a side")
    if not 0 < held_out <= 1:
        raise BadInput(f"--held-out {held_out}: needs a share above 0 and up to 1")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target}: is there already and not empty; remove it or name another place")
    drawings, failed = draw_all(source, read_concepts(source), seed, size)
    drawings.sort(key=lambda d: keyed.uniform(seed, d.concept.hexcode, d.artist, "order"))
    apart = chosen_for_test(drawings, seed, held_out)
    test = [d for d in drawings if (d.concept.hexcode, d.artist) in apart]
    train = [d for d in drawings if (d.concept.hexcode, d.artist) not in apart]
    if not test:
        raise BadInput(f"{source}: {len(drawings)} drawings, none of which could be held out; "
                       "check the svg folders, or raise --held-out")
    with new_folder(target) as folder:
        write(folder, train, test, seed)
    print(f"{target}: {len(train)} training pairs and {len(test)} test images of "
          f"{len({d.concept.name for d in train})} concepts")
    if failed:
        print(f"left out {len(failed)} SVG files that cairosvg cannot draw: "
              + ", ".join(f"{svg.parent.parent.name}/{svg.stem}" for svg in failed[:8]) + (" …" if failed[8:] else ""))


if __name__ == "__main__":
    command(main)
