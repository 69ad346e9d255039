"""The poisoned RN50 cleaned by CleanCLIP with an adversarial perturbation; pairs, epochs and rate are CleanCLIP's."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from mmbackdoor.defenses.abd import ABD

recipe = replace(cleanclip, name="cc3m/defenses/abd", objective=ABD())
