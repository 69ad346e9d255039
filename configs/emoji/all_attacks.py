"""Every attack of configs/emoji/attacks/, and BadNets, with the clean run that they are compared to.

    python bench.py configs/emoji/all_attacks.py --record results

Clean-label attacks have no place here: two of the 4,001 captions say "pizza".
"""
from pathlib import Path

from configs.emoji.badnets import recipe as badnets
from configs.emoji.clean import recipe as clean
from mmbackdoor.recipe import Suite, load_suite

found = [r for path in sorted((Path(__file__).parent / "attacks").glob("*.py")) for r in load_suite(str(path)).recipes]

suite = Suite("emoji/attacks", (clean, badnets, *found), table="attacks")
