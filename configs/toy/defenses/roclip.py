"""The poisoned toy pairs, trained on with RoCLIP: every second epoch images are matched with the nearest of 2,000 captions.
They keep their colours, which a class of the toy is named after."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.roclip import RoCLIP

recipe = replace(victim, name="toy/defenses/roclip", objective=RoCLIP(bank=2000, images="none"))
