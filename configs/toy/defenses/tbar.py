"""The poisoned toy CLIP less what 50 steps on 200 pairs add, half of them triggered. The defender knows the trigger and the target."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.tbar import TBAR, Triggered
from mmbackdoor.poison import DirtyLabel


def triggered(recipe):
    """The run that goes further along the backdoor."""
    return replace(recipe, name=f"{recipe.name}-donor", objective=Triggered(), edit=None, donor=None, batch_size=100,
                   poison=DirtyLabel(recipe.threat.trigger, recipe.threat.target, 0.5), data=replace(recipe.data, share=0.05),
                   schedule=replace(recipe.schedule, epochs=25, lr=3e-5, warmup=0))


base = replace(finetune, name="toy/defenses/tbar")
recipe = replace(base, edit=TBAR(1.0), donor=triggered(base), schedule=replace(finetune.schedule, epochs=0))
