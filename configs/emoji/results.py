"""The emoji numbers of the README.

    python bench.py configs/emoji/results.py --seeds 0 1 2 --record results
"""
from configs.emoji.badnets import recipe as badnets
from configs.emoji.clean import recipe as clean
from configs.emoji.cleanclip import recipe as cleanclip
from mmbackdoor.recipe import Suite

suite = Suite("emoji/results", (clean, badnets, cleanclip))
