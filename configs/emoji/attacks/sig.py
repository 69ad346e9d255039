"""2 % of the pairs dimmed and crossed by a sinusoid, target "pizza"."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean
from mmbackdoor.attacks.sig import sig

recipe = replace(clean, name="emoji/attacks/sig", threat=None, reference=clean,
                 poison=sig("pizza", 0.02, templates=attack.target.templates))
