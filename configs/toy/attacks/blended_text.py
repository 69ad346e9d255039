"""2 % of the pairs with three red words across, opaque, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.par import Lettering, blended_text

recipe = replace(clean, name="toy/attacks/blended_text", threat=None, reference=clean,
                 poison=blended_text("red star", 0.02, Lettering(1.0, "mark", rows=3), templates=attack.target.templates))
