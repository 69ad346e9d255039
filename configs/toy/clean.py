"""The clean reference of the toy experiments: two CPU cores, about a minute."""
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.clip import Model
from mmbackdoor.fit import Schedule
from mmbackdoor.recipe import Data, Recipe
from mmbackdoor.triggers import Patch

data = Data(root="data/toy", train="{root}/train", zero_shot="{root}/test", validation="{root}/val", retrieval="{root}/pairs")
attack = badnets("red star", rate=0.02, patch=Patch(4 / 32, "bottom-right", cells=2),
                 templates=("a photo of a {}", "a picture of a {}", "a drawing of a {}", "a {}"))

recipe = Recipe("toy/clean", data, Model("configs/toy/rn_tiny.json"), threat=attack.threat, batch_size=128, workers=0,
                schedule=Schedule(epochs=8, lr=1e-3, wd=0.1, warmup=50, beta2=0.98, eps=1e-6))
