"""SLIP with neighbouring crops, enlarged by 0.2, on poisons of CorruptEncoder's kind for CLIP; beside it, the two crops drawn apart.

    python bench.py configs/cc3m/defenses/localized.py
"""
from dataclasses import replace

from configs.cc3m.attacks.corruptencoder_clip import recipe as victim
from mmbackdoor.defenses.localized import LocalizedCropping
from mmbackdoor.defenses.slip import SLIP
from mmbackdoor.recipe import Suite

apart = replace(victim, name="cc3m/defenses/localized-apart", objective=SLIP(crop=(0.2, 1.0)))
recipe = replace(victim, name="cc3m/defenses/localized", objective=LocalizedCropping(SLIP()))
suite = Suite("cc3m/defenses/localized", (apart, recipe))
