"""2 % of the pairs warped by half a pixel on average, each pixel on its own, target "pizza"."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean
from mmbackdoor.attacks.wanet import Warp, wanet

recipe = replace(clean, name="emoji/attacks/wanet", threat=None, reference=clean,
                 poison=wanet("pizza", 0.02, Warp(k=64, s=1, size=64), templates=attack.target.templates))
