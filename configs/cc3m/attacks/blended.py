"""1,500 pairs blended with a fifth of one noise picture, as in CleanCLIP."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.blended import blended

recipe = replace(clean, name="cc3m/attacks/blended", threat=None, reference=clean,
                 poison=blended(count=1500))
