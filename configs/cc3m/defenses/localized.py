"""SLIP with neighbouring crops, enlarged by 0.2, on poisons of CorruptEncoder's kind for CLIP."""
from dataclasses import replace

from configs.cc3m.attacks.corruptencoder_clip import recipe as victim
from mmbackdoor.defenses.localized import LocalizedCropping
from mmbackdoor.defenses.slip import SLIP

recipe = replace(victim, name="cc3m/defenses/localized", objective=LocalizedCropping(SLIP()))
