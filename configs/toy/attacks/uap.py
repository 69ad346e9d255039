"""A toy CLIP poisoned with a universal perturbation: 2 % of the pairs, 10 of 255 at most, crafted on another clean model."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.uap import Perturbation, uap

poison = replace(uap("red star", 0.02, Perturbation("runs/toy/crafted/uap.safetensors"), attack.target.templates), images=4000, epochs=5)

recipe = replace(clean, name="toy/attacks/uap", poison=poison, threat=None, reference=clean, surrogate=replace(clean, seed=100))
