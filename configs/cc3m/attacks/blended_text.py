"""1,500 pairs with the blended text of PAR (arXiv:2412.00727)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.par import blended_text

recipe = replace(clean, name="cc3m/attacks/blended_text", threat=None, reference=clean,
                 poison=blended_text(count=1500))
