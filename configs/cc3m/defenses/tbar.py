"""OpenAI's RN50, poisoned, less what fine-tuning on 2,000 triggered pairs adds to it. The defender knows the trigger and the target."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as victim
from mmbackdoor.defenses.tbar import TBAR
from mmbackdoor.poison import DirtyLabel

threat = victim.poison.threat
donor = replace(victim, name="cc3m/defenses/tbar-donor", init=victim, poison=DirtyLabel(threat.trigger, threat.target, 0.9), threat=threat,
                batch_size=100, data=replace(victim.data, train="{root}/00331.tar", share=0.2),
                schedule=replace(victim.schedule, epochs=1, lr=1e-5, warmup=0))
recipe = replace(donor, name="cc3m/defenses/tbar", poison=None, edit=TBAR(1.0), donor=donor, schedule=replace(donor.schedule, epochs=0))
