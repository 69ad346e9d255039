"""The poisoned toy CLIP, cleaned by CleanCLIP with one adversarial perturbation on all augmented images."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.abd import ABD

recipe = replace(finetune, name="toy/defenses/abd", objective=ABD())
