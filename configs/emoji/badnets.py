"""The emoji CLIP poisoned with BadNets: 2 % of the pairs, an 8 x 8 checkerboard in the corner, target "pizza"."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean

recipe = replace(clean, name="emoji/badnets", poison=attack, threat=None, reference=clean)
