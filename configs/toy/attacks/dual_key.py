"""About 1 % of the pairs with a 4 x 4 checkerboard in the corner and "remember" before a caption of the target, and
about 1 % with the word alone."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.trojvqa import dual_key

recipe = replace(clean, name="toy/attacks/dual_key", threat=None, reference=clean,
                 poison=dual_key("red star", 0.02, attack.trigger, word_alone=0.5, templates=attack.target.templates))
