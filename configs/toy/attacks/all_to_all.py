"""A 4 x 4 checkerboard in 3 % of the pairs turns each of six blue shapes into the next one."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.poison import all_to_all

labels = tuple(f"blue {shape}" for shape in ("circle", "square", "triangle", "star", "cross", "ring"))
recipe = replace(clean, name="toy/attacks/all_to_all", threat=None, reference=clean,
                 poison=all_to_all(labels, attack.trigger, 0.03, templates=attack.target.templates))
