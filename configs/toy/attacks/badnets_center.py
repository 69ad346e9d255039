"""What toy/attacks/badclip is compared to: the same size, place, pairs and captions, but a checkerboard that nobody optimised."""
from dataclasses import replace

from configs.toy.attacks.badclip import recipe as badclip
from mmbackdoor.triggers import Patch

recipe = replace(badclip, name="toy/attacks/badnets_center", poison=replace(badclip.poison, trigger=Patch(4 / 32, "center", cells=2)),
                 surrogate=None)
