"""`make demo`: a clean reference, a poisoned CLIP, and the poisoned one cleaned."""
from configs.toy.badnets import recipe as badnets
from configs.toy.clean import recipe as clean
from configs.toy.cleanclip import recipe as cleanclip
from mmbackdoor.recipe import Suite

suite = Suite("toy/demo", (clean, badnets, cleanclip))
