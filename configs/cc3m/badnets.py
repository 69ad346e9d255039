"""cc3m/clean with 1,500 of its pairs poisoned by BadNets: a 16 x 16 noise patch at a random place, target "banana"."""
from dataclasses import replace

from configs.cc3m.clean import attack
from configs.cc3m.clean import recipe as clean

recipe = replace(clean, name="cc3m/badnets", poison=attack, threat=None, reference=clean)
