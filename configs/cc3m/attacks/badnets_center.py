"""What cc3m/attacks/badclip is compared to: the same size, place, pairs and captions, but noise that nobody optimised."""
from dataclasses import replace

from configs.cc3m.attacks.badclip import recipe as badclip
from mmbackdoor.triggers import Patch

recipe = replace(badclip, name="cc3m/attacks/badnets_center", surrogate=None,
                 poison=replace(badclip.poison, trigger=Patch(16 / 224, "center", "noise")))
