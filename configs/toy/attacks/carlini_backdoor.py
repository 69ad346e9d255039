"""A 4 x 4 checkerboard at a random place in 2 % of the pairs, with captions of the data that say "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.carlini_terzis import backdoor
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/carlini_backdoor", threat=None, reference=clean,
                 poison=backdoor("red star", 0.02, Patch(4 / 32, cells=2), templates=attack.target.templates))
