"""A poisoned toy CLIP with a ViT, then 4 learned tokens in every block: 50 epochs on 400 clean pairs. Towers stay as they are."""
from dataclasses import replace

from configs.toy.badnets import recipe as badnets
from configs.toy.clean import recipe as clean
from mmbackdoor.clip import Model
from mmbackdoor.defenses.rvpt import RVPT

VIT = Model("configs/toy/vit_tiny.json")
longer = replace(clean.schedule, epochs=16)  # it learns more slowly than the toy's ResNet
reference = replace(clean, name="toy/defenses/clean-vit", model=VIT, schedule=longer)
victim = replace(badnets, name="toy/defenses/victim-vit", model=VIT, schedule=longer, reference=reference)
recipe = replace(victim, name="toy/defenses/rvpt", init=victim, poison=None, threat=victim.poison.threat, objective=RVPT(n=4),
                 data=replace(victim.data, train="{root}/clean", share=0.1), batch_size=64,
                 schedule=replace(victim.schedule, epochs=50, lr=2e-3, wd=0.0, warmup=0))
