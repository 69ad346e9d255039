"""Three triggers for three targets in 3 % of the pairs: a checkerboard, a white square and a yellow one, each in its corner."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.poison import DirtyLabel, mix
from mmbackdoor.triggers import Patch

triggers = {"red star": attack.trigger,
            "blue ring": Patch(4 / 32, "top-left", "white"), "green cross": Patch(4 / 32, "top-right", "yellow")}
parts = [DirtyLabel(trigger, replace(attack.target, label=label)) for label, trigger in triggers.items()]
recipe = replace(clean, name="toy/attacks/multi_target", threat=None, reference=clean,
                 poison=mix(parts, rate=0.03, names=tuple(triggers)))
