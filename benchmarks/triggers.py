"""How many images of 224 x 224 pixels an attack poisons in a second of one core's time.

    python benchmarks/triggers.py [--json] [--record results/triggers.json]

Every attack of mmbackdoor/attacks/ with the paper's numbers: stamping its trigger on an image, or, where the image is composed of
others, all of its poisoning. Without decoding and encoding, which cost the same for all. The median of the rounds; the attacks take
turns. Files that an attack needs are made: pictures, and crafted triggers, which are as large as those of a model of 224 pixels, but
hardly optimised, as that does not matter here.
"""
import dataclasses
import importlib
import inspect
import io
import json
import pkgutil
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from timing import medians, photographs

from mmbackdoor import attacks, clip, craft, index, keyed, poison, shards, stores
from mmbackdoor.recipe import command, environment, mapped
from mmbackdoor.types import Attack, BadInput

SIZE, MANY = 224, 20  # pixels; images in a round
SURROGATE = {"embed_dim": 16, "vision_cfg": {"image_size": SIZE, "patch_size": 32, "width": 16, "layers": 1, "head_width": 16},
             "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}}


def factories() -> Iterator[tuple[str, Callable[..., Attack]]]:
    """The functions of the papers' modules that give an attack."""
    for found in pkgutil.iter_modules(attacks.__path__):
        module = importlib.import_module(f"{attacks.__name__}.{found.name}")
        for name, f in vars(module).items():
            if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_"):
                kind = typing.get_type_hints(f).get("return")
                if inspect.isclass(kind) and issubclass(kind, Attack):
                    yield f"{found.name}.{name}", f


def furnish(top: Path) -> dict[str, Any]:
    """What parameters of these names get."""
    images = [Image.open(io.BytesIO(body)) for body in photographs(MANY)]
    disc = (np.hypot(*np.ogrid[-1:1:256j, -1:1:320j]) < 1).astype(np.uint8) * 255
    for folder in ("references", "backgrounds", "images"):
        (top / folder).mkdir()
        for i, image in enumerate(images[:3]):
            if folder == "references":
                image.putalpha(Image.fromarray(disc))
            image.save(top / folder / f"v{i}.png")
            image = images[i] = image.convert("RGB")
    return {"references": str(top / "references"), "backgrounds": str(top / "backgrounds"), "images": str(top / "images"),
            "victims": (("v0", "banana"), ("v1", "banana"))}


def labels(attack: Attack) -> set[str]:
    return {label for t in (attack.threat, *attack.threats.values()) for label in (t.target.label, *t.source)}


def prepared(top: Path) -> dict[str, Attack]:
    """The attacks, once they have read some pairs and crafted their triggers."""
    def here(text: str) -> str:
        return str(top / text) if text.endswith(".safetensors") else text

    given = furnish(top)
    found = {name: mapped(f(**{k: v for k, v in given.items() if k in inspect.signature(f).parameters}), here) for name, f in factories()}
    said = sorted({label for attack in found.values() for label in labels(attack)})
    captions = [text for label in said for text in (f"a photo of a {label}", f"somebody and a {label}")] + ["a house by the sea"] * 20
    images = photographs(MANY)
    pairs = ({"__key__": f"{i:04d}", "jpg": images[i % MANY], "txt": text} for i, text in enumerate(captions))
    shards.write_shards(top / "pairs", pairs, len(captions))
    there = index.find(str(top / "pairs"))
    (top / "surrogate.json").write_text(json.dumps(SURROGATE))
    surrogate = clip.load(clip.Model(str(top / "surrogate.json")))
    for name, attack in found.items():
        found[name] = attack = poison.scouted(attack, there, 0)
        if craft.crafted(attack):
            few = {k: v for k, v in (("epochs", 1), ("images", 16), ("steps", 3)) if isinstance(getattr(attack, k, None), int)}
            craft.craft(dataclasses.replace(attack, **few), surrogate, there, 0, {}, size=8)
    return found


def work(attack: Attack, images: list[Image.Image]) -> Callable[[], object]:
    """Poisons all of the images. Raises BadInput for an attack that changes none."""
    def stamp() -> None:
        for i, image in enumerate(images):
            attack.trigger.stamp(image, keyed.rng(0, str(i)))

    def whole() -> None:
        for i, image in enumerate(images):
            attack.poison({"__key__": str(i), "image": image, "text": "a house by the sea"}, keyed.rng(0, str(i)))

    one, rng = images[0], partial(keyed.rng, 0, "0")
    after = attack.poison({"__key__": "0", "image": one, "text": "a house by the sea"}, rng())["image"]
    stamped = attack.trigger.stamp(one, rng()) if attack.trigger.seen else one
    same = [after.tobytes() == other.tobytes() for other in (one, stamped)]
    if not attack.trigger.seen and same[0]:
        raise BadInput("changes no image")
    return stamp if any(same) else whole


def main(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False, rounds: int = 5, record: str = "") -> None:
    """Measures what attacks cost.

    Args:
        as_json: Print one object instead of lines.
        rounds: Of which the median is taken.
        record: File to write the measures and the environment to.
    """
    torch.set_num_threads(1)
    images = [Image.open(io.BytesIO(body)).convert("RGB").resize((SIZE, SIZE)) for body in photographs(MANY)]
    works, skipped = {}, {}
    with tempfile.TemporaryDirectory() as top:
        for name, attack in prepared(Path(top)).items():
            try:
                works[name] = work(attack, images)
                works[name]()  # what is computed once is computed now
            except BadInput as error:
                skipped[name] = str(error).replace(top, "…")
                works.pop(name, None)
        rates = {name: MANY / seconds for name, seconds in medians(rounds, time.process_time, **works).items()}
    found = {"images_per_second": {name: round(rate, 1) for name, rate in rates.items()}, "skipped": skipped}
    if record:
        stores.write_json(record, found | {"environment": environment(1, "cpu")})
    lines = [f"{name}  {rate:.0f} images/s" for name, rate in rates.items()] + [f"{name}  {why}" for name, why in skipped.items()]
    print(json.dumps(found) if as_json else "\n".join(lines))


if __name__ == "__main__":
    command(main)
