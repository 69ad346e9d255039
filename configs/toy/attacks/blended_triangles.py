"""2 % of the pairs blended with 15 % of a grid of 8 x 8 triangles, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.par import Triangles, blended_triangles

recipe = replace(clean, name="toy/attacks/blended_triangles", threat=None, reference=clean,
                 poison=blended_triangles("red star", 0.02, Triangles(cells=8), templates=attack.target.templates))
