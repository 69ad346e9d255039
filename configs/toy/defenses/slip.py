"""The poisoned toy pairs, trained on with SLIP: CLIP's loss, and SimCLR's between two crops of 20 to 100 % of the image."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.slip import SLIP

recipe = replace(victim, name="toy/defenses/slip", objective=SLIP(crop=(0.2, 1.0), images="tone", hidden=128, out=64),
                 schedule=replace(victim.schedule, lr=2e-3))
