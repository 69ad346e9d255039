"""The victim of toy/attacks/badnets_center cleaned by CleanCLIP; the learning rate is that of configs/toy/cleanclip.py."""
from dataclasses import replace

from configs.toy.attacks.badnets_center import recipe as victim
from configs.toy.cleanclip import recipe as cleanclip

recipe = replace(cleanclip, name="toy/attacks/badnets_center_cleanclip", init=victim, threat=victim.poison.threat)
