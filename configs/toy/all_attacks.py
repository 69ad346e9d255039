"""Every attack of configs/toy/attacks/, and BadNets, with the clean run that they are compared to.

    python bench.py configs/toy/all_attacks.py --seeds 0 1 2 --record results
"""
from pathlib import Path

from configs.toy.badnets import recipe as badnets
from configs.toy.clean import recipe as clean
from mmbackdoor.recipe import Suite, load_suite

found = [r for path in sorted((Path(__file__).parent / "attacks").glob("*.py")) for r in load_suite(str(path)).recipes]

suite = Suite("toy/attacks", (clean, badnets, *found), table="attacks")
