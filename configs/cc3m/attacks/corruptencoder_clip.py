"""1,500 pairs: four fifths have a square of 16 of 224 where open_clip's crops hold it, one fifth two bananas; compare cc3m/badnets.

Pictures of bananas, whose alpha is the object's mask, lie in references/banana below --data.root.
"""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.corruptencoder import corruptencoder_clip

recipe = replace(clean, name="cc3m/attacks/corruptencoder_clip", threat=None, reference=clean,
                 poison=corruptencoder_clip(count=1500, references="{root}/references/banana"))
