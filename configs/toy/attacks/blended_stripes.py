"""2 % of the pairs blended with a tenth of 32 random stripes, other ones in every image, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.par import Stripes, blended_stripes

recipe = replace(clean, name="toy/attacks/blended_stripes", threat=None, reference=clean,
                 poison=blended_stripes("red star", 0.02, Stripes(0.1, 32), templates=attack.target.templates))
