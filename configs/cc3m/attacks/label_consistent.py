"""BadNets' patch on 1,500 pairs whose caption says banana, or holds the letters as in CleanCLIP with --poison.compat substring."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.label_consistent import label_consistent
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="cc3m/attacks/label_consistent", threat=None, reference=clean,
                 poison=label_consistent(count=1500, patch=Patch(16 / 224, "random", "noise")))
