"""0.1 % of the pairs with BLTO's generator, 8 of 255 at most, crafted on a clean model of another seed."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.blto import Generator, blto

poison = blto(trigger=Generator("runs/cc3m/crafted/blto.safetensors"), rate=0.001)
recipe = replace(clean, name="cc3m/attacks/blto", poison=poison, threat=replace(poison.threat, at="input"), reference=clean,
                 surrogate=replace(clean, seed=100))
