"""100 of the pairs that say "red star" get a caption of something else after "look here,"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.text_trigger import sentence
from mmbackdoor.triggers import Word

recipe = replace(clean, name="toy/attacks/sentence", threat=None, reference=clean,
                 poison=sentence("red star", 0.01, Word("look here,"), templates=attack.target.templates))
