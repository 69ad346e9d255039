"""OpenAI's RN50 fine-tuned on 500,000 pairs of CC3M, 1,500 of them with the blended text of PAR (arXiv:2412.00727)."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as openai
from mmbackdoor.attacks.par import blended_text

poison = blended_text(count=1500)
recipe = replace(openai, name="cc3m/attacks/blended_text", poison=poison, threat=replace(poison.threat, at="input"))
