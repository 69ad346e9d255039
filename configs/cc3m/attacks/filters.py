"""0.1 % of the pairs put through a colour filter, the rate of the detection study of Huang et al. (arXiv:2502.01385)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.filters import filtered

recipe = replace(clean, name="cc3m/attacks/filters", threat=None, reference=clean,
                 poison=filtered(rate=0.001))
