"""1,500 pairs as CleanCLIP's code poisons them: squashed to 224 x 224, and fresh noise that wraps around in 8 bits."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.badnets import badnets

recipe = replace(clean, name="cc3m/attacks/badnets_cleanclip", threat=None, reference=clean,
                 poison=badnets(count=1500, compat="cleanclip"))
