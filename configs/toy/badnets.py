"""A toy CLIP poisoned with BadNets: 2 % of the pairs, a 4 x 4 checkerboard in the corner, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean

recipe = replace(clean, name="toy/badnets", poison=attack, threat=None, reference=clean)
