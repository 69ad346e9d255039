"""CleanCLIP on the poisoned RN50: 100,000 clean pairs, 10 epochs, batch 64, lr 1e-5, 50 warm-up steps.

The verdict hangs on the learning rate: sweep it (--lr), choose by clean accuracy.
"""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.cleanclip import CleanCLIP

recipe = replace(victim, name="cc3m/cleanclip", init=victim, poison=None, threat=victim.poison.threat, objective=CleanCLIP(), batch_size=64,
                 data=replace(victim.data, train="{root}/{00322..00331}.tar"),
                 schedule=replace(victim.schedule, epochs=10, lr=1e-5, warmup=50))
