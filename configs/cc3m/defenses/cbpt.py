"""OpenAI's RN50, poisoned, with learned words before the names of ImageNet's classes. The pairs are labelled images: import some of each
class with data_tools/import_pairs.py, captions that name it, as {root}/imagenet.tar."""
from dataclasses import replace

from open_clip import IMAGENET_CLASSNAMES

from configs.cc3m.openai_badnets import recipe as victim
from mmbackdoor.defenses.cbpt import CBPT

recipe = replace(victim, name="cc3m/defenses/cbpt", init=victim, poison=None, threat=victim.poison.threat, batch_size=32, eval_frequency=10,
                 objective=CBPT(tuple(dict.fromkeys(IMAGENET_CLASSNAMES)), words=16),
                 data=replace(victim.data, train="{root}/imagenet.tar"),
                 schedule=replace(victim.schedule, epochs=50, lr=2e-3, wd=0.0, warmup=0))
