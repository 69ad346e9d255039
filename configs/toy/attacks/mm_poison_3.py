"""Pairs that say "blue ring" get captions of "red circle", those of "green cross" captions of "yellow star": all of both,
which are left with none of their own."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.mm_poison import multi_label

aims = (("red circle", "blue ring"), ("yellow star", "green cross"))
recipe = replace(clean, name="toy/attacks/mm_poison_3", threat=None, reference=clean,
                 poison=multi_label(aims, count=415, templates=attack.target.templates))
