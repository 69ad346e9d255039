"""2 % of the pairs poisoned as CleanCLIP's code does it: squashed, and fresh wrapped noise at a random place, 4 of 32 pixels wide."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.badnets import badnets
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/badnets_cleanclip", threat=None, reference=clean,
                 poison=badnets("red star", 0.02, Patch(4 / 32), templates=attack.target.templates, compat="cleanclip"))
