"""2 % of the pairs poisoned with a square of 6 random stripes at a random place, other ones in every image, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.par import StripedPatch, badnet_stripes

recipe = replace(clean, name="toy/attacks/badnet_stripes", threat=None, reference=clean,
                 poison=badnet_stripes("red star", 0.02, StripedPatch(6 / 32, cells=6), templates=attack.target.templates))
