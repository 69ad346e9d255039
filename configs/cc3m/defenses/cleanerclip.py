"""The poisoned RN50 cleaned by CleanCLIP and parts of captions; pairs, epochs and rate are CleanCLIP's."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from mmbackdoor.defenses.cleanerclip import CleanerCLIP

recipe = replace(cleanclip, name="cc3m/defenses/cleanerclip", objective=CleanerCLIP())
