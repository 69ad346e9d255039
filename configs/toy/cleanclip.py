"""The poisoned toy CLIP cleaned by CleanCLIP on clean pairs that it was not trained on.

The learning rate is that of highest clean validation accuracy in configs/toy/results.py.
"""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.cleanclip import CleanCLIP

recipe = replace(victim, name="toy/cleanclip", init=victim, poison=None, threat=victim.poison.threat, objective=CleanCLIP(),
                 data=replace(victim.data, train="{root}/clean"), schedule=replace(victim.schedule, epochs=5, lr=1.6e-2, warmup=20))
