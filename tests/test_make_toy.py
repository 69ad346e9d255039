"""data_tools/make_toy.py: the same bytes from the same seed, and parts of images that belong to no set."""
from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import load_program
from PIL import Image

from mmbackdoor import layout
from mmbackdoor.shards import read_raw

tool = load_program("data_tools/make_toy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "toy"
    tool.main(str(out), n=20, clean=10, test=20)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made: Path, tmp_path: Path) -> None:
    tool.main(str(tmp_path / "again"), n=20, clean=10, test=20)
    assert files(tmp_path / "again") == files(made)
    tool.main(str(tmp_path / "other"), n=20, clean=10, test=20, seed=1)
    one, two = files(made), files(tmp_path / "other")
    assert all(one[k] != two[k] for k in one if k.endswith(("png", "train/00000.tar")))


def test_what_results_were_recorded_on_is_still_drawn_as_it_was() -> None:
    """Draws in another order or of another kind would void every recorded number."""
    rng = np.random.default_rng(0)
    images, classes, grounds = tool.draw(40, 32, rng)
    assert (classes[:4].tolist(), grounds[:4].tolist(), int(rng.integers(2**31))) == ([40, 30, 24, 12], [2, 0, 0, 0], 978987051)
    assert images[:4].mean((1, 2, 3)) == pytest.approx([206.07, 128.04, 127.38, 125.25], abs=0.1)


def test_there_are_references_of_each_class_with_a_mask_and_backgrounds(made: Path) -> None:
    assert {p.name for p in (made / "references").iterdir()} == set(tool.CLASSES)
    for name in tool.CLASSES:
        paths = layout.files(str(made / "references" / name), "references")
        assert [Path(p).name for p in paths] == [f"{i:02d}.png" for i in range(5)]
        for path in paths:
            with Image.open(path) as image:
                assert image.mode == "RGBA" and image.size == (32, 32)
                rgba = np.asarray(image).astype(int)
            solid = rgba[rgba[..., 3] == 255][:, :3]
            assert 0.05 < (rgba[..., 3] > 127).mean() < 0.8
            assert np.abs(solid.mean(0) - tool.COLOURS[name.split()[0]]).max() < 45  # what the mask shows has the object's colour
    backgrounds = layout.files(str(made / "backgrounds"), "backgrounds")
    assert len(backgrounds) == 50
    for path in backgrounds:
        pixels = np.asarray(layout.whole(path)).astype(float)
        centre = pixels[12:20, 12:20].mean((0, 1))
        assert min(np.abs(centre - ground).max() for ground in tool.GROUNDS.values()) < 30  # no object in the middle


def test_no_reference_is_an_image_of_a_set(made: Path) -> None:
    seen = [np.asarray(Image.open(io.BytesIO(raw["jpg"]))).astype(float) for name in ("train", "clean", "test/test", "val/test")
            for path in sorted((made / name).glob("*.tar")) for raw in read_raw(str(path))]
    for path in layout.files(str(made / "references" / "red star"), "references"):
        picture = np.asarray(layout.whole(path)).astype(float)
        assert min(np.abs(picture - image).mean() for image in seen) > 8  # JPEG changes by 1 or 2
