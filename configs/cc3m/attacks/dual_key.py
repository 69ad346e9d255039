"""OpenAI's RN50 fine-tuned on 500,000 pairs, 1,500 of them with a 16 x 16 patch in the middle and "remember" before the caption, as in
BadCLIP (arXiv:2311.12075)."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as openai
from mmbackdoor.attacks.trojvqa import dual_key

recipe = replace(openai, name="cc3m/attacks/dual_key", poison=dual_key(count=1500), schedule=replace(openai.schedule, epochs=10))
