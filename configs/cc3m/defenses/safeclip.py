"""SafeCLIP as in the paper: RN50 on a million poisoned pairs of CC3M, 32 epochs, batch 512, lr 5e-4 and 5e-6 in the slow epoch."""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.safeclip import SafeCLIP

recipe = replace(victim, name="cc3m/defenses/safeclip", objective=SafeCLIP(), batch_size=512,
                 data=replace(victim.data, train="{root}/{00000..00099}.tar"), schedule=replace(victim.schedule, epochs=32, lr=5e-4))
