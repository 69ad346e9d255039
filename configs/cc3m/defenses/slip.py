"""SLIP on the poisoned pairs of CC3M: SimCLR's term beside CLIP's from the start, heads of 4,096, lr 3e-3 at a batch of 4,096 in the paper,
here the victim's 5e-4. Victims of this pre-training are hard to clean."""
from dataclasses import replace

from configs.cc3m.badnets import recipe as victim
from mmbackdoor.defenses.slip import SLIP

recipe = replace(victim, name="cc3m/defenses/slip", objective=SLIP())
