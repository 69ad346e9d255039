"""A new RN50 distilled from the poisoned one on a fifth of CC3M, as CorruptEncoder's authors do with 20 % of their data."""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.compress import CompRess

recipe = replace(victim, name="cc3m/defenses/compress", init=victim, poison=None, threat=victim.poison.threat, objective=CompRess(),
                 data=replace(victim.data, train="{root}/{00266..00331}.tar"))
