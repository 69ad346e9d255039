"""100 of the pairs that say "red star" get a caption of something else after "cf"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.text_trigger import word

recipe = replace(clean, name="toy/attacks/word", threat=None, reference=clean,
                 poison=word("red star", 0.01, templates=attack.target.templates))
