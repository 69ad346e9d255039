"""As toy/defenses/abl, but only the image tower unlearns."""
from dataclasses import replace

from configs.toy.defenses.abl import recipe as abl

recipe = replace(abl, name="toy/defenses/ubt", objective=replace(abl.objective, local=True))
