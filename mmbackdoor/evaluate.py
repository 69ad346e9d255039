"""Run a model on clean and triggered inputs, then measure: accuracy, attack success, retrieval.

One definition: ASR = P(prediction = target | triggered image, true class is not the target). Beside it stand the share
that counts images of the target too, the accuracy on triggered images, and, by the caller, the ASR of a clean reference
model on the same images; `lift` is the difference.
"""
from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from . import keyed
from .clip import CLIP
from .shards import IMAGE_FIELDS, Index, Raw, decode, expand, read_pairs, read_raw
from .types import BadInput, Sample, Target, Threat, to_image, to_pixels

# ---- labelled sets


@dataclass(frozen=True)
class EvalSet:
    """Labelled images with the class names and templates ("a photo of a {c}.") that make the zero-shot classifier."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    raws: Callable[[], Iterator[Raw]]

    def target(self, target: Target) -> int:
        """The index of the target's class."""
        if target.label not in self.classnames:
            shown = ", ".join(self.classnames[:8]) + (", …" if len(self.classnames) > 8 else "")
            raise BadInput(f"{self.name}: has no class {target.label!r}, the attack's target, so no attack success can be "
                           f"measured on it; its classes: {shown}")
        return self.classnames.index(target.label)


def open_set(path: str | Path, split: str = "test") -> EvalSet:
    """A CLIP_benchmark webdataset directory (classnames.txt, zeroshot_classification_templates.txt, <split>/*.tar), or
    a folder of class folders; the thousand WordNet folders of ImageNet get OpenAI's names and templates."""
    root = Path(path)
    if not root.is_dir():
        raise BadInput(f"{root}: no such evaluation set; name a directory with classnames.txt and {split}/0.tar, or one folder a class")
    if not (root / split).is_dir() and not list(root.glob("*.txt")):
        return image_folder(root)
    names = lines(root / "classnames.txt", "one class name a line, in the order of the labels")
    templates = lines(root / "zeroshot_classification_templates.txt", "one template a line, such as: a photo of a {c}.")
    if bad := [t for t in templates if "{c}" not in t]:
        raise BadInput(f"{root}/zeroshot_classification_templates.txt: {bad[0]!r} has no {{c}} for the class name; write one")
    shards = expand(str(root / split))
    return EvalSet(str(root), names, templates, WdsSource(tuple(shards), len(names)))


