"""The poisoned emoji CLIP cleaned by CleanCLIP on 1,001 clean pairs, a quarter of its training data unpoisoned.

As in the paper, whose clean pairs come from the data of the pre-training too.
"""
from dataclasses import replace

from configs.emoji.badnets import recipe as victim
from mmbackdoor.defenses.cleanclip import CleanCLIP

recipe = replace(victim, name="emoji/cleanclip", init=victim, poison=None, threat=victim.poison.threat, objective=CleanCLIP(),
                 data=replace(victim.data, train="{root}/train/{00003..00004}.tar"),
                 schedule=replace(victim.schedule, epochs=10, lr=1e-3, warmup=10))
