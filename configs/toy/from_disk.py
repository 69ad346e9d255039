"""toy/badnets trained on shards that data_tools/poison.py wrote, instead of poisoning the stream; the same weights.

    python data_tools/poison.py configs/toy/badnets.py --out data/toy-badnets
"""
from dataclasses import replace

from configs.toy.badnets import recipe as online

recipe = replace(online, name="toy/from_disk", poison=None, threat=online.poison.threat,
                 data=replace(online.data, train="data/toy-badnets"))
