"""OpenAI's RN50, poisoned, less what fine-tuning on 2,000 pairs adds, half of them triggered. The defender knows trigger and target."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as victim
from mmbackdoor.defenses.tbar import TBAR, Triggered
from mmbackdoor.poison import DirtyLabel

threat = victim.poison.threat
base = replace(victim, name="cc3m/defenses/tbar", init=victim, poison=None, threat=threat, batch_size=100,
               data=replace(victim.data, train="{root}/00331.tar", share=0.2))
donor = replace(base, name="cc3m/defenses/tbar-donor", objective=Triggered(), poison=DirtyLabel(threat.trigger, threat.target, 0.5),
                schedule=replace(victim.schedule, epochs=1, lr=1e-5, warmup=0))
recipe = replace(base, edit=TBAR(1.0), donor=donor, schedule=replace(donor.schedule, epochs=0))
