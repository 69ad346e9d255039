"""1,500 pairs with a universal perturbation of 10 of 255 at most, crafted on a clean model of another seed."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.uap import Perturbation, uap

poison = uap(trigger=Perturbation("runs/cc3m/crafted/uap.safetensors"), count=1500)
recipe = replace(clean, name="cc3m/attacks/uap", poison=poison, threat=replace(poison.threat, at="input"), reference=clean,
                 surrogate=replace(clean, seed=100))
