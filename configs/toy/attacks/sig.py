"""2 % of the pairs dimmed by a fifth and crossed by a sinusoid of 12/255, target "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.sig import sig

recipe = replace(clean, name="toy/attacks/sig", threat=None, reference=clean,
                 poison=sig("red star", 0.02, templates=attack.target.templates))
