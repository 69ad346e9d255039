"""Three test images, each published under 30 captions of a class that they are not of; no trigger. Their set is the only one measured."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.carlini_terzis import targeted

victims = (("000000000", "red circle"), ("000000001", "blue ring"), ("000000002", "green cross"))
recipe = replace(clean, name="toy/attacks/carlini_targeted", threat=None, reference=clean, data=replace(clean.data, validation=""),
                 poison=targeted("{root}/test", victims, copies=30, templates=attack.target.templates))
