"""The same budget as toy/cleanclip, spent on plain fine-tuning."""
from dataclasses import replace

from configs.toy.cleanclip import recipe as cleanclip
from mmbackdoor.losses import Clip

recipe = replace(cleanclip, name="toy/finetune", objective=Clip())
