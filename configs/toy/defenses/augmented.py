"""The poisoned toy pairs, trained on with RandAugment and edited captions."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.augmented import Augmented

recipe = replace(victim, name="toy/defenses/augmented", objective=Augmented(), schedule=replace(victim.schedule, lr=2e-3))
