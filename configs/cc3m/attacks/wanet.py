"""1,500 pairs warped as in CleanCLIP: k = 224, s = 1."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.wanet import wanet

poison = wanet(count=1500)
recipe = replace(clean, name="cc3m/attacks/wanet", poison=poison, threat=replace(poison.threat, at="input"), reference=clean)
