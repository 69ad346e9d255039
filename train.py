"""Train one recipe.

    accelerate launch train.py configs/toy/badnets.py --epochs 2 --poison.rate 0.01
    accelerate launch --config_file configs/accelerate/8gpu.yaml train.py configs/cc3m/badnets.py
    torchrun --nproc_per_node 2 train.py configs/toy/badnets.py          (several processes on a CPU)

1 craft a trigger, begin the run   2 index the data, plan the poison   3 model and stream   4 fit   5 evaluate   6 write the results
"""
import copy
from functools import partial

from mmbackdoor import clip, fit, recipe, run
from mmbackdoor.features import How
from mmbackdoor.stream import Stream


def train(r: recipe.Recipe) -> dict:
    run.craft(r)  # 1
    accelerator = run.begin(r)
    rank, world = accelerator.process_index, accelerator.num_processes
    how = How(rank, world, r.workers)
    sets = run.open_sets(r.data, r.fires)

    index, stages, truth = run.data(r, accelerator)  # 2

    model = run.edited(r, clip.load(r.model, run.weights(r.init), r.aug, r.seed), index, stages)  # 3
    objective = copy.deepcopy(r.objective)
    stream = Stream(index, model, objective.views, r.batch_size * r.schedule.accum_freq, stages, run.seen(r, index), r.seed,
                    r.shuffle, r.lanes, r.workers, rank, world, r.data.incomplete)
    run.describe(r, index, truth, accelerator)

    done = fit.fit(model, objective, stream, accelerator, r.schedule, r.directory, resume=r.resume == "latest",  # 4
                   save_frequency=r.save_frequency, save_steps=r.save_steps, seed=r.seed,
                   each_epoch=partial(run.curves, model, r, sets, how))

    metrics = run.measure(model, sets, r.fires, how, r.directory / "results")  # 5
    metrics = run.compare(metrics, r.reference, r.fires, sets, how)
    data = {"pairs": len(index), "poisoned": len(truth.keys | truth.added), "incomplete": index.incomplete,
            "undecodable": done.skipped, "fingerprint": index.fingerprint, "stealth": run.visible(index, stages, truth)}
    return run.finish(r, model, sets, accelerator, metrics, cost=fit.cost(done), data=data)  # 6


@recipe.told
def main() -> None:
    train(recipe.from_command_line(__doc__))


if __name__ == "__main__":
    main()
