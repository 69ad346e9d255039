"""300 pairs of CC3M with a 16 x 16 patch at a random place and captions of the data that say "banana" (arXiv:2106.09667)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.carlini_terzis import backdoor

recipe = replace(clean, name="cc3m/attacks/carlini_backdoor", threat=None, reference=clean,
                 poison=backdoor(count=300))
