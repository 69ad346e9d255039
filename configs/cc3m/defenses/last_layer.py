"""The poisoned RN50 with new projections behind frozen towers; pairs and epochs are CleanCLIP's, the rate that of training."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from mmbackdoor.defenses.last_layer import LastLayer

recipe = replace(cleanclip, name="cc3m/defenses/last_layer", objective=LastLayer(), schedule=replace(cleanclip.schedule, lr=5e-4))
