"""Train one recipe.

    accelerate launch train.py configs/toy/badnets.py --epochs 2 --poison.rate 0.01
    accelerate launch --config_file configs/accelerate/8gpu.yaml train.py configs/cc3m/badnets.py
    torchrun --nproc_per_node 2 train.py configs/toy/badnets.py          (several processes on a CPU)

1 begin the run   2 index the data, plan the poison   3 build model and stream   4 fit   5 evaluate   6 write the results
"""
import copy
import sys
from functools import partial

from mmbackdoor import clip, evaluate, fit, recipe, run, shards
from mmbackdoor.poison import Plan, plan, poison, publish
from mmbackdoor.stream import Stream


def train(r: recipe.Recipe) -> dict:
    accelerator = run.begin(r)  # 1
    folder, rank, world, main = r.directory, accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    sets = [evaluate.open_set(p) for p in map(r.data.path, ("validation", "zero_shot")) if p]
    for s in sets if r.fires else []:
        s.target(r.fires.target)  # a wrong target class is told now, not after training

    index = shards.index(r.data.path("train"), r.data.incomplete)  # 2
    truth = plan(r.poison, index, r.seed) if r.poison else Plan()
    added = list(publish(r.poison, truth)) if r.poison else []
    if main:
        truth.save(folder / "plan.parquet")
        if added:
            shards.write_shard(folder / "published" / "00000.tar", added)
    accelerator.wait_for_everyone()
    if added:
        index = shards.index(f"{r.data.path('train')}::{folder / 'published'}", r.data.incomplete)

    model = clip.load(r.model, run.weights(r.init), r.aug, r.seed)  # 3
    objective = copy.deepcopy(r.objective)
    stream = Stream(index, model, objective.views, r.batch_size * r.schedule.accum_freq,
                    [partial(poison, attack=r.poison, plan=truth)] if r.poison else [], run.keep_list(r.keep), r.seed,
                    r.shuffle, r.lanes, r.workers, rank, world, r.data.incomplete)

    def curves(epoch: int) -> dict:
        if not sets or not r.eval_frequency or epoch % r.eval_frequency:
            return {}
        found = evaluate.zero_shot(model, sets[0], r.fires, rank, world, r.workers, what="validation")
        return {k: found[k] for k in ("accuracy", "asr") if k in found}

    done = fit.fit(model, objective, stream, accelerator, r.schedule, folder, resume=r.resume == "latest",  # 4
                   save_frequency=r.save_frequency, save_steps=r.save_steps, seed=r.seed, each_epoch=curves)

    metrics = run.compare(run.measure(model, r.data, r.fires, rank, world, r.workers), r.reference, r.fires)  # 5
    data = {"pairs": len(index), "poisoned": len(truth.keys) + len(added), "incomplete": index.incomplete, "fingerprint": index.fingerprint}
    found = run.result(r, accelerator, metrics, cost=fit.cost(done), data=data)
    if main:  # 6
        model.save(folder)
        shards.write_json(folder / "examples.json", evaluate.examples(model, sets[-1], r.fires) if sets else [])
        shards.write_json(folder / "results.json", found)
        print(run.line(found), flush=True)
    accelerator.end_training()
    return found


@recipe.told
def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if set(sys.argv) & {"-h", "--help"} else 2)
    train(recipe.load(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
