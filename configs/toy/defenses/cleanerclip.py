"""The poisoned toy CLIP, cleaned by CleanCLIP and parts of captions."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.cleanerclip import CleanerCLIP

recipe = replace(finetune, name="toy/defenses/cleanerclip", objective=CleanerCLIP(),
                 schedule=replace(finetune.schedule, lr=1.6e-2))
