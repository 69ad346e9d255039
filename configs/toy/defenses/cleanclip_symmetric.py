"""The poisoned toy CLIP, cleaned by CleanCLIP with terms within a modality that go both ways."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.cleanclip import CleanCLIP

recipe = replace(finetune, name="toy/defenses/cleanclip_symmetric", objective=CleanCLIP(symmetric=True))
