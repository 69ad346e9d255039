"""2 % of the pairs composed of a red star, a square of 6 x 6 in what remains, and the pair's own image behind."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.corruptencoder import corruptencoder
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/corruptencoder", threat=None, reference=clean,
                 poison=corruptencoder("red star", 0.02, "{root}/references/red star", patch=Patch(6 / 32, cells=2),
                                       templates=attack.target.templates))
