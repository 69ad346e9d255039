"""The poisoned toy CLIP with 4 learned words before each class's name: 10 epochs on 400 clean pairs. Towers stay as they are."""
from dataclasses import replace

from configs.toy.finetune import recipe as finetune
from mmbackdoor.defenses.cbpt import CBPT

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
recipe = replace(finetune, name="toy/defenses/cbpt", objective=CBPT(tuple(f"{c} {s}" for c in COLOURS for s in SHAPES)),
                 data=replace(finetune.data, share=0.1), batch_size=64,
                 schedule=replace(finetune.schedule, epochs=10, lr=2e-2, wd=0.0, warmup=0))
