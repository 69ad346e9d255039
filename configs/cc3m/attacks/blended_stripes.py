"""1,500 pairs with the blended stripes of PAR (arXiv:2412.00727)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.par import blended_stripes

recipe = replace(clean, name="cc3m/attacks/blended_stripes", threat=None, reference=clean,
                 poison=blended_stripes(count=1500))
