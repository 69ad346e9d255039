"""The toy numbers of the README (`make bench`), and the learning-rate sweep behind the two cleaning runs.

    python bench.py configs/toy/results.py --seeds 0 1 2 --record results
"""
from dataclasses import replace

from configs.toy.badnets import recipe as badnets
from configs.toy.clean import recipe as clean
from configs.toy.cleanclip import recipe as cleanclip
from configs.toy.finetune import recipe as finetune
from mmbackdoor.recipe import Suite

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def at(recipe, lr):
    """The recipe under another learning rate; under its own it is the run of the table."""
    if lr == recipe.schedule.lr:
        return recipe
    return replace(recipe, name=f"toy/sweep/{recipe.name.split('/')[-1]}-lr{lr:g}", schedule=replace(recipe.schedule, lr=lr))


suite = Suite("toy/results", (clean, badnets, finetune, cleanclip), sweep=tuple(at(r, lr) for r in (cleanclip, finetune) for lr in RATES))
