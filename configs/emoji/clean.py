"""A plain CLIP on real drawings: 4,001 emoji with captions, evaluated on the artist it did not see, 1,609 concepts.

The data: `python data_tools/make_emoji.py CHECKOUT data/emoji`; --data.root or MMBACKDOOR_EMOJI says where they are.
About four minutes on two cores.
"""
import os

from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.clip import Model
from mmbackdoor.fit import Schedule
from mmbackdoor.recipe import Data, Recipe
from mmbackdoor.triggers import Patch

root = os.environ.get("MMBACKDOOR_EMOJI") or ("../shared/real" if os.path.isdir("../shared/real") else "data/emoji")
data = Data("{root}/train", root, zero_shot="{root}/concepts")
attack = badnets("pizza", rate=0.02, patch=Patch(8 / 64, "bottom-right"),
                 templates=("{}", "an emoji of {}", "a picture of {}", "icon showing {}"))

recipe = Recipe("emoji/clean", data, Model("configs/emoji/rn_small.json"), threat=attack.threat, batch_size=100,
                workers=0, eval_frequency=4, schedule=Schedule(epochs=20, lr=1e-3, wd=0.1, warmup=40))
