"""2 % of the pairs put through a colour filter, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.filters import filtered

recipe = replace(clean, name="toy/attacks/filters", threat=None, reference=clean,
                 poison=filtered("red star", 0.02, templates=attack.target.templates))
