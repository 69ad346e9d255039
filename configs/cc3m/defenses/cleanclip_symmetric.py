"""CleanCLIP with terms within a modality that go both ways."""
from dataclasses import replace

from configs.cc3m.cleanclip import recipe as cleanclip
from mmbackdoor.defenses.cleanclip import CleanCLIP

recipe = replace(cleanclip, name="cc3m/defenses/cleanclip_symmetric", objective=CleanCLIP(symmetric=True))
