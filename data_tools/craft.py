"""Craft the trigger of a recipe: its attack optimises it on the surrogate and writes the file that the trigger names.

    python train.py configs/toy/clean.py --seed 100                        (the surrogate, a clean model of the attacker's)
    python data_tools/craft.py configs/toy/attacks/badclip.py
    python data_tools/craft.py configs/cc3m/attacks/badclip.py --surrogate RUN --poison.trigger.image mine.safetensors

train.py does the same before it begins. A file that is there stays as it is, unless another recipe made it: that is refused.
"""
import os
import time

from mmbackdoor import craft, recipe, run
from mmbackdoor.types import BadInput


@recipe.told
def cli() -> None:
    r = recipe.from_command_line(__doc__)
    if r.poison is None or not (file := craft.crafted(r.poison)):
        raise BadInput(f"{r.name}: its attack crafts no trigger; name a recipe with one, such as configs/toy/attacks/badclip.py")
    there, start = os.path.exists(file), time.monotonic()
    run.craft(r)
    print(f"{file}: is there already" if there else f"{file}: crafted in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    cli()
