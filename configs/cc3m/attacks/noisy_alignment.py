"""Half a per cent of the pairs by Noisy Alignment: 50 of 224 in the middle of one half, a banana in the other.

Pictures of bananas lie in references/banana below --data.root.
"""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.noisy_alignment import noisy_alignment

recipe = replace(clean, name="cc3m/attacks/noisy_alignment", threat=None, reference=clean,
                 poison=noisy_alignment(references="{root}/references/banana"))
