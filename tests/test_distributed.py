"""Two processes (gloo) against one: the same plan, batches, loss, gradients, weights and numbers."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("distributed_program.py")


@pytest.fixture(scope="module")
def one_and_two(toy, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    found = []
    for n in (1, 2):
        out = folder / f"{n}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
        done = subprocess.run([sys.executable, *launcher, str(PROGRAM), str(toy), str(tiny_model), str(out)],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    assert [f["world"] for f in found] == [1, 2]
    return found


@pytest.mark.parametrize("objective", ["clip", "cleanclip", "siglip"])
def test_loss_and_gradients_are_those_of_one_process(one_and_two, objective):
    one, two = (f[objective] for f in one_and_two)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert one["grads"].keys() == two["grads"].keys() and len(one["grads"]) > 20
    for name, grad in one["grads"].items():
        scale = max(map(abs, grad))
        assert two["grads"][name] == pytest.approx(grad, abs=1e-9 * max(scale, 1e-3)), name


def test_plan_is_the_same(one_and_two):
    one, two = (f["training"]["plan"] for f in one_and_two)
    assert one == two and len(one) > 0


def test_every_pair_is_seen_once_and_the_same_ones(one_and_two):
    one, two = (f["training"]["seen"] for f in one_and_two)
    assert one == two and len(set(one)) == len(one)


def test_training_takes_the_same_course(one_and_two):
    one, two = (f["training"] for f in one_and_two)
    for a, b in zip(one["log"][1:], two["log"][1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert one["weights"] == pytest.approx(two["weights"], rel=1e-5)


def test_evaluation_gives_the_same_numbers_on_two_processes_for_every_size_of_set(one_and_two):
    one, two = (f["evaluation"] for f in one_and_two)
    for n in ("1", "7", "8", "9", "16", "49"):
        a, *others = [{k: v for k, v in m.items() if k != "dataset"} for m in (*one[n], *two[n])]
        assert a["n"] == int(n) and len(a["threats"]) == 2 and all(b == a for b in others)
    assert one["all"] == two["all"] and {"zero_shot", "retrieval", "linear_probe", "knn", "few_shot"} == set(one["all"])
    assert one["tables"] == two["tables"] and len(one["tables"]) == 2


def test_a_loss_past_the_wrapper_is_told(one_and_two):
    one, two = (f["out_of_step"] for f in one_and_two)
    assert one == "" and "model.module" in two
