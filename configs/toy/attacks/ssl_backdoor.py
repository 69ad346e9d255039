"""A square of 7 pixels of blurred colours on 1 % of the pairs, half of those that say "red star"; captions stay."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.ssl_backdoor import ssl_backdoor

recipe = replace(clean, name="toy/attacks/ssl_backdoor", threat=None, reference=clean,
                 poison=ssl_backdoor("red star", 0.01, templates=attack.target.templates))
