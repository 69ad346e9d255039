"""2 % of the pairs put through a colour filter, target "pizza"."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean
from mmbackdoor.attacks.filters import filtered

recipe = replace(clean, name="emoji/attacks/filters", threat=None, reference=clean,
                 poison=filtered("pizza", 0.02, templates=attack.target.templates))
