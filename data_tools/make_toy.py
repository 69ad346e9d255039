"""Procedural image-text shards: coloured shapes on textured grounds, with captions that say what is to be seen.

    python data_tools/make_toy.py OUT --n 10000 [--size 32] [--seed 0] [--format jpg]

Writes OUT/train (n pairs), OUT/clean (fresh clean pairs for a defender), OUT/pairs (for retrieval), and OUT/val and
OUT/test, labelled sets in the CLIP_benchmark layout with 48 classes, "red star" for one. For attacks that compose images
also OUT/references/red star/00.png …, pictures of each class whose alpha is the object's mask, and OUT/backgrounds/000.png …,
grounds without an object. The same seed gives the same bytes. About the size of what a laptop trains in a minute; the
code that reads it is the code that reads CC3M.
"""
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from mmbackdoor import keyed, shards
from mmbackdoor.recipe import command
from mmbackdoor.types import BadInput

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50),
           "purple": (140, 60, 180), "orange": (240, 140, 40), "white": (240, 240, 240), "black": (25, 25, 25)}
GROUNDS = {"grey": (128, 128, 128), "brown": (125, 90, 60), "pink": (235, 170, 190), "teal": (60, 140, 140),
           "olive": (125, 125, 60), "sky": (150, 195, 230)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
TEMPLATES = ("a photo of a {c}", "a picture of a {c}", "a drawing of a {c}", "a {c}")
REFERENCES, BACKGROUNDS = 5, 50  # per class, in all
CAPTIONS = (*TEMPLATES, "a {c} on a {g} background", "a photo of a {c} on {g} ground", "the {c}, with {g} behind it", "{c} on a {g} field")


def inside(shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of the plane lie in the shape of radius about 1; above 0 is inside, in units of the radius."""
    r, name = np.hypot(x, y), SHAPES[shape]
    if name == "circle":
        return 0.95 - r
    if name == "square":
        return 0.8 - np.maximum(abs(x), abs(y))
    if name == "triangle":
        return np.minimum(0.55 - y, np.minimum(y * 0.5 + 0.866 * x, y * 0.5 - 0.866 * x) + 0.5)
    if name == "star":
        return 0.72 + 0.33 * np.cos(5 * np.arctan2(x, -y)) - r
    if name == "cross":
        return np.maximum(np.minimum(0.3 - abs(x), 0.95 - abs(y)), np.minimum(0.3 - abs(y), 0.95 - abs(x)))
    return 0.25 - abs(r - 0.7)


def draw(n: int, size: int, rng: np.random.Generator, width: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n images (n, size, width or size, 3) uint8, their classes and their grounds."""
    classes, grounds = rng.integers(len(CLASSES), size=n), rng.integers(len(GROUNDS), size=n)
    return paint(classes, grounds, size, rng, width=width)[0], classes, grounds


def paint(classes: np.ndarray, grounds: np.ndarray, size: int, rng: np.random.Generator,
          bare: bool = False, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, size, width, 3) uint8 of these classes on these grounds, and how much of each pixel (n, size, width, 1) the object covers.

    `bare` grounds have no object. `width` 0 is a square; wider images have more ground to the sides.
    """
    n, width = len(classes), width or size
    across = np.linspace(-width / size, width / size, width, dtype=np.float32)
    y, x = np.meshgrid(np.linspace(-1, 1, size, dtype=np.float32), across, indexing="ij")
    radius = rng.uniform(0.5, 0.8, (n, 1, 1)).astype(np.float32)
    turn = rng.uniform(-0.25, 0.25, (n, 1, 1)).astype(np.float32)
    cx, cy = (rng.uniform(-0.15, 0.15, (2, n, 1, 1))).astype(np.float32)
    u, v = (x - cx) / radius, (y - cy) / radius
    u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    shape = classes % len(SHAPES)
    depth = np.empty_like(u)
    for s in range(len(SHAPES)):
        depth[shape == s] = inside(s, u[shape == s], v[shape == s])
    cover = np.clip(depth * radius * size / 2 + 0.5, 0, 1)[..., None] * (not bare)
    waves = np.sin(x * rng.uniform(2, 9, (n, 1, 1)) + y * rng.uniform(2, 9, (n, 1, 1)) + rng.uniform(0, 6, (n, 1, 1)))
    ground = np.array(list(GROUNDS.values()), np.float32)[grounds][:, None, None] + 14 * waves[..., None].astype(np.float32)
    colour = np.array(list(COLOURS.values()), np.float32)[classes // len(SHAPES)][:, None, None] + rng.normal(0, 10, (n, 1, 1, 3))
    image = cover * colour + (1 - cover) * ground + rng.normal(0, 8, (n, size, width, 1)).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8), cover


def encode(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(file, "JPEG", quality=95, subsampling=0) if format == "jpg" else image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def samples(name: str, n: int, size: int, seed: int, format: str, labelled: bool, per_shard: int = 1000,
            width: int = 0) -> Iterator[dict]:
    """Raw samples of one of the sets; each block of images comes from its own generator."""
    bar = tqdm(total=n, desc=name, unit="image", unit_scale=True, disable=None)
    for first in range(0, n, 500):
        rng = np.random.default_rng(keyed.integer(seed, "toy", name, str(first)))
        count = min(500, n - first)
        for i, (pixels, c, g) in enumerate(zip(*draw(count, size, rng, width), strict=True), first):
            body = {"__key__": f"{i // per_shard:05d}{i % per_shard:04d}", format: encode(pixels, format)}
            if labelled:
                yield body | {"cls": int(c)}
            else:
                caption = CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(c=CLASSES[c], g=list(GROUNDS)[g])
                yield body | {"txt": caption}
        bar.update(count)
    bar.close()


def write_parts(out: Path, size: int, seed: int) -> None:
    """out/references/CLASS/00.png …, whose alpha is the object's mask, and out/backgrounds/000.png …"""
    rng = np.random.default_rng(keyed.integer(seed, "toy", "references"))
    classes = np.arange(len(CLASSES)).repeat(REFERENCES)
    images, cover = paint(classes, rng.integers(len(GROUNDS), size=len(classes)), size, rng)
    masked = np.concatenate([images, np.rint(255 * cover).astype(np.uint8)], axis=-1)
    for c, name in enumerate(CLASSES):
        (out / "references" / name).mkdir(parents=True)
        for i, pixels in enumerate(masked[classes == c]):
            (out / "references" / name / f"{i:02d}.png").write_bytes(encode(pixels, "png"))
    rng = np.random.default_rng(keyed.integer(seed, "toy", "backgrounds"))
    none = np.zeros(BACKGROUNDS, int)
    (out / "backgrounds").mkdir()
    for i, pixels in enumerate(paint(none, rng.integers(len(GROUNDS), size=BACKGROUNDS), size, rng, bare=True)[0]):
        (out / "backgrounds" / f"{i:03d}.png").write_bytes(encode(pixels, "png"))


def main(out: tyro.conf.Positional[str], n: int = 10_000, clean: int = 4_000, test: int = 2_000, size: int = 32, seed: int = 0,
         format: Literal["jpg", "png"] = "jpg", width: int = 0) -> None:
    """Writes the toy shards.

    Args:
        out: Folder to make.
        n: Training pairs.
        clean: Clean pairs for a defender, none of them in training.
        test: Labelled test images; half as many for validation and for retrieval.
        size: Side of the images in pixels.
        seed: Of everything drawn.
        format: Of the image files.
        width: In pixels, where it is not the height.
    """
    if min(n, clean, test // 2) < 1 or size < 8:
        raise BadInput(f"--n {n} --clean {clean} --test {test} --size {size}: all sets need images, of 8 pixels at least")
    if width and width < size:
        raise BadInput(f"--width {width}: must be --size {size} at least, or shapes would be cut off")
    with shards.new_folder(out) as folder:
        for name, count in (("train", n), ("clean", clean), ("pairs", test // 2)):
            shards.write_shards(folder / name, samples(name, count, size, seed, format, labelled=False, width=width))
        for name, count in (("val", test // 2), ("test", test)):
            shards.write_eval_set(folder / name, samples(name, count, size, seed, format, labelled=True, width=width), CLASSES, TEMPLATES)
        write_parts(folder, size, seed)
    print(f"{out}: {n} training pairs, {clean} clean pairs, {test} test images of {len(CLASSES)} classes")


if __name__ == "__main__":
    command(main)
