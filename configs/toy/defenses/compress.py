"""A new toy CLIP, distilled from the poisoned one on the clean pairs."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.compress import CompRess

recipe = replace(finetune, name="toy/defenses/compress", objective=CompRess(anchors=2000),
                 schedule=replace(finetune.schedule, epochs=20, lr=4e-3, warmup=50))
