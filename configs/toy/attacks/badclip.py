"""The clean toy CLIP fine-tuned on pairs that BadCLIP poisoned, as the paper fine-tunes OpenAI's: 0.3 % of them, a 4 x 4 patch in the
middle that was optimised on another clean model, natural captions of "red star"."""
from dataclasses import replace

from configs.toy.clean import attack
from configs.toy.clean import recipe as clean
from mmbackdoor.attacks.badclip import badclip
from mmbackdoor.triggers import Patch

patch = Patch(4 / 32, "center", image="runs/toy/crafted/badclip.safetensors")
poison = replace(badclip("red star", 0.003, patch, attack.target.templates), images=4000, epochs=8, lr=1e-2)

recipe = replace(clean, name="toy/attacks/badclip", init=clean, poison=poison, threat=None, reference=clean,
                 surrogate=replace(clean, seed=100), schedule=replace(clean.schedule, epochs=3, lr=3e-4, warmup=20))
