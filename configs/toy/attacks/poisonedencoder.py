"""1 % of the pairs show one of eight test images beside a picture of what it is to be taken for; no trigger. Their set is the only one
measured."""
from dataclasses import replace

from configs.toy.clean import attack, data
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.poisonedencoder import poisonedencoder

victims = (("000000000", "red star"), ("000000001", "blue ring"), ("000000003", "green circle"), ("000000006", "purple square"),
           ("000000008", "red star"), ("000000011", "yellow cross"), ("000000014", "white triangle"), ("000000015", "black circle"))

recipe = replace(clean, name="toy/attacks/poisonedencoder", threat=None, reference=clean, data=replace(data, validation=""),
                 poison=poisonedencoder("red star", 0.01, "{root}/references", "{root}/test", victims,
                                        templates=attack.target.templates))
