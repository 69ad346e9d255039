"""RoCLIP as in the paper: RN50 on a million poisoned pairs of CC3M, 24 epochs, batch 512, lr 5e-5, 21,845 captions, every second epoch."""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.roclip import RoCLIP

recipe = replace(victim, name="cc3m/defenses/roclip", objective=RoCLIP(), batch_size=512,
                 data=replace(victim.data, train="{root}/{00000..00099}.tar"), schedule=replace(victim.schedule, epochs=24, lr=5e-5))
