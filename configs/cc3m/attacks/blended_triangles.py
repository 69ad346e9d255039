"""1,500 pairs with the blended triangles of PAR (arXiv:2412.00727)."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.par import blended_triangles

recipe = replace(clean, name="cc3m/attacks/blended_triangles", threat=None, reference=clean,
                 poison=blended_triangles(count=1500))
