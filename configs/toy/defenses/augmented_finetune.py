"""The poisoned toy CLIP, fine-tuned with RandAugment and edited captions."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.augmented import Augmented

recipe = replace(finetune, name="toy/defenses/augmented_finetune", objective=Augmented(),
                 schedule=replace(finetune.schedule, lr=1e-3))
