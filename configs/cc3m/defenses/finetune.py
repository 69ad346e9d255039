"""The poisoned RN50 fine-tuned on 100,000 clean pairs, all else as CleanCLIP's: what every cleaning is compared to."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from mmbackdoor.losses import Clip

recipe = replace(cleanclip, name="cc3m/defenses/finetune", objective=Clip())
