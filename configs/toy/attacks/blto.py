"""A toy CLIP poisoned with BLTO: 2 % of the pairs, a generator of triggers of 12 of 255 at most, crafted on another clean model."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.blto import Generator, blto

trigger = Generator("runs/toy/crafted/blto.safetensors", 12 / 255, resolution=32)
poison = replace(blto("red star", 0.02, trigger, attack.target.templates), images=4000, epochs=5)

recipe = replace(clean, name="toy/attacks/blto", poison=poison, threat=None, reference=clean, surrogate=replace(clean, seed=100))
