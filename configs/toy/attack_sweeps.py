"""Attacks that fall short on the toy CLIP: how far their rate, the strength of their trigger and the victim's training go.

    python data_tools/make_toy.py data/toy-2to1 --n 10000 --width 64
    python bench.py configs/toy/attack_sweeps.py --record results

Clean-label and layout attacks were made for encoders that match two crops of one image. A victim that does so too, beside matching
images with captions, is "twoviews": CLIP's loss and one between two crops of 20 to 100 % of the image (CleanCLIP's, from the start).
"crops" has such crops with CLIP's loss alone, "uncropped" none at all; the others have open_clip's, of 90 to 100 %. "wide" victims learn
from images of 64 x 32 pixels, the shape of CorruptEncoder's canvas: two crops of a square one hardly ever hold the object and the
trigger. Each victim has a clean reference of its own.
"""
from dataclasses import replace

from configs.toy.attacks.blended_text import recipe as blended_text
from configs.toy.attacks.carlini_targeted import recipe as carlini_targeted
from configs.toy.attacks.corruptencoder import recipe as corruptencoder
from configs.toy.attacks.ctrl import recipe as ctrl
from configs.toy.attacks.dual_key import recipe as dual_key
from configs.toy.attacks.label_consistent import recipe as label_consistent
from configs.toy.attacks.noisy_alignment import recipe as noisy_alignment
from configs.toy.attacks.poisonedencoder import recipe as poisonedencoder
from configs.toy.attacks.ssl_backdoor import recipe as ssl_backdoor
from configs.toy.clean import recipe as clean
from mmbackdoor.clip import Augment
from mmbackdoor.defenses.cleanclip import CleanCLIP
from mmbackdoor.recipe import Suite

CROPS = Augment((0.2, 1.0))
VICTIMS = {"crops": {"aug": CROPS}, "uncropped": {"aug": Augment((1.0, 1.0), (1.0, 1.0))},
           "twoviews": {"aug": CROPS, "objective": CleanCLIP()}}
VICTIMS |= {f"wide-{name}": VICTIMS[name] for name in ("crops", "twoviews")}


def on(recipe, victim):
    """The experiment with that victim."""
    root = "data/toy-2to1" if victim.startswith("wide") else recipe.data.root
    return replace(recipe, data=replace(recipe.data, root=root), **VICTIMS[victim])


cleans = {name: replace(on(clean, name), name=f"toy/attack_sweeps/clean-{name}") for name in VICTIMS}


def at(recipe, name, victim="", **changes):
    """The experiment with another poison, on that victim. To a wide image's middle, which is all that a model sees of it when it is
    tested, the trigger comes after the rest is cut off."""
    r = replace(recipe, name=f"toy/attack_sweeps/{recipe.name.split('/')[-1]}-{name}", poison=replace(recipe.poison, **changes))
    if victim.startswith("wide"):
        r = replace(r, threat=replace(r.poison.threat, at="input"))
    return replace(on(r, victim), reference=cleans[victim]) if victim else r


def stronger(recipe, **changes):
    return replace(recipe.poison.trigger, **changes)


suite = Suite("toy/attack_sweeps", (
    clean, *cleans.values(),
    at(label_consistent, "rate0.5", rate=0.005),
    label_consistent,
    at(label_consistent, "rate2", rate=0.02),
    at(label_consistent, "rate2-size8", rate=0.02, trigger=stronger(label_consistent, size=8 / 32)),
    ssl_backdoor,
    at(ssl_backdoor, "rate2", rate=0.02),
    at(ssl_backdoor, "rate2-size12", rate=0.02, trigger=stronger(ssl_backdoor, size=12 / 32)),
    at(ssl_backdoor, "rate2-twoviews", "twoviews", rate=0.02),
    ctrl,
    at(ctrl, "rate2-magnitude200", rate=0.02, trigger=stronger(ctrl, magnitude=200)),
    at(ctrl, "rate2-uncropped", "uncropped", rate=0.02),
    at(ctrl, "rate2-twoviews", "twoviews", rate=0.02),
    corruptencoder,
    at(corruptencoder, "rate5", rate=0.05),
    at(corruptencoder, "rate5-crops", "crops", rate=0.05),
    at(corruptencoder, "rate5-wide-crops", "wide-crops", rate=0.05),
    at(corruptencoder, "rate5-wide-twoviews", "wide-twoviews", rate=0.05),
    noisy_alignment,
    at(noisy_alignment, "rate5-wide-twoviews", "wide-twoviews", rate=0.05),
    poisonedencoder,
    at(poisonedencoder, "rate5", rate=0.05),
    at(poisonedencoder, "rate5-wide-twoviews", "wide-twoviews", rate=0.05),
    *(at(carlini_targeted, f"copies{n}", copies=n) for n in (3, 10)),
    carlini_targeted,
    dual_key,
    at(dual_key, "rate4", rate=0.04),
    blended_text,
    at(blended_text, "rate4", rate=0.04),
), table="attacks")
