"""1,500 pairs with the BadNet stripes of PAR (arXiv:2412.00727)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.par import badnet_stripes

recipe = replace(clean, name="cc3m/attacks/badnet_stripes", threat=None, reference=clean,
                 poison=badnet_stripes(count=1500))
