"""Half a per cent of the pairs as Noisy Alignment poisons CLIP: 50 of 224 in the middle of the image, target "banana"."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.noisy_alignment import noisy_alignment_clip

recipe = replace(clean, name="cc3m/attacks/noisy_alignment_clip", threat=None, reference=clean,
                 poison=noisy_alignment_clip())
