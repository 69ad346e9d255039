"""cc3m/attacks/corruptencoder, with two objects and no trigger in a fifth of the poisons; five more bananas in supports/banana."""
from dataclasses import replace

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.corruptencoder import corruptencoder_plus

recipe = replace(clean, name="cc3m/attacks/corruptencoder_plus", threat=None, reference=clean,
                 poison=corruptencoder_plus(references="{root}/references/banana", backgrounds="{root}/backgrounds",
                                            supports="{root}/supports/banana"))
