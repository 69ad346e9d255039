"""2 % of the pairs poisoned with a 3 x 3 checkerboard in every corner, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.badnets import four_corners
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/four_corners", threat=None, reference=clean,
                 poison=four_corners("red star", 0.02, Patch(3 / 32, cells=3), templates=attack.target.templates))
