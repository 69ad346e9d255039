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


OBJECTIVES = ["clip", "siglip", "siglip cleaned", "cleanclip", "cleanclip symmetric", "cleanerclip", "augmented", "last layer", "par",
              "abd", "abl", "abl local", "compress", "slip", "localized slip", "roclip plain", "roclip matched", "safeclip unimodal",
              "safeclip slow", "safeclip mixed", "rvpt", "cbpt"]
KEPT = {"par": "before", "abd": "delta", "abl": "isolated", "abl local": "isolated", "compress": "banks", "slip": "mlps",
        "localized slip": "mlps", "roclip plain": "captions", "roclip matched": "captions", "safeclip unimodal": "banks",
        "safeclip slow": "banks", "safeclip mixed": "safe", "cbpt": "found"}
"""What an objective must have in its state after a step."""


def close(one, two, where=""):
    """Asserts that two told values are the same but for the order of sums in double precision."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for k in one:
            close(one[k], two[k], f"{where}.{k}")
    elif isinstance(one, list) and len(one) == 3 and isinstance(one[2], list):
        (shape, norm, sample), (other_shape, other_norm, other) = one, two
        assert shape == other_shape and norm == pytest.approx(other_norm, rel=1e-9, abs=1e-12), where
        assert sample == pytest.approx(other, abs=1e-9 * max(max(map(abs, sample), default=0.0), 1e-3)), where
    else:
        assert one == pytest.approx(two, rel=1e-9, abs=1e-12) if isinstance(one, float) else one == two, where


def test_every_objective_is_looked_at(one_and_two):
    assert all(list(f["objectives"]) == OBJECTIVES for f in one_and_two)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_those_of_one_process(one_and_two, objective):
    one, two = (f["objectives"][objective] for f in one_and_two)
    for a, b in zip(one["losses"], two["losses"], strict=True):
        close(a, b, "loss")
    assert one["losses"][0]["loss"] != one["losses"][1]["loss"]
    few = {"last layer": 3, "rvpt": 1, "cbpt": 1}.get(objective)  # parts that are trained, where most are frozen
    assert len(one["grads"]) == (few or len(one["grads"])) and sum(norm > 0 for _, norm, _ in one["grads"].values()) >= (few or 16)
    close(one["grads"], two["grads"], "gradient")


@pytest.mark.parametrize("objective", ["slip", "localized slip"])
def test_each_process_has_the_whole_gradient_of_the_heads(one_and_two, objective):
    one, two = (f["objectives"][objective]["each"] for f in one_and_two)
    assert len(one[0]["heads"]) == {"slip": 14, "localized slip": 7}[objective] and all(norm > 0 for _, norm, _ in one[0]["heads"].values())
    assert two[0]["heads"] == two[1]["heads"] and two[0]["buffers"] == two[1]["buffers"], "to the bit, as nothing else keeps them in step"
    close(one[0]["heads"], two[0]["heads"], "gradient")
    close(one[0]["buffers"], two[0]["buffers"], "running statistics")


@pytest.mark.parametrize("objective", KEPT)
def test_what_an_objective_keeps_is_the_same_on_both_processes_and_on_one(one_and_two, objective):
    one, two = (f["objectives"][objective]["each"] for f in one_and_two)
    assert one[0]["state"][KEPT[objective]] and two[0]["state"] == two[1]["state"], "to the bit, since one process saves it for all"
    close(one[0]["state"], two[0]["state"], "state")


def test_banks_hold_the_rows_of_both_processes(one_and_two):
    for f in one_and_two:
        states = {name: found["each"][-1]["state"] for name, found in f["objectives"].items()}
        held = [states["roclip plain"]["captions"], states["roclip matched"]["captions"], *states["compress"]["banks"].values(),
                *states["safeclip unimodal"]["banks"].values(), *states["safeclip mixed"]["banks"].values()]
        assert [bank["rows"][0] for bank in held] == [[80, 32]] * 10, "of two steps with 48 pairs each"


def test_an_edit_is_the_same_on_both_processes_and_on_one(one_and_two):
    (one,), (first, second) = (f["edited"] for f in one_and_two)
    assert first == second
    close(one, first, "weights")


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


def test_two_gathers_that_are_added_have_the_same_gradient(one_and_two):
    one, two = (f["shared_gradient"] for f in one_and_two)
    assert one == [[[0, 1]] * 2] and two == [[[0, 2]] * 2, [[4, 6]] * 2]


def test_each_process_has_the_running_statistics_that_are_saved(one_and_two):
    for f in one_and_two:
        assert all(held == saved == f["statistics"][0][0] for held, saved in f["statistics"])
        assert any(norm > 0 for name, (_, norm, _) in f["statistics"][0][0].items() if name.endswith("running_mean"))


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
