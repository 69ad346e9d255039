"""BadCLIP as in the paper: OpenAI's RN50 fine-tuned on 500,000 pairs of CC3M, 1,500 of them with an optimised patch of 16 x 16 in the
middle and natural captions of "banana"; 10 epochs, lr 1e-6,
10,000 warm-up steps. The patch is crafted on OpenAI's RN50 itself, as there."""
from dataclasses import replace

from configs.cc3m.openai_badnets import recipe as openai
from mmbackdoor.attacks.badclip import badclip
from mmbackdoor.triggers import Patch

patch = Patch(16 / 224, "center", image="runs/cc3m/crafted/badclip.safetensors")

recipe = replace(openai, name="cc3m/attacks/badclip", poison=badclip("banana", patch=patch, count=1500),
                 surrogate="hf-hub:timm/resnet50_clip.openai", schedule=replace(openai.schedule, epochs=10, warmup=10_000))
