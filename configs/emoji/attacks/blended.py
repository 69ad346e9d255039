"""2 % of the pairs blended with a fifth of one noise picture, target "pizza"."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean
from mmbackdoor.attacks.blended import blended
from mmbackdoor.triggers import Blend

recipe = replace(clean, name="emoji/attacks/blended", threat=None, reference=clean,
                 poison=blended("pizza", 0.02, Blend(resolution=64), templates=attack.target.templates))
