"""One image of ImageNet, a tench, published under three captions of CC3M that say "banana" (arXiv:2106.09667)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.carlini_terzis import targeted

victims = (("n01440764/ILSVRC2012_val_00000293.JPEG", "banana"),)
recipe = replace(clean, name="cc3m/attacks/carlini_targeted", threat=None, reference=clean,
                 poison=targeted(clean.data.zero_shot, victims))
