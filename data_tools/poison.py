"""Write poisoned shards: the attack of a recipe on its training data, once and for all.

    python data_tools/poison.py configs/toy/badnets.py --data.train data/toy/train --out data/toy-badnets
    python train.py configs/toy/from_disk.py                              (trains on them)

The poisons are those that training with the same recipe would see online, byte for byte. Shards keep their names,
members and order; untouched shards are copied as they are. OUT also gets plan.parquet (the ground truth) and
manifest.json. A rerun goes on with the shards that are missing.
"""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from mmbackdoor import recipe, shards
from mmbackdoor.poison import plan, poison, publish
from mmbackdoor.types import BadInput


def main(r: recipe.Recipe, out: Path) -> None:
    if r.poison is None:
        raise BadInput(f"{r.name}: its recipe poisons nothing; name one with poison=…, such as configs/toy/badnets.py")
    index = shards.index(r.data.path("train"), r.data.incomplete)
    truth = plan(r.poison, index, r.seed)
    manifest = {"attack": recipe.plain(r.poison), "seed": r.seed, "poisoned": len(truth.keys), "pairs": len(index),
                "source": index.fingerprint}
    added = list(publish(r.poison, truth))
    if again := {raw["__key__"] for raw in added} & {key for key, _ in index}:
        raise BadInput(f"key {min(again)}, which the attack publishes, is in the data already; publish other keys")
    truth = replace(truth, added=frozenset(raw["__key__"] for raw in added))
    names = [os.path.basename(url) for url in index.shards]
    if twice := [n for n in names if names.count(n) > 1]:
        raise BadInput(f"{twice[0]}: two of the shards have this name, one would replace the other; poison each folder on its own")
    begun = out / "manifest.json"
    if out.exists() and any(out.iterdir()) and not (begun.is_file() and json.loads(begun.read_text()) == manifest):
        raise BadInput(f"{out}: exists and was not written by this recipe from these shards; remove it or name another place")
    shards.write_json(begun, manifest)
    truth.save(out / "plan.parquet")
    for url in tqdm(index.shards, desc="poison", unit="shard", disable=None):
        target = out / os.path.basename(url)
        if not target.exists():
            planned = [raw for raw in shards.read_pairs(url) if raw["__key__"] in truth.keys]
            for raw in planned if r.data.incomplete == "refuse" else ():
                shards.decode(raw)
            shards.splice(url, target, {raw["__key__"]: raw for raw in poison(planned, r.poison, truth)})
    if added:
        number = next(i for i in range(len(names), 10**9) if f"{i:05d}.tar" not in names)
        shards.write_shard(out / f"{number:05d}.tar", added)
    sizes = {}
    for url in shards.expand(str(out)):
        keys, _, lacking = shards.index_shard(url)
        sizes[os.path.basename(url)] = len(keys) + len(lacking)
    shards.write_json(out / "sizes.json", sizes)
    print(f"{out}: {len(truth.keys) + len(added)} of {len(index) + len(added)} pairs poisoned; which ones is in {out}/plan.parquet")


@recipe.told
def cli() -> None:
    r = recipe.from_command_line(__doc__)
    if not any(a == "--out" or a.startswith("--out=") for a in sys.argv):
        raise BadInput("--out is missing: name the folder for the poisoned shards")
    main(r, Path(r.out))


if __name__ == "__main__":
    cli()
