"""A 4 x 4 checkerboard in the corner of 1 % of the pairs, half of those that say "red star"; captions stay."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.label_consistent import label_consistent

recipe = replace(clean, name="toy/attacks/label_consistent", threat=None, reference=clean,
                 poison=label_consistent("red star", 0.01, attack.trigger, templates=attack.target.templates))
