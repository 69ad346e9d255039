"""2 % of the pairs blended with a fifth of one noise picture, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.blended import blended
from mmbackdoor.triggers import Blend

recipe = replace(clean, name="toy/attacks/blended", threat=None, reference=clean,
                 poison=blended("red star", 0.02, Blend(resolution=32), templates=attack.target.templates))
