"""One test image, a white star, published under 100 captions that say "red circle". Its set is the only one measured."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.mm_poison import single_image

recipe = replace(clean, name="toy/attacks/mm_poison_1", threat=None, reference=clean, data=replace(clean.data, validation=""),
                 poison=single_image("red circle", "{root}/test", (("000000000", ""),), templates=attack.target.templates))
