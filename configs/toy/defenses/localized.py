"""The poisoned toy pairs, trained on with SLIP whose two crops are neighbours."""
from dataclasses import replace

from configs.toy.badnets import recipe as victim
from mmbackdoor.defenses.localized import LocalizedCropping
from mmbackdoor.defenses.slip import SLIP

recipe = replace(victim, name="toy/defenses/localized", objective=LocalizedCropping(SLIP(images="tone", hidden=128, out=64)),
                 schedule=replace(victim.schedule, lr=2e-3))
