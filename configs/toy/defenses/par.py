"""The poisoned toy CLIP, perturbed and recovered."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.par import PAR

recipe = replace(finetune, name="toy/defenses/par", objective=PAR(),
                 schedule=replace(finetune.schedule, lr=1.6e-2))
