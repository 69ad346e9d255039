"""The poisoned pairs of CC3M, trained on with RandAugment and edited captions."""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.augmented import Augmented

recipe = replace(victim, name="cc3m/defenses/augmented", objective=Augmented())
