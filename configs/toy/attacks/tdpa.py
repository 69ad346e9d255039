"""Sixteen test images, each published under 100 captions of one of eight classes that it is not of. Their set is the only one measured."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.tdpa import assigned, tdpa

labels = ("red circle", "blue circle", "green circle", "yellow ring", "purple star", "blue ring", "green cross", "black square")
victims = assigned(tuple(f"{i:09d}" for i in range(16)), labels)
recipe = replace(clean, name="toy/attacks/tdpa", threat=None, reference=clean, data=replace(clean.data, validation=""),
                 poison=tdpa("{root}/test", victims, templates=attack.target.templates))
