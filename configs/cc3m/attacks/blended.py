"""1,500 pairs blended with a fifth of one noise picture, as in CleanCLIP, whose code draws it anew for every image
(--poison.trigger.fresh True)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.blended import blended

poison = blended(count=1500)
recipe = replace(clean, name="cc3m/attacks/blended", poison=poison, threat=replace(poison.threat, at="input"), reference=clean)
