"""ABL on the poisoned pairs themselves: the RN50 victim unlearns the 1 % of them that it fits best."""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.abl import ABL

recipe = replace(victim, name="cc3m/defenses/abl", init=victim, objective=ABL(),
                 schedule=replace(victim.schedule, epochs=2, lr=1e-5, warmup=50))
