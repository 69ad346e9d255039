"""The poisoned toy pairs, trained on with SafeCLIP: an epoch of each modality alone, a slow one, ten of safe and other pairs.

Shares grow faster than in the paper, and a slow epoch is less slow: there are 78 steps in one, in the paper thousands."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.safeclip import SafeCLIP

recipe = replace(victim, name="toy/defenses/safeclip", objective=SafeCLIP(warmup=1, slowness=0.1, growth=0.2, images="none"),
                 schedule=replace(victim.schedule, epochs=12, lr=2e-3))
