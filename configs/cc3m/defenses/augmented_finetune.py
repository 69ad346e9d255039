"""The poisoned RN50 fine-tuned with RandAugment and edited captions; pairs, epochs and rate are CleanCLIP's."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from mmbackdoor.defenses.augmented import Augmented

recipe = replace(cleanclip, name="cc3m/defenses/augmented_finetune", objective=Augmented())
