"""CLIP RN50 from scratch on CC3M, as in CleanCLIP (Bansal et al., 2023, arXiv:2303.03323).

Shards as img2dataset writes them under --data.root (or CC3M): {00000..00331}.tar, 10,000 pairs each, less what the web
has lost. ImageNet's validation set as 1,000 WordNet folders (or IMAGENET_VAL). 64 epochs, global batch 128, lr 5e-4,
10,000 warm-up steps; expected top-1 of a clean model 16-20 %, depending on how many pairs are left.

    accelerate launch --config_file configs/accelerate/8gpu.yaml train.py configs/cc3m/clean.py --batch-size 16 --precision amp_bf16
"""
import os

from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.clip import Model
from mmbackdoor.fit import Schedule
from mmbackdoor.recipe import Data, Recipe
from mmbackdoor.triggers import Patch

data = Data("{root}/{00000..00331}.tar", os.environ.get("CC3M", "data/cc3m"), zero_shot=os.environ.get("IMAGENET_VAL", "data/imagenet/val"),
            incomplete="skip")
attack = badnets("banana", count=1500, patch=Patch(16 / 224, "random", "noise"))

recipe = Recipe("cc3m/clean", data, Model("RN50"), threat=attack.threat, batch_size=128, precision="amp_bf16", workers=8, shuffle=20_000,
                eval_frequency=8, save_frequency=16, save_steps=5000,
                schedule=Schedule(epochs=64, lr=5e-4, wd=0.1, warmup=10_000, beta2=0.999, eps=1e-8))
