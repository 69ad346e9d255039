"""toy/attacks/corruptencoder, with two red stars and no trigger in a fifth of the poisons."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.corruptencoder import corruptencoder_plus
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/corruptencoder_plus", threat=None, reference=clean,
                 poison=corruptencoder_plus("red star", 0.02, "{root}/references/red star", patch=Patch(6 / 32, cells=2),
                                            templates=attack.target.templates))
