"""Three triggers for one target in 3 % of the pairs: a checkerboard, a white square, blended noise."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.poison import DirtyLabel, mix
from mmbackdoor.triggers import Blend, Patch

triggers = {"checkerboard": attack.trigger, "white square": Patch(4 / 32, "top-left", "white"), "noise": Blend(0.2, resolution=32)}
recipe = replace(clean, name="toy/attacks/multi_trigger", threat=None, reference=clean,
                 poison=mix([DirtyLabel(trigger, attack.target) for trigger in triggers.values()], rate=0.03, names=tuple(triggers)))
