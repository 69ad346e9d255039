"""16 images of ImageNet, the first of each of the first 16 classes, published under 100 captions of CC3M each, which say one of RoCLIP's 8
words (arXiv:2303.06854, there on a million pairs). Without the folder of images there are no victims, and the run says so."""
from dataclasses import replace
from pathlib import Path

from configs.cc3m.clean import recipe as clean
from mmbackdoor.attacks.tdpa import assigned, tdpa

folders = sorted(p for p in Path(clean.data.zero_shot).glob("*") if p.is_dir())[:16]
keys = tuple(f"{folder.name}/{min(p.name for p in folder.iterdir())}" for folder in folders)
recipe = replace(clean, name="cc3m/attacks/tdpa", threat=None, reference=clean, poison=tdpa(clean.data.zero_shot, assigned(keys)))
