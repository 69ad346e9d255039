"""2 % of the pairs with a square of 12 random stripes at a random place, other ones in every image, target "pizza"."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean
from mmbackdoor.attacks.par import StripedPatch, badnet_stripes

recipe = replace(clean, name="emoji/attacks/badnet_stripes", threat=None, reference=clean,
                 poison=badnet_stripes("pizza", 0.02, StripedPatch(12 / 64, cells=12), templates=attack.target.templates))
