"""The poisoned toy CLIP on the poisoned pairs that it learned from, of which the 2 % that it fits best are unlearned, as many as are
poisoned, which a defender does not know."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.abl import ABL

recipe = replace(victim, name="toy/defenses/abl", init=victim, objective=ABL(share=0.02),
                 schedule=replace(victim.schedule, epochs=2, lr=6.25e-5, warmup=20))
