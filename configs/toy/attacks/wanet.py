"""2 % of the pairs warped by a pixel and a half on average, each pixel on its own, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.wanet import Warp, wanet

recipe = replace(clean, name="toy/attacks/wanet", threat=None, reference=clean,
                 poison=wanet("red star", 0.02, Warp(k=32, s=3, size=32), templates=attack.target.templates))
