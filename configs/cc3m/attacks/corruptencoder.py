"""Half a per cent of the pairs composed as by CorruptEncoder: a square of 40 of 224, target "banana".

Three pictures of bananas, whose alpha is the object's mask, in references/banana below --data.root; backgrounds in
backgrounds, the paper takes 650, or --poison.backgrounds "" for each pair's own image.
"""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.corruptencoder import corruptencoder

recipe = replace(clean, name="cc3m/attacks/corruptencoder", threat=None, reference=clean,
                 poison=corruptencoder(references="{root}/references/banana", backgrounds="{root}/backgrounds"))
