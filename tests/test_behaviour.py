"""The claim in seconds: the attack raises ASR, clean data do not, CleanCLIP lowers it, and accuracy holds throughout."""
import io
from functools import partial

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from mmbackdoor import clip, evaluate, fit, sets, shards
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.index import find
from mmbackdoor.losses import Clip
from mmbackdoor.poison import plan, poison
from mmbackdoor.stream import Stream
from mmbackdoor.triggers import Patch

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50), "purple": (140, 60, 180),
           "white": (235, 235, 235), "brown": (120, 80, 40), "cyan": (60, 200, 210)}
TEMPLATES = ("a {c} thing", "something {c}", "{c}")


def pairs(n, seed, labelled=False):
    """Noisy sheets of one colour."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        c = int(rng.integers(len(COLOURS)))
        name, colour = list(COLOURS.items())[c]
        file = io.BytesIO()
        noisy = np.array(colour) + rng.normal(0, 25, (1, 1, 3)) + rng.normal(0, 20, (32, 32, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        caption = TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(c=name)
        yield {"__key__": f"{seed:04d}{i:05d}", "png": file.getvalue()} | ({"cls": c} if labelled else {"txt": caption})


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Zero-shot metrics of a clean, a poisoned and a cleaned model."""
    folder = tmp_path_factory.mktemp("behaviour")
    for name, n, seed in (("train", 3000, 1), ("fresh", 1500, 2)):
        shards.write_shards(folder / name, pairs(n, seed))
    shards.write_eval_set(folder / "test", pairs(400, 3, labelled=True), list(COLOURS), [t.replace("{c}", "{c}") for t in TEMPLATES])
    attack = badnets("red", rate=0.02, patch=Patch(8 / 32, "bottom-right", cells=2), templates=tuple(t.format(c="{}") for t in TEMPLATES))

    def train(name, data, objective, epochs, attack=None, init=None, lr=2e-3):
        net = clip.load(clip.Model(tiny_model), init)
        index = find(str(folder / data))
        stages = [partial(poison, attack=attack, plan=plan(attack, index, 0))] if attack else []
        stream = Stream(index, net, objective.views, 50, stages)
        fit.fit(net, objective, stream, Accelerator(cpu=True), fit.Schedule(epochs=epochs, lr=lr, wd=0.1, warmup=20), folder / name)
        net.save(folder / name)
        return evaluate.zero_shot(net, sets.open_set(folder / "test"), threat)

    threat = attack.threat
    return {"clean": train("clean", "train", Clip(), 6), "poisoned": train("poisoned", "train", Clip(), 6, attack),
            "cleaned": train("cleaned", "fresh", CleanCLIP(), 6, init=folder / "poisoned")}


def test_accuracy_holds(models):
    assert all(m["accuracy"] >= 0.9 for m in models.values()), {k: m["accuracy"] for k, m in models.items()}


def test_the_attack_raises_asr_and_clean_data_do_not(models):
    assert models["clean"]["asr"] <= 0.05 and models["poisoned"]["asr"] >= 0.9


def test_cleanclip_lowers_asr(models):
    assert models["cleaned"]["asr"] <= 0.5 * models["poisoned"]["asr"]
