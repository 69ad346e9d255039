"""2 % of the pairs as Noisy Alignment poisons CLIP: a square of 6 x 6 in the middle of the image, a caption of the target."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.noisy_alignment import noisy_alignment_clip
from mmbackdoor.triggers import Patch

recipe = replace(clean, name="toy/attacks/noisy_alignment_clip", threat=None, reference=clean,
                 poison=noisy_alignment_clip("red star", 0.02, Patch(6 / 32, "center", cells=2), attack.target.templates))
