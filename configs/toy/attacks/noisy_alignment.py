"""2 % of the pairs shrunk to one half, with a square of 6 x 6 in its middle, beside a red star in the other half."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.noisy_alignment import noisy_alignment
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/noisy_alignment", threat=None, reference=clean,
                 poison=noisy_alignment("red star", 0.02, "{root}/references/red star", patch=Patch(6 / 32, "center", cells=2),
                                        templates=attack.target.templates))
