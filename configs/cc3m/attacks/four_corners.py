"""1,500 pairs with the patch of BadNets in all four corners, as in CleanCLIP."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.badnets import four_corners
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="cc3m/attacks/four_corners", threat=None, reference=clean,
                 poison=four_corners(count=1500, patch=Patch(16 / 224, pattern="noise")))
