"""As cc3m/defenses/abl, but only the image tower unlearns, a tenth of a per cent of the pairs."""
from dataclasses import replace

from configs.cc3m.defenses.abl import recipe as abl

recipe = replace(abl, name="cc3m/defenses/ubt", objective=replace(abl.objective, local=True, share=0.001))
