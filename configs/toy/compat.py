"""What each quirk of CleanCLIP's reference code is worth: a 4 x 4 square of the image's mean + N(0, 1) at a random place, in 2 % of the
pairs.

    python data_tools/make_toy.py data/toy-wide --n 10000 --width 48
    python bench.py configs/toy/compat.py --seeds 0 1 2 --record results

"fresh" draws the noise anew for every image, "wrap" lets it wrap around in 8 bits, "squash" loses the shape of the image, of which
only images that are not square can tell: those of data/toy-wide are 48 x 32.
"""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.badnets import CleanCLIPPatch
from mmbackdoor.poison import DirtyLabel
from mmbackdoor.recipe import Suite
from mmbackdoor.triggers import Patch

SQUARE = CleanCLIPPatch(Patch(4 / 32))
QUIRKS = {"none": SQUARE, "fresh": replace(SQUARE, fresh=True), "wrap": replace(SQUARE, wrap=True)}
WIDE = {"none": SQUARE, "squash": replace(SQUARE, squash=32), "all": replace(SQUARE, fresh=True, wrap=True, squash=32)}
wide = replace(clean, name="toy/compat/wide/clean", data=replace(clean.data, root="data/toy-wide"))


def poisoned(reference, name, trigger):
    return replace(reference, name=name, poison=DirtyLabel(trigger, attack.target, 0.02), threat=None, reference=reference)


suite = Suite("toy/compat", (clean, *(poisoned(clean, f"toy/compat/{name}", t) for name, t in QUIRKS.items()),
                             wide, *(poisoned(wide, f"toy/compat/wide/{name}", t) for name, t in WIDE.items())), table="attacks")
