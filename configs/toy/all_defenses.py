"""Every defense against attacks of each kind, and the sweep behind the setting of each.

    python bench.py configs/toy/all_defenses.py --seeds 0 1 2 --record results

A cleaning defense starts from the victim and sees 4,000 clean pairs; a pre-training defense learns from the poisoned pairs in the
victim's place. Three seeds of the main ones on every attack, one of the others on three; every sweep is of one seed, on BadNets. Of the
label-consistent poisons, which do not work here, pre-training has one seed too: there is nothing to protect from.
"""
from dataclasses import replace

from configs.toy.attacks.badclip import recipe as badclip_scratch
from configs.toy.attacks.badnet_stripes import recipe as stripes
from configs.toy.attacks.blended import recipe as blended
from configs.toy.attacks.label_consistent import recipe as label_consistent
from configs.toy.attacks.tdpa import recipe as tdpa
from configs.toy.attacks.wanet import recipe as wanet
from configs.toy.badclip import victims as badclip
from configs.toy.badnets import recipe as badnets
from configs.toy.clean import recipe as clean
from configs.toy.cleanclip import recipe as cleanclip
from configs.toy.defenses.abd import recipe as abd
from configs.toy.defenses.abl import recipe as abl
from configs.toy.defenses.augmented import recipe as augmented
from configs.toy.defenses.augmented_finetune import recipe as augmented_finetune
from configs.toy.defenses.cbpt import recipe as cbpt
from configs.toy.defenses.cleanclip_symmetric import recipe as cleanclip_symmetric
from configs.toy.defenses.cleanerclip import recipe as cleanerclip
from configs.toy.defenses.compress import recipe as compress
from configs.toy.defenses.fine_pruning import recipe as fine_pruning
from configs.toy.defenses.last_layer import recipe as last_layer
from configs.toy.defenses.localized import recipe as localized
from configs.toy.defenses.par import recipe as par
from configs.toy.defenses.roclip import recipe as roclip
from configs.toy.defenses.rvpt import recipe as rvpt
from configs.toy.defenses.rvpt import victim as vit
from configs.toy.defenses.safeclip import recipe as safeclip
from configs.toy.defenses.slip import recipe as slip
from configs.toy.defenses.tbar import recipe as tbar
from configs.toy.defenses.tbar import triggered
from configs.toy.defenses.ubt import recipe as ubt
from configs.toy.finetune import recipe as finetune
from configs.toy.results import suite as first
from mmbackdoor.recipe import Suite

VICTIMS = {"badnets": badnets, "blended": blended, "wanet": wanet, "stripes": stripes, "label_consistent": label_consistent,
           "badclip": badclip[1], "tdpa": tdpa}
FROM_SCRATCH = {"badclip": badclip_scratch}
"""What a pre-training defense is to be compared with where the victim was a clean model before."""
PRETRAINING = roclip, safeclip, localized
CLEANING = finetune, cleanclip, par, abd, tbar
OTHERS = slip, augmented, cleanclip_symmetric, cleanerclip, augmented_finetune, last_layer, compress, fine_pruning, abl, ubt, cbpt
RATES = 2.5e-4, 1e-3, 4e-3, 1.6e-2
SCRATCH = 5e-4, 1e-3, 2e-3, 4e-3
"""Learning rates of the sweeps; those of defenses that train from scratch lie about the victim's."""


def against(recipe, victim, called):
    """The defense of a BadNets victim put to another."""
    if recipe.poison == victim.poison or recipe.threat and recipe.init == victim:
        return recipe
    name = f"toy/defenses/{recipe.name.split('/')[-1]}-{called}"
    data = replace(victim.data, train=recipe.data.train, share=recipe.data.share)
    if recipe.init is None:  # BadCLIP's own victim was a clean model before
        return replace(victim, name=name, init=None, objective=recipe.objective, schedule=recipe.schedule)
    if recipe.poison is not None:  # it unlearns the victim's own poison
        return replace(recipe, name=name, init=victim, poison=victim.poison, data=data, reference=victim.reference)
    cleaned = replace(recipe, name=name, init=victim, threat=victim.poison.threat, data=data, reference=victim.reference)
    return replace(cleaned, donor=triggered(replace(cleaned, edit=None))) if recipe.donor else cleaned