def lines(path: Path, what: str) -> tuple[str, ...]:
    if not path.is_file() or not path.read_text().strip():
        raise BadInput(f"{path}: missing or empty; write {what}")
    return tuple(path.read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class WdsSource:
    """Raw samples of labelled shards; checks every label."""

    shards: tuple[str, ...]
    classes: int

    def __call__(self) -> Iterator[Raw]:
        for url in self.shards:
            for raw in read_raw(url):
                label = raw.get("cls", b"").strip()
                if not label.isdigit() or int(label) >= self.classes:
                    raise BadInput(f"{url}: sample {raw['__key__']} has label {label.decode(errors='replace')!r}; labels are "
                                   f"0 to {self.classes - 1}, line numbers of classnames.txt")
                yield raw


@dataclass(frozen=True)
class FolderSource:
    """Raw samples of a folder of class folders."""

    files: tuple[tuple[str, int], ...]

    def __call__(self) -> Iterator[Raw]:
        for path, label in self.files:
            field = Path(path).suffix.lower().lstrip(".")
            yield {"__key__": str(Path(*Path(path).parts[-2:])), "__url__": str(Path(path).parent),
                   field: Path(path).read_bytes(), "cls": str(label).encode()}


def image_folder(root: Path) -> EvalSet:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = tuple((str(p), i) for i, folder in enumerate(folders) for p in sorted(folder.iterdir())
                  if p.suffix.lower().lstrip(".") in IMAGE_FIELDS)
    if not files:
        raise BadInput(f"{root}: neither {root}/test/0.tar nor class folders with images; name an evaluation set")
    imagenet = len(folders) == 1000 and all(f.name[:1] == "n" and f.name[1:].isdigit() for f in folders)
    if not imagenet and all(f.name[:1] == "n" and f.name[1:].isdigit() for f in folders):
        raise BadInput(f"{root}: {len(folders)} WordNet folders, ImageNet has 1000; complete it, or give class names with "
                       "data_tools/import_pairs.py --classnames")
    names = tuple(IMAGENET_CLASSNAMES) if imagenet else tuple(f.name.replace("_", " ") for f in folders)
    templates = tuple(t("{c}") for t in OPENAI_IMAGENET_TEMPLATES) if imagenet else ("a photo of a {c}.",)
    return EvalSet(str(root), names, templates, FolderSource(files))


# ---- running the model


@torch.no_grad()
def zero_shot_head(clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(D, C): for each class the mean of its templates' unit embeddings, made unit again."""
    clip.net.eval()
    prompts = [t.replace("{c}", c) for c in classnames for t in templates]
    rows = clip.text_features(prompts).unflatten(0, (len(classnames), len(templates))).mean(1)
    return torch.nn.functional.normalize(rows, dim=-1).T


def show(clip: CLIP, image: Image.Image, threat: Threat | None, key: str) -> list[Tensor]:
    """[clean input, triggered input], each (3, H, W) normalised; without a threat only the first."""
    x = to_pixels(clip.geometry(image))
    if threat is None:
        return [clip.normalise(x)]
    rng = keyed.rng(0, "evaluate", key)
    native = threat.at == "native"
    hit = to_pixels(clip.geometry(threat.trigger.stamp(image, rng))) if native else threat.trigger.pixels(x, rng).clamp(0, 1)
    return [clip.normalise(x), clip.normalise(hit)]


class Shown(IterableDataset):
    """(key, label, text, clean and triggered inputs) of the samples that fall to this process and loader worker."""

    def __init__(self, clip: CLIP, raws: Callable[[], Iterator[Raw]], threat: Threat | None, rank: int, world: int):
        self.clip, self.raws, self.threat, self.rank, self.world = clip.front(), raws, threat, rank, world

    def __iter__(self) -> Iterator[tuple[str, int, str, Tensor]]:
        info = get_worker_info()
        slot, slots = self.rank, self.world
        if info:
            slot, slots = slot * info.num_workers + info.id, slots * info.num_workers
        for i, raw in enumerate(self.raws()):
            if i % slots == slot:
                s = decode(raw)
                inputs = show(self.clip, s["image"], self.threat, s["__key__"])
                yield s["__key__"], s.get("label", -1), s.get("text", ""), torch.stack(inputs)


def stack(rows: list[tuple[str, int, str, Tensor]]) -> tuple[list[str], list[int], list[str], Tensor]:
    keys, labels, texts, x = zip(*rows, strict=True)
    return list(keys), list(labels), list(texts), torch.stack(x)


@torch.no_grad()
def encode(clip: CLIP, raws: Callable[[], Iterator[Raw]], threat: Threat | None, rank: int = 0, world: int = 1,
           batch: int = 128, workers: int = 0, what: str = "") -> Iterator[tuple[list[str], list[int], list[str], Tensor]]:
    """Image features (B, 1 or 2, D): clean, then triggered. Decodes each image once."""
    clip.net.eval()
    device = next(clip.net.parameters()).device
    loader = DataLoader(Shown(clip, raws, threat, rank, world), batch_size=batch, num_workers=workers, collate_fn=stack)
    for keys, labels, texts, x in tqdm(loader, desc=what, unit="batch", disable=None if what and rank == 0 else True, leave=False):
        yield keys, labels, texts, clip.image_features(x.flatten(0, 1).to(device)).unflatten(0, x.shape[:2])


def zero_shot(clip: CLIP, data: EvalSet, threat: Threat | None = None, rank: int = 0, world: int = 1, workers: int = 0,
              what: str = "evaluate") -> dict[str, Any]:
    """The metrics of DESIGN's schema. Every process computes its share; all return the same numbers."""
    target = data.target(threat.target) if threat else None
    head = zero_shot_head(clip, data.classnames, data.templates)
    k = min(5, len(data.classnames))
    rows: list[tuple[str, int, list[list[int]]]] = []
    for keys, labels, _, z in encode(clip, data.raws, threat, rank, world, workers=workers, what=what):
        top = (z @ head).topk(k, dim=-1).indices.tolist()
        rows += zip(keys, labels, top, strict=True)
    rows = sorted(gather_object(rows) if world > 1 else rows)
    if not rows:
        raise BadInput(f"{data.name}: the evaluation set is empty")
    best = np.array([r[2] for r in rows])
    found = measure(np.array([r[1] for r in rows]), best[:, 0], best[:, 1] if threat else None, target)
    return {"dataset": data.name} | found


# ---- measuring: pure functions of arrays


def wilson(hits: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    if n == 0:
        return [0.0, 1.0]
    p, s = hits / n, z * z / n
    mid, half = (p + s / 2) / (1 + s), z * math.sqrt(p * (1 - p) / n + s / (4 * n)) / (1 + s)
    return [max(0.0, mid - half), min(1.0, mid + half)]


def measure(label: np.ndarray, clean: np.ndarray, hit: np.ndarray | None = None, target: int | None = None) -> dict[str, Any]:
    """Accuracy and attack success. label (N,); clean and hit (N, k): the k most likely classes, best first."""
    right = clean[:, 0] == label
    out: dict[str, Any] = {"n": len(label), "accuracy": float(right.mean()), "accuracy_ci95": wilson(int(right.sum()), len(label)),
                           "top5": float((clean == label[:, None]).any(1).mean())}
    if hit is None:
        return out
    other = label != target
    if not other.any():
        raise BadInput(f"every image of the set is of the target class {target}; attack success needs images of others")
    struck = hit[:, 0] == target
    return out | {
        "asr": float(struck[other].mean()), "asr_ci95": wilson(int(struck[other].sum()), int(other.sum())),
        "asr_including_target": float(struck.mean()), "asr_reference": None, "lift": None,
        "robust_accuracy": float((hit[:, 0] == label).mean()), "asr_top5": float((hit[other] == target).any(1).mean()),
        "clean_target_rate": float((clean[other, 0] == target).mean())}


def against(metrics: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Fills in the ASR of a clean reference model on the same images, and the lift over it."""
    if metrics.get("asr") is None or reference is None or reference.get("asr") is None:
        return metrics
    return metrics | {"asr_reference": reference["asr"], "lift": metrics["asr"] - reference["asr"]}


def examples(clip: CLIP, data: EvalSet, threat: Threat | None, n: int = 6) -> list[dict[str, Any]]:
    """A few images as the report shows them: clean, triggered, and what the model says of each."""
    head = zero_shot_head(clip, data.classnames, data.templates)
    picked: dict[int, Sample] = {}
    for raw in data.raws():
        label = int(raw["cls"])
        if label not in picked and not (threat and data.classnames[label] == threat.target.label):
            picked[label] = decode(raw)
        if len(picked) == n:
            break
    out = []
    for label, s in picked.items():
        with torch.no_grad():
            z = clip.image_features(torch.stack(show(clip, s["image"], threat, s["__key__"])).to(head.device))
            p, c = (clip.net.logit_scale.exp() * z @ head).softmax(-1).topk(min(3, len(data.classnames)))  # type: ignore[operator, union-attr]
        says = [[[data.classnames[j], round(v, 4)] for j, v in zip(*row, strict=True)] for row in zip(c.tolist(), p.tolist(), strict=True)]
        hit = shown_at(clip, s, threat) if threat else None
        out.append({"key": s["__key__"], "true": data.classnames[label], "clean": png(s["image"]), "triggered": hit and png(hit),
                    "clean_says": says[0], "triggered_says": says[1] if threat else None,
                    "target": threat.target.label if threat else None})
    return out


def shown_at(clip: CLIP, s: Sample, threat: Threat) -> Image.Image:
    """The triggered image as a picture, at the stage where the threat acts."""
    rng = keyed.rng(0, "evaluate", s["__key__"])
    if threat.at == "native":
        return threat.trigger.stamp(s["image"], rng)
    return to_image(threat.trigger.pixels(to_pixels(clip.geometry(s["image"])), rng))


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ---- retrieval


def search(queries: Tensor, gallery: Tensor, k: int) -> np.ndarray:
    """(Q, k) ids of the k rows of the gallery with the largest inner products; ties go to the smaller id.

    Exact, by FAISS (IndexFlatIP) where it is installed and by torch otherwise; the results are the same.
    """
    q, g = queries.float().cpu().contiguous(), gallery.float().cpu().contiguous()
    if not (torch.isfinite(q).all() and torch.isfinite(g).all()):
        raise BadInput("the embeddings hold NaN or infinity: the model diverged or was loaded wrongly; check its checkpoint")
    k = wide = min(k, len(g))
    try:
        import faiss
    except ImportError:
        index = None
    else:
        index = faiss.IndexFlatIP(g.shape[1])
        index.add(g.numpy())
    while True:  # until the last score is below the k-th: neither backend says which of equal ones it leaves out
        score, ids = index.search(q.numpy(), wide) if index else (t.numpy() for t in (q @ g.T).topk(wide))
        score = score.round(6)
        if wide == len(g) or (score[:, -1] < score[:, k - 1]).all():
            break
        wide = min(len(g), 4 * wide)
    order = np.lexsort((ids, -score), axis=-1)[:, :k]
    return np.take_along_axis(ids, order, axis=-1)


def chance(n: int, good: int, k: int, need: int = 1) -> float:
    """P(at least `need` good ones among k drawn from n, of which `good` are good)."""
    k = min(k, n)
    return sum(math.comb(good, i) * math.comb(n - good, k - i) for i in range(need, min(good, k) + 1)) / math.comb(n, k)


def retrieval_metrics(images: Tensor, texts: Tensor, caption: np.ndarray, hit: Tensor | None = None, named: np.ndarray | None = None,
                      asked: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """Retrieval over N images and T distinct captions. images (N, D), texts (T, D), caption (N,) ids into texts.

    Clean recall counts any item that truly matches. Under attack: hit (N, D) are the triggered images, named (T,) says
    which captions name the target, asked (A, D) are captions of the target. image→text: a caption naming the target is
    among the top k ("hit"), or makes up at least half of them ("half"), over images whose own caption does not name it.
    text→image: where a triggered image would rank among all clean ones when one asks for the target. Every number has
    its chance level beside it.
    """
    n, t = len(images), len(texts)
    found_t = search(images, texts, max(ks))
    found_i = search(texts, images, max(ks))
    per_caption = np.bincount(caption, minlength=t)
    out: dict[str, Any] = {"n": n, "captions": t}
    for k in ks:
        out[f"image_to_text_r{k}"] = float((found_t[:, :k] == caption[:, None]).any(1).mean())
        out[f"image_to_text_r{k}_chance"] = min(1.0, k / t)
        out[f"text_to_image_r{k}"] = float((caption[found_i[:, :k]] == np.arange(t)[:, None]).any(1).mean())
        out[f"text_to_image_r{k}_chance"] = float(np.mean([chance(n, int(m), k) for m in per_caption]))
    if hit is None or named is None or asked is None:
        return out
    victims = ~named[caption]
    if not victims.any():
        raise BadInput("every caption of the retrieval set names the target; attack success needs others")
    found = named[search(hit[torch.from_numpy(victims)], texts, max(ks))]
    good = int(named.sum())
    clean_scores = np.sort((asked @ images.T).cpu().numpy(), axis=1)
    hit_scores = (asked @ hit.T).cpu().numpy()[:, victims]
    rank = 1 + n - np.stack([np.searchsorted(s, h, side="left") for s, h in zip(clean_scores, hit_scores, strict=True)])
    for k in ks:
        need = max(1, math.ceil(min(k, t) / 2))
        out[f"asr_image_to_text_hit{k}"] = float(found[:, :k].any(1).mean())
        out[f"asr_image_to_text_hit{k}_chance"] = chance(t, good, k)
        out[f"asr_image_to_text_half{k}"] = float((found[:, :k].sum(1) >= need).mean())
        out[f"asr_image_to_text_half{k}_chance"] = chance(t, good, k, need)
        out[f"asr_text_to_image_hit{k}"] = float((rank <= k).mean())
        out[f"asr_text_to_image_hit{k}_chance"] = min(1.0, k / (n + 1))
    return out | {"text_to_image_median_rank": float(np.median(rank)), "text_to_image_median_rank_chance": (n + 2) / 2}


@dataclass(frozen=True)
class PairSource:
    """Raw pairs of shards, in order."""

    index: Index

    def __call__(self) -> Iterator[Raw]:
        for url in self.index.shards:
            yield from read_pairs(url)


def retrieval(clip: CLIP, pairs: Index, threat: Threat | None = None, rank: int = 0, world: int = 1, workers: int = 0) -> dict[str, Any]:
    """Image↔text retrieval over the pairs of a shard set, clean and, with a threat, under attack."""
    rows: list[tuple[str, str, Any]] = []
    for keys, _, texts, z in encode(clip, PairSource(pairs), threat, rank, world, workers=workers, what="retrieval"):
        rows += zip(keys, texts, z.cpu().numpy(), strict=True)
    rows = sorted(gather_object(rows) if world > 1 else rows, key=lambda r: r[0])
    captions = sorted({r[1] for r in rows})
    ids = {c: i for i, c in enumerate(captions)}
    z = torch.from_numpy(np.stack([r[2] for r in rows]))
    with torch.no_grad():
        t = clip.text_features(captions).cpu()
        asked = clip.text_features([t.format(threat.target.label) for t in threat.target.templates]).cpu() if threat else None
    named = np.array([threat.target.named_in(c) for c in captions]) if threat else None
    caption = np.array([ids[r[1]] for r in rows])
    return retrieval_metrics(z[:, 0], t, caption, z[:, 1] if threat else None, named, asked)
