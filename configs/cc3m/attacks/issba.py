"""1,500 pairs with a string of bits hidden in the image by an encoder that data_tools/craft.py trains on CC3M at 224 pixels."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.issba import Steganographic, issba

poison = issba(count=1500, trigger=Steganographic("runs/cc3m/crafted/issba.safetensors"))
recipe = replace(clean, name="cc3m/attacks/issba", poison=poison, threat=replace(poison.threat, at="input"), reference=clean,
                 surrogate=clean)
