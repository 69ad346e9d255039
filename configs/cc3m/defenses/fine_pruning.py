"""The poisoned RN50 without half of the units of its last hidden layer, then fine-tuned; pairs, epochs and rate are CleanCLIP's."""
from dataclasses import replace

from configs.cc3m.defenses.finetune import recipe as finetune
from mmbackdoor.defenses.fine_pruning import FinePruning

recipe = replace(finetune, name="cc3m/defenses/fine_pruning", edit=FinePruning(0.5))
