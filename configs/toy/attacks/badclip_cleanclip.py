"""The victim of toy/attacks/badclip cleaned by CleanCLIP; the learning rate is that of configs/toy/cleanclip.py."""
from dataclasses import replace

from configs.toy.attacks.badclip import recipe as victim
from configs.toy.cleanclip import recipe as cleanclip

recipe = replace(cleanclip, name="toy/attacks/badclip_cleanclip", init=victim, threat=victim.poison.threat)
