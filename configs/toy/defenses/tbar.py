"""The poisoned toy CLIP less what two epochs on 200 triggered pairs add to it. The defender knows the trigger and the target."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.tbar import TBAR
from mmbackdoor.poison import DirtyLabel


def triggered(recipe):
    """The run that goes further along the backdoor: nine in ten of the 200 pairs carry the trigger."""
    return replace(recipe, name=f"{recipe.name}-donor", poison=DirtyLabel(recipe.threat.trigger, recipe.threat.target, 0.9),
                   data=replace(recipe.data, share=0.05), batch_size=20, edit=None, donor=None,
                   schedule=replace(recipe.schedule, epochs=2, lr=3e-4, warmup=0))


base = replace(finetune, name="toy/defenses/tbar")
recipe = replace(base, edit=TBAR(1.0), donor=triggered(base), schedule=replace(finetune.schedule, epochs=0))
