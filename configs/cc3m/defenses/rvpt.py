"""OpenAI's ViT-B/16 fine-tuned on the poisoned pairs, then with 44 learned tokens in every block: 1,000 clean pairs, 50 epochs."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as openai
from mmbackdoor.clip import Model
from mmbackdoor.defenses.rvpt import RVPT

victim = replace(openai, name="cc3m/defenses/victim-vit", model=Model("ViT-B-16", "openai"))
recipe = replace(victim, name="cc3m/defenses/rvpt", init=victim, poison=None, threat=victim.poison.threat, objective=RVPT(),
                 data=replace(victim.data, train="{root}/00331.tar", share=0.1), batch_size=32, eval_frequency=10,
                 schedule=replace(victim.schedule, epochs=50, lr=2e-3, wd=0.0, warmup=0))
