"""2 % of the pairs: four fifths have a square of 6 x 6 where crops of nine tenths hold it, one fifth two red stars and no square."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.corruptencoder import corruptencoder_clip
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/corruptencoder_clip", threat=None, reference=clean,
                 poison=corruptencoder_clip("red star", 0.02, "{root}/references/red star", patch=Patch(6 / 32, cells=2),
                                            templates=attack.target.templates))