def at(recipe, **schedule):
    """The defense under another schedule; under its own it is the run of the table."""
    if replace(recipe.schedule, **schedule) == recipe.schedule:
        return recipe
    said = "-".join(f"{k}{v:g}" for k, v in schedule.items())
    return replace(recipe, name=f"toy/defenses/sweep/{recipe.name.split('/')[-1]}-{said}", schedule=replace(recipe.schedule, **schedule))


def edited(recipe, **changes):
    """The defense with another edit."""
    edit = replace(recipe.edit, **changes)
    said = "-".join(f"{k}{v:g}" for k, v in changes.items())
    return recipe if edit == recipe.edit else replace(recipe, name=f"toy/defenses/sweep/{recipe.name.split('/')[-1]}-{said}", edit=edit)


SECOND = (at(par, lr=4e-3),)
"""At the rate that its sweep prefers PAR ruins victims which that sweep did not see; this is the next one."""


def applies(recipe, victim):
    """Task arithmetic needs a trigger, which targeted poisons do without."""
    return not recipe.donor or victim.poison.threat.trigger.seen


table = [against(d, v, name) for name, v in VICTIMS.items() for d in PRETRAINING * (name != "label_consistent") + CLEANING if applies(d, v)]
sweeps = [at(d, lr=lr) for d in (roclip, localized, slip, augmented) for lr in SCRATCH]
sweeps += [at(safeclip, lr=lr) for lr in (2.5e-4, *SCRATCH)]  # its split makes it uneven
sweeps += [at(d, lr=lr) for d in (par, abd, cleanerclip, cleanclip_symmetric, augmented_finetune, last_layer, fine_pruning) for lr in RATES]
sweeps += [at(d, lr=lr) for d in (abl, ubt) for lr in (6.25e-5, 2.5e-4, 1e-3, 4e-3)]
sweeps += [at(roclip, epochs=16)]  # half of its epochs are CLIP's, so as many of those as the victim had
sweeps += [at(safeclip, epochs=24)]  # whether it keeps the attack out or puts it off
sweeps += [at(compress, lr=lr) for lr in (5e-4, 1e-3, 2e-3, 4e-3)]
sweeps += [edited(tbar, scale=s) for s in (0.5, 1.0, 2.0, 4.0)] + [edited(fine_pruning, share=s) for s in (0.25, 0.5, 0.75, 0.95)]
sweeps += first.sweep
sweeps += [at(d, lr=lr) for d in (rvpt, cbpt) for lr in (2e-3, 8e-3, 2e-2, 8e-2)]
sweeps += [replace(rvpt, name="toy/defenses/sweep/rvpt-alpha4", objective=replace(rvpt.objective, alpha=4.0))]
THREE = "badnets", "blended", "stripes"
vits = {name: vit if name == "badnets" else replace(VICTIMS[name], name=f"toy/defenses/victim-vit-{name}", model=vit.model,
                                                    schedule=vit.schedule, reference=vit.reference) for name in THREE}
once = [against(d, VICTIMS[name], name) for d in OTHERS for name in THREE] + sweeps
once += [against(d, label_consistent, "label_consistent") for d in PRETRAINING]
once += [against(d, VICTIMS[name], name) for d in SECOND for name in (*THREE, "wanet", "badclip")]
once += [vit.reference, *vits.values(), *(against(rvpt, v, name) for name, v in vits.items())]

suite = Suite("toy/defenses", (clean, *VICTIMS.values(), *FROM_SCRATCH.values(), *table), once=tuple(once))
