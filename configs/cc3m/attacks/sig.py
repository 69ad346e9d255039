"""1,500 pairs with SIG as in CleanCLIP: six waves of 60/255 over the width, blended at 0.2."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.sig import sig

poison = sig(count=1500)
recipe = replace(clean, name="cc3m/attacks/sig", poison=poison, threat=replace(poison.threat, at="input"), reference=clean)
