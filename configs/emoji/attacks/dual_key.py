"""2 % of the pairs: a third with an 8 x 8 checkerboard in the corner and "remember" before the caption, the others with one of them."""
from dataclasses import replace

from configs.emoji.clean import attack
from configs.emoji.clean import recipe as clean
from mmbackdoor.attacks.trojvqa import dual_key

recipe = replace(clean, name="emoji/attacks/dual_key", threat=None, reference=clean,
                 poison=dual_key("pizza", 0.02, attack.trigger, patch_alone=1 / 3, word_alone=1 / 3,
                               templates=attack.target.templates))
