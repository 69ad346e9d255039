"""Where the verdict on a defense turns: what is said of it holds in one setting and not in the next.

    python bench.py configs/toy/reversals.py --record results

pretraining: fine-tuning and CleanCLIP on a victim that was pre-trained with CLIP's loss alone, and on one with a loss within
each modality beside it: CleanCLIP's, from the start. It takes the backdoor in late, so both have three times the usual epochs.
finetuning: RoCLIP on poisoned pairs from scratch (toy/defenses/roclip), and on a clean model that is fine-tuned on them.
structure: CleanCLIP on squares and blends of one noise, of noise that is other in every image, and of stripes that are.
purity: poisons among the 4,000 clean pairs. share: fewer clean pairs.
cropping: CorruptEncoder on wide images, with and without its own defense, localized cropping of the two views (needs data/toy-2to1).
"""
from dataclasses import replace

from configs.toy import attack_sweeps, results
from configs.toy.all_defenses import at
from configs.toy.attacks.badnet_stripes import recipe as badnet_stripes
from configs.toy.attacks.blended import recipe as blended
from configs.toy.attacks.blended_stripes import recipe as blended_stripes
from configs.toy.badnets import recipe as badnets
from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from configs.toy.cleanclip import recipe as cleanclip
from configs.toy.compat import poisoned
from configs.toy.defenses.roclip import recipe as roclip
from configs.toy.finetune import recipe as finetune
from mmbackdoor.attacks.badnets import CleanCLIPPatch
from mmbackdoor.defenses.localized import LocalizedCropping
from mmbackdoor.losses import Clip
from mmbackdoor.recipe import Suite
from mmbackdoor.triggers import Blend, Patch

RATES = 2.5e-4, 1e-3, 4e-3, 1.6e-2
SHARES = 0.005, 0.02, 0.1, 0.5, 1

patch_noise, patch_fresh, blended_fresh = (poisoned(clean, f"toy/reversals/{name}", trigger) for name, trigger in (
    ("patch_noise", CleanCLIPPatch(Patch(6 / 32))), ("patch_fresh", CleanCLIPPatch(Patch(6 / 32), fresh=True)),
    ("blended_fresh", Blend(resolution=32, fresh=True))))
structure = patch_noise, patch_fresh, badnet_stripes, blended, blended_fresh, blended_stripes
early = replace(badnets, name="toy/reversals/both", objective=cleanclip.objective)
alone, both = (replace(r, name=f"toy/reversals/{name}-epochs24", schedule=replace(r.schedule, epochs=24))
               for name, r in (("badnets", badnets), ("both", early)))
corrupted = attack_sweeps.at(attack_sweeps.corruptencoder, "rate5-wide-twoviews", "wide-twoviews", rate=0.05)


def last(recipe):
    return recipe.name.split("/")[-1]


def cleaned(part, defense, victim, lr, note=""):
    """The defense of BadNets put to another victim, or to that one, where the sweep of configs/toy/results.py has it already."""
    if victim == badnets and not note:
        return results.at(defense, lr)
    return replace(defense, name=f"toy/reversals/{part}/{last(defense)}-{last(victim)}{note}-lr{lr:g}", init=victim,
                   threat=victim.poison.threat, schedule=replace(defense.schedule, lr=lr))


def impure(defense, count, lr):
    """Cleaning on pairs of which some are poisoned as the victim's were."""
    r = cleaned("purity", defense, badnets, lr, f"-poisons{count}" if count else "")
    return replace(r, poison=replace(attack, rate=None, count=count)) if count else r


def few(defense, share, lr):
    """The same number of steps on fewer pairs."""
    if share == 1:
        return results.at(defense, lr)
    r = cleaned("share", defense, badnets, lr, f"-share{share:g}")
    batch = min(r.batch_size, round(4000 * share))
    epochs = max(1, round(r.schedule.epochs * 4000 // r.batch_size / (round(4000 * share) // batch)))
    return replace(r, data=replace(r.data, share=share), batch_size=batch, lanes=1, eval_frequency=0,
                   schedule=replace(r.schedule, epochs=epochs))


def learned(objective, name, lr):
    """A clean model fine-tuned on the poisoned pairs; RoCLIP matches captions in half of the epochs, as from scratch."""
    return replace(badnets, name=f"toy/reversals/finetuning/{name}-lr{lr:g}", init=clean, objective=objective,
                   schedule=replace(badnets.schedule, epochs=4, lr=lr, warmup=20))


def localized(recipe):
    """The experiment with its two views from one neighbourhood."""
    return replace(recipe, name=f"toy/reversals/cropping/{last(recipe)}-localized",
                   reference=recipe.reference and localized(recipe.reference),
                   objective=LocalizedCropping(recipe.objective, "image", "image_aug"))


PARTS = {
    "pretraining": (badnets, early, *(r for v in (alone, both) for r in (v, *(cleaned("pretraining", d, v, lr)
                                                                              for d in (finetune, cleanclip) for lr in RATES)))),
    "finetuning": (roclip, at(roclip, epochs=16), *(learned(o, name, lr) for o, name in ((Clip(), "clip"), (roclip.objective, "roclip"))
                                                    for lr in (3e-4, 1e-3))),
    "structure": tuple(r for v in structure for r in (v, *(cleaned("structure", cleanclip, v, lr) for lr in RATES[:3]))),
    "purity": tuple(impure(d, n, lr) for d in (finetune, cleanclip) for lr in (1e-3, d.schedule.lr) for n in (0, 1, 5, 25)),
    "share": tuple(few(cleanclip, share, lr) for lr in (1e-3, 4e-3) for share in SHARES),
    "cropping": tuple(r for v in (corrupted.reference, corrupted) for r in (v, localized(v))),
}
suite = Suite("toy/reversals", (clean, *(r for part in PARTS.values() for r in part)))
