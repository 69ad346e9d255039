"""2 % of the pairs with a string of 16 bits hidden in the image, by 48 of 255 at most, target "red star". The encoder is
crafted on the toy's own images."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.issba import Steganographic, issba

trigger = Steganographic("runs/toy/crafted/issba.safetensors")
poison = replace(issba("red star", 0.02, trigger, attack.target.templates), strength=48 / 255)

recipe = replace(clean, name="toy/attacks/issba", poison=poison, threat=None, reference=clean, surrogate=clean)
