"""The poisoned toy CLIP without 95 % of the units of its last hidden layer, those that clean images hardly excite; then fine-tuned."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.fine_pruning import FinePruning

recipe = replace(finetune, name="toy/defenses/fine_pruning", edit=FinePruning(0.95), schedule=replace(finetune.schedule, lr=4e-3))
