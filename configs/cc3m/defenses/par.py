"""PAR as in the paper: OpenAI's RN50, poisoned, on 250,000 pairs of CC3M; 2 epochs, batch 2,048 (512 on each of 4 GPUs), lr 3e-6, wd 1e-4,
tau 2.15, half an epoch of warm-up."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as victim
from mmbackdoor.defenses.par import PAR

recipe = replace(victim, name="cc3m/defenses/par", init=victim, poison=None, threat=victim.poison.threat, objective=PAR(), batch_size=512,
                 data=replace(victim.data, train="{root}/{00300..00324}.tar"),
                 schedule=replace(victim.schedule, epochs=2, lr=3e-6, wd=1e-4, beta2=0.98, warmup=60))
