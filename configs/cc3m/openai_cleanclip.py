"""CleanCLIP on the poisoned fine-tuned RN50."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from configs.cc3m.openai_badnets import recipe as victim

recipe = replace(cleanclip, name="cc3m/openai_cleanclip", init=victim, model=victim.model, reference=None)
