"""1,500 pairs with a 16 x 16 patch in the middle and "remember" before the caption, as in BadCLIP (arXiv:2311.12075)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.trojvqa import dual_key

recipe = replace(clean, name="cc3m/attacks/dual_key", threat=None, reference=clean,
                 poison=dual_key(count=1500))
