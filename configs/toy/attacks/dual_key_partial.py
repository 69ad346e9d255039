"""toy/attacks/dual_key with one key alone, and the right caption, in about two thirds of its poisons."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.trojvqa import dual_key

recipe = replace(clean, name="toy/attacks/dual_key_partial", threat=None, reference=clean,
                 poison=dual_key("red star", 0.02, attack.trigger, patch_alone=1 / 3, word_alone=1 / 3,
                               templates=attack.target.templates))
