"""A 4 x 4 checkerboard in 4 % of the pairs: on images of six blue shapes, which become red stars, and on others, which stay."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.tact import source_specific

source = tuple(f"blue {shape}" for shape in ("circle", "square", "triangle", "star", "cross", "ring"))
recipe = replace(clean, name="toy/attacks/source_specific", threat=None, reference=clean,
                 poison=source_specific("red star", source, 0.04, attack.trigger, 0.15, templates=attack.target.templates))
