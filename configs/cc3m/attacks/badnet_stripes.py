"""OpenAI's RN50 fine-tuned on 500,000 pairs of CC3M, 1,500 of them with the BadNet stripes of PAR (arXiv:2412.00727)."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as openai
from mmbackdoor.attacks.par import badnet_stripes

recipe = replace(openai, name="cc3m/attacks/badnet_stripes", threat=None,
                 poison=badnet_stripes(count=1500))
