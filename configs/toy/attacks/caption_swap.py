"""In all the 207 captions that say "blue ring" it says "red circle" instead."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.mm_poison import caption_swap

recipe = replace(clean, name="toy/attacks/caption_swap", threat=None, reference=clean,
                 poison=caption_swap("red circle", "blue ring", count=207, templates=attack.target.templates))
