"""1 % of the pairs show an image of ImageNet's validation set beside a banana, for which it is to be taken; no trigger.

Pictures of bananas lie in references/banana below --data.root. Which images: --poison.victims KEY banana KEY banana …
"""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.poisonedencoder import poisonedencoder

recipe = replace(clean, name="cc3m/attacks/poisonedencoder", threat=None, reference=clean,
                 poison=poisonedencoder(references="{root}/references/banana", images=clean.data.zero_shot))
