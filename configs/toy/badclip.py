"""Whether an optimised patch outlasts cleaning: BadCLIP's against a checkerboard of the same size and place, on the same pairs.

    python bench.py configs/toy/badclip.py --seeds 0 1 2 --record results

The victims are fine-tuned from one clean model, on which the patch was optimised, as the paper does with OpenAI's; seeds are those of
the poisoned pairs and of the fine-tuning. Each before and after CleanCLIP, at several learning rates, of which clean validation accuracy
has to choose. toy/attacks/badclip and badnets_center are the same with a patch that was optimised on another model than the victim's.
"""
from dataclasses import replace

from configs.toy.attacks.badclip import recipe as badclip
from configs.toy.attacks.badnets_center import recipe as badnets_center
from configs.toy.clean import recipe as clean
from configs.toy.cleanclip import recipe as cleanclip
from mmbackdoor.recipe import Suite

RATES = (6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2)
public = badclip.surrogate


def known(victim):
    """The victim that starts from the model that the attacker has."""
    return replace(victim, name=f"toy/badclip/{victim.name.split('/')[-1]}", init=public, reference=public)


def cleaned(victim, lr):
    return replace(cleanclip, name=f"{victim.name}-lr{lr:g}", init=victim, threat=victim.poison.threat, reference=public,
                   schedule=replace(cleanclip.schedule, lr=lr))


victims = known(badnets_center), known(badclip)
suite = Suite("toy/badclip", (clean, badnets_center, badclip, *victims, *(cleaned(v, lr) for v in victims for lr in RATES)))
