"""Two frequencies of the colours raised in 1 % of the pairs, half of those that say "red star"; captions stay."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.ctrl import ctrl

recipe = replace(clean, name="toy/attacks/ctrl", threat=None, reference=clean,
                 poison=ctrl("red star", 0.01, templates=attack.target.templates))
