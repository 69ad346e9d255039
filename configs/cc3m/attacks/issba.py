"""1,500 pairs with a string of bits hidden in the image by an encoder that data_tools/craft.py trains on CC3M at 224 pixels."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.issba import Steganographic, issba

recipe = replace(clean, name="cc3m/attacks/issba", threat=None, reference=clean, surrogate=clean,
                 poison=issba(count=1500, trigger=Steganographic("runs/cc3m/crafted/issba.safetensors")))
