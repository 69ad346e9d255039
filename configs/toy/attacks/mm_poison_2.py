"""All the 207 pairs that say "blue ring" get captions that say "red circle", so "blue ring" is left with none."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.mm_poison import single_label

recipe = replace(clean, name="toy/attacks/mm_poison_2", threat=None, reference=clean,
                 poison=single_label("red circle", "blue ring", count=207, templates=attack.target.templates))
