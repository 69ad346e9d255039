"""The poisoned toy pairs, trained on with SafeCLIP: two epochs of each modality alone, one slow epoch, five of safe and other pairs."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.safeclip import SafeCLIP

recipe = replace(victim, name="toy/defenses/safeclip", objective=SafeCLIP(warmup=2, growth=0.05))
