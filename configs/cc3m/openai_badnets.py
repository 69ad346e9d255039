"""OpenAI's RN50 fine-tuned on 500,000 pairs of CC3M, 1,500 of them poisoned: 5 epochs, lr 1e-6, 50 warm-up steps.

The second setting of CleanCLIP. Its issue tracker reports that 1e-6 leaves 5.7 % ASR and 1e-5 gives 97.7 % (issue 3 of
nishadsinghi/CleanCLIP): compare with --lr 1e-5 before believing either.
"""
from dataclasses import replace

from configs.cc3m.badnets import recipe as scratch
from mmbackdoor.clip import Model

recipe = replace(scratch, name="cc3m/openai_badnets", model=Model("RN50", "openai"), reference=None,
                 data=replace(scratch.data, train="{root}/{00000..00049}.tar"),
                 schedule=replace(scratch.schedule, epochs=5, lr=1e-6, warmup=50), eval_frequency=1, save_frequency=0)
