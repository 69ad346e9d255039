"""Write poisoned shards: the attack of a recipe on its training data, once and for all.

    python data_tools/poison.py configs/toy/badnets.py --data.train data/toy/train --out data/toy-badnets
    python data_tools/poison.py configs/cc3m/badnets.py --data.train 's3://clean/{00000..00331}.tar' --out s3://poisoned \\
        --dask-scheduler tcp://HOST:8786
    python data_tools/poison.py configs/toy/badnets.py --out data/toy-patch --form patch       (the changed samples only)
    python train.py configs/toy/from_disk.py                                                   (trains on the first)

The poisons are those that training with the same recipe would see online, byte for byte. Shards keep their names,
members and order, and every byte of what is not planned. OUT also gets plan.parquet (the ground truth), manifest.json,
sizes.json, and a NNNNN_stats.json for each shard that is done. A rerun, or another task of an array job, goes on with the
shards that are missing. --verify then proves that nothing else differs, and OUT/verified.json says what does.
"""
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from mmbackdoor import craft, forms, index, recipe, stores
from mmbackdoor.poison import Plan
from mmbackdoor.spread import Spread
from mmbackdoor.triggers import tensors
from mmbackdoor.types import BadInput


@dataclass(frozen=True)
class Command:
    recipe: Annotated[tyro.conf.AvoidSubcommands[recipe.Recipe], tyro.conf.arg(name="")]
    form: forms.Form = "shards"
    """Whole shards, or a patch set: the changed samples alone, which --data.patch lays over the clean shards."""
    plan_only: bool = False
    """Write the plan and the manifest and stop there; the tasks of an array job then need not plan."""
    verify: bool = False
    """Compare what this task wrote with its source, byte by byte."""
    spread: tyro.conf.OmitArgPrefixes[Spread] = Spread()


def main(c: Command) -> None:
    r, out = c.recipe, c.recipe.out.rstrip("/")
    if r.attack is None:
        raise BadInput(f"{r.name}: its recipe poisons nothing; name one with poison=…, such as configs/toy/badnets.py")
    if r.data.share != 1:
        raise BadInput(f"--data.share {r.data.share}: whole shards are poisoned, and training would choose its poisons among the share; "
                       "use 1 here, or poison online")
    if file := craft.crafted(r.attack):
        tensors(file)  # told before the folder is begun, whose manifest holds the file's hash
    found = index.find(r.data.path("train"), r.data.incomplete, r.data.path("index"))
    given = Plan.load(r.plan) if r.plan else None
    attack = recipe.plain(r.attack)
    attack |= {"files": recipe.files(attack)}
    with c.spread.executor() as executor:
        work = forms.prepare(r.attack, found, r.seed, out, attack, c.form, r.codec, r.data.incomplete, given, executor,
                             c.spread)
        share, where = f"{len(work.plan)} of {len(found) + len(work.plan.added)} pairs", f"which ones is in {out}/{forms.PLAN}"
        if given and (lost := len(given.keys) - len(work.plan.keys)):
            where += f"; {lost} others that {r.plan} names are not in these shards"
        if c.plan_only:
            print(f"{out}: {share} planned; {where}")
            return
        missing = forms.make(work, executor)
        print(f"{out}: {missing} of {len(work.names)} shards are missing yet, which other tasks write" if missing
              else f"{out}: {share} poisoned; {where}")
        if c.verify:
            changed = forms.verify(work, executor)
            name = "verified.json" if c.spread.num_tasks == 1 else f"verified-{c.spread.task_index}.json"
            stores.write_json(stores.join(out, name), {"changed": changed})
            whole = c.form == "shards"
            proved = "members changed, all of them planned, and no other byte" if whole else "samples, each as the attack makes it"
            print(f"{out}: {len(changed)} {proved}; which ones is in {out}/{name}")


@recipe.told
def cli() -> None:
    command = recipe.from_command_line(__doc__, Command)
    if not any(a == "--out" or a.startswith("--out=") for a in sys.argv):
        raise BadInput("--out is missing: name the folder for the poisoned shards")
    main(command)


if __name__ == "__main__":
    cli()
