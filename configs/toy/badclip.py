"""Whether an optimised patch outlasts cleaning: BadCLIP's against a checkerboard of the same size and place, on the same pairs.

    python bench.py configs/toy/badclip.py --seeds 0 1 2 --record results

Each victim before and after CleanCLIP, at several learning rates, of which clean validation accuracy has to choose.
"""
from dataclasses import replace

from configs.toy.attacks.badclip import recipe as badclip
from configs.toy.attacks.badnets_center import recipe as badnets_center
from configs.toy.clean import recipe as clean
from configs.toy.cleanclip import recipe as cleanclip
from mmbackdoor.recipe import Suite

RATES = (6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2)


def cleaned(victim, lr):
    return replace(cleanclip, name=f"toy/badclip/{victim.name.split('/')[-1]}-lr{lr:g}", init=victim, threat=victim.poison.threat,
                   schedule=replace(cleanclip.schedule, lr=lr))


victims = (badnets_center, badclip)
suite = Suite("toy/badclip", (clean, *victims, *(cleaned(victim, lr) for victim in victims for lr in RATES)))
