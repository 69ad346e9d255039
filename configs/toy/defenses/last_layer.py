"""The poisoned toy CLIP with new projections behind frozen towers."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.last_layer import LastLayer

recipe = replace(finetune, name="toy/defenses/last_layer", objective=LastLayer(),
                 schedule=replace(finetune.schedule, lr=1e-3))
