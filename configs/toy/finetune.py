"""The epochs of toy/cleanclip spent on plain fine-tuning, at the learning rate that suits it."""
from dataclasses import replace

from configs.toy.cleanclip import recipe as cleanclip
from mmbackdoor.losses import Clip

recipe = replace(cleanclip, name="toy/finetune", objective=Clip(),
                 schedule=replace(cleanclip.schedule, lr=8e-3))
