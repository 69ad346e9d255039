"""The programs as a user runs them, on a network and a data set that take seconds."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_program
from PIL import Image

from mmbackdoor import recipe, stores

ROOT = Path(__file__).parent.parent
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "configs/accelerate/cpu.yaml"]


def run(*words, status=0, **env):
    done = subprocess.run([str(w) for w in words], cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | env)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def runs(toy, tiny_model, tmp_path_factory):
    """A tiny clean run and a poisoned one, which the launcher starts."""
    out = tmp_path_factory.mktemp("runs")
    common = ["--data.root", toy, "--model.name", tiny_model, "--out", out, "--epochs", "2", "--batch-size", "32", "--warmup", "2"]
    run(sys.executable, "train.py", "configs/toy/clean.py", *common)
    run(*ACCELERATE, "train.py", "configs/toy/badnets.py", *common, "--poison.rate", "0.05", "--reference", out / "toy/clean",
        "--report-to", "tensorboard", "--workers", "1")
    return out


def test_train_writes_the_run_directory_of_the_design(runs, toy):
    folder = runs / "toy/badnets"
    found = json.loads((folder / "results.json").read_text())
    assert found["schema"] == 1 and found["name"] == "toy/badnets" and found["seed"] == 0
    assert found["data"]["poisoned"] == round(0.05 * found["data"]["pairs"])
    zero_shot = found["metrics"]["zero_shot"]
    assert {"dataset", "n", "accuracy", "accuracy_ci95", "top5", "asr", "asr_ci95", "asr_including_target", "asr_reference", "lift",
            "robust_accuracy", "asr_top5"} <= zero_shot.keys()
    assert zero_shot["lift"] == pytest.approx(zero_shot["asr"] - zero_shot["asr_reference"])
    assert {"train_seconds", "samples_seen", "samples_per_second", "peak_memory_mb"} <= found["cost"].keys()
    assert found["metrics"]["retrieval"]["n"] > 0
    assert found["data"]["stealth"]["n"] == found["data"]["poisoned"] and 10 < found["data"]["stealth"]["psnr_mean"] < 60
    for name in ("recipe.py.txt", "plan.parquet", "log.jsonl", "out.log", "examples.json", "open_clip_config.json",
                 "open_clip_model.safetensors", "checkpoints/epoch_latest.pt"):
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.rglob("events.out.tfevents*"))


def test_eval_repeats_the_numbers_of_training(runs):
    before = json.loads((runs / "toy/badnets/results.json").read_text())
    run(*ACCELERATE, "eval.py", runs / "toy/badnets")
    after = json.loads((runs / "toy/badnets/results.json").read_text())
    assert after["metrics"] == before["metrics"] and after["cost"] == before["cost"]


def test_a_reference_is_shown_what_it_was_not_shown_before(runs, toy, tmp_path):
    """The clean run was measured under the corner patch; asked for the lift of another trigger, it is measured under that."""
    (tmp_path / "configs").mkdir()
    config = tmp_path / "other.py"
    config.write_text("from dataclasses import replace\nfrom configs.toy.badnets import recipe as badnets\n"
                      "from mmbackdoor.types import Threat\nfrom mmbackdoor.triggers import Blend\n"
                      "recipe = replace(badnets, threat=Threat(Blend(0.5), badnets.poison.target))\n")
    numbers = tmp_path / "numbers.json"
    run(sys.executable, "eval.py", runs / "toy/badnets", "--threat", config, "--reference", runs / "toy/clean", "--out", numbers)
    found = json.loads(numbers.read_text())["metrics"]
    run(sys.executable, "eval.py", runs / "toy/clean", "--threat", config, "--out", numbers)
    clean = json.loads(numbers.read_text())["metrics"]
    assert found["zero_shot"]["asr_reference"] == clean["zero_shot"]["asr"]
    assert found["retrieval"]["asr_text_to_image_hit10_reference"] == clean["retrieval"]["asr_text_to_image_hit10"]


def test_eval_takes_a_bare_checkpoint_a_set_and_a_threat(runs, toy, tmp_path, tiny_model):
    bare = tmp_path / "theirs.pt"
    bare.write_bytes((runs / "toy/badnets/checkpoints/epoch_latest.pt").read_bytes())
    run(sys.executable, "eval.py", bare, "--model", tiny_model, "--dataset", toy / "test", "--threat", "configs/toy/badnets.py",
        "--out", tmp_path / "numbers.json")
    theirs = json.loads((tmp_path / "numbers.json").read_text())["metrics"]["zero_shot"]
    ours = json.loads((runs / "toy/badnets/results.json").read_text())["metrics"]["zero_shot"]
    assert (theirs["accuracy"], theirs["asr"]) == (ours["accuracy"], ours["asr"])


def test_eval_measures_several_threats_with_probes_from_a_cache_and_writes_tables(runs, toy, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("from dataclasses import replace\nfrom configs.toy.badnets import recipe\nfrom mmbackdoor.triggers import Blend\n"
                     "from mmbackdoor.types import Target\nrecipe = replace(recipe, name='other', poison=replace(recipe.poison, "
                     "trigger=Blend(), target=Target('blue ring')))\n")
    call = ["eval.py", runs / "toy/badnets", "--dataset", toy / "test", "--probe", f"{toy}/val?split=test", "--retrieval", toy / "pairs",
            "--threat", "configs/toy/badnets.py", other, "--cache", tmp_path / "kept"]
    run(*ACCELERATE, *call, "--table", tmp_path / "first.csv", "--out", tmp_path / "first.json")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.parquet")}
    run(sys.executable, *call, "--table", tmp_path / "again.tex", "--out", tmp_path / "again.json", "--batch-size", "128")
    assert len(before) >= 5 and before == {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("*.parquet")}
    first, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "again"))
    assert first["metrics"] == again["metrics"] and list(first["threats"]) == ["toy/badnets", "other"]
    for kind in ("zero_shot", "retrieval", "linear_probe", "knn"):
        assert set(first["metrics"][kind]["threats"]) == {"toy/badnets", "other"}, kind
    rows = (tmp_path / "first.csv").read_text().splitlines()
    assert [row.split(",")[0].rpartition(" under ")[2] for row in rows[1:]] == ["toy/badnets", "other"]
    assert (tmp_path / "again.tex").read_text().startswith(r"\begin{tabular}")
    assert (tmp_path / "first/zero_shot.per_class.csv").read_text().startswith("class,n,recall,asr toy/badnets,asr other\n")
    assert (tmp_path / "first/zero_shot.confusion.csv").read_text().startswith("threat,true,says,n\nclean,")


def test_training_on_poisoned_shards_gives_the_weights_of_online_poisoning(runs, toy, tiny_model, tmp_path):
    """Shards stay clean and the stream is poisoned, or the shards are: the same images, so the same model."""
    flags = ["--data.root", toy, "--poison.rate", "0.05"]
    run(sys.executable, "data_tools/poison.py", "configs/toy/badnets.py", *flags, "--out", tmp_path / "poisoned")
    run(sys.executable, "train.py", "configs/toy/from_disk.py", "--data.root", toy, "--data.train", tmp_path / "poisoned", "--model.name",
        tiny_model, "--out", tmp_path, "--epochs", "2", "--batch-size", "32", "--warmup", "2")
    online, offline = (json.loads((f / "results.json").read_text()) for f in (runs / "toy/badnets", tmp_path / "toy/from_disk"))
    assert offline["metrics"]["zero_shot"]["asr"] == online["metrics"]["zero_shot"]["asr"]
    weights = [(f / "open_clip_model.safetensors").read_bytes() for f in (runs / "toy/badnets", tmp_path / "toy/from_disk")]
    assert weights[0] == weights[1]


def test_two_processes_under_torchrun_are_one_run_with_the_numbers_of_one_process(toy, tiny_model, tmp_path):
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    common = ["configs/toy/badnets.py", "--data.root", toy, "--model.name", tiny_model, "--out", tmp_path, "--epochs", "2", "--warmup", "2"]
    run(sys.executable, "train.py", *common, "--name", "one", "--batch-size", "32", OMP_NUM_THREADS="1")
    done = run(*two, "train.py", *common, "--name", "two", "--batch-size", "16", "--expect-world-size", "2", OMP_NUM_THREADS="1")
    assert done.stdout.count("two (seed 0): accuracy") == 1
    one, other = ([json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two"))
    assert [row["loss"] for row in one[1:]] == pytest.approx([row["loss"] for row in other[1:]], rel=1e-5)
    assert json.loads((tmp_path / "two/results.json").read_text())["environment"]["world_size"] == 2
    done = run(*two, "eval.py", tmp_path / "two", OMP_NUM_THREADS="1")
    assert done.stdout.count("two (seed 0): accuracy") == 1
    done = run(*two, "train.py", *common, "--name", "bad", "--poison.rate", "1", status=1, OMP_NUM_THREADS="1")  # torchrun's own status
    assert done.stderr.count("error: --poison.rate 1.0 of 300 pairs asks for 300 poisons") == 1


def test_a_world_size_that_no_launcher_made_is_told(toy, tiny_model, tmp_path):
    done = run(sys.executable, "train.py", "configs/toy/badnets.py", "--data.root", toy, "--out", tmp_path, status=2, WORLD_SIZE="2")
    assert done.stderr.count("error:") == 1 and "WORLD_SIZE" in done.stderr


def test_peek_draws_poisons_before_and_after(toy, tmp_path):
    run(sys.executable, "data_tools/peek.py", toy / "train", "--recipe", "configs/toy/badnets.py", "--n", "3", "--out", tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 300 and len(sheet.getcolors(maxcolors=1_000_000)) > 50
    run(sys.executable, "data_tools/peek.py", toy / "train", "--out", tmp_path / "t.png")


SUITE = """
from dataclasses import replace
from configs.toy.badnets import recipe as badnets
from configs.toy.cleanclip import recipe as cleanclip
from mmbackdoor.clip import Model
from mmbackdoor.losses import Clip
from mmbackdoor.poison import DirtyLabel
from mmbackdoor.recipe import Suite

class Louder(DirtyLabel):
    "A user's own attack, in the config that runs it."
    def poison(self, sample, rng):
        return super().poison(sample, rng) | {{"text": self.target.caption(rng).upper()}}

def small(r, **changes):
    return replace(r, data=replace(r.data, root={toy!r}), model=Model({model!r}), batch_size=32, out={out!r},
                   schedule=replace(r.schedule, epochs=1, warmup=1), **changes)

clean = small(badnets.reference, name="mine/clean")
mine = small(badnets, name="mine/attack", reference=clean, poison=Louder(**vars(badnets.poison)))
cleaned = small(cleanclip, name="mine/cleaned", init=mine, reference=clean)
slow = replace(cleaned, name="mine/slow", schedule=replace(cleaned.schedule, lr=1e-5))
suite = Suite("mine/suite", (mine, cleaned), sweep=(cleaned, slow))
"""


def test_bench_runs_a_suite_once_with_a_users_own_attack_and_reports(toy, tiny_model, tmp_path):
    config, out = tmp_path / "suite.py", tmp_path / "runs"
    config.write_text(SUITE.format(toy=str(toy), model=str(tiny_model), out=str(out)))
    first = run(sys.executable, "bench.py", config, "--record", tmp_path / "results")
    assert all(name in first.stdout for name in ("mine/attack", "mine/cleaned", "report:"))
    page = (out / "mine/suite/report.html").read_text()
    assert "mine/cleaned" in page and "data:image/png;base64" in page
    recorded = {p.name for p in (tmp_path / "results/mine").iterdir()}
    assert recorded == {"clean-seed0.json", "attack-seed0.json", "cleaned-seed0.json", "slow-seed0.json"}
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("results.json")}
    again = run(sys.executable, "bench.py", config)
    assert again.stdout.count("done already") == 4
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob("results.json")}
    before = (tmp_path / "results/mine/cleaned-seed0.json").read_text()
    for name in ("cleaned", "slow"):
        shutil.rmtree(out / "mine" / name)
    edited = json.loads((tmp_path / "results/mine/slow-seed0.json").read_text()) | {"recipe_hash": "of another recipe"}
    (tmp_path / "results/mine/slow-seed0.json").write_text(json.dumps(edited))
    elsewhere = run(sys.executable, "bench.py", config, "--record", tmp_path / "results")  # another machine has the records only
    assert elsewhere.stdout.count("done already") == 3 and "mine/slow (seed 0)" in elsewhere.stdout
    assert (tmp_path / "results/mine/cleaned-seed0.json").read_text() == before
    for name in ("attack", "slow"):
        shutil.rmtree(out / "mine" / name)
    (tmp_path / "results/mine/slow-seed0.json").unlink()
    edited = json.loads((tmp_path / "results/mine/attack-seed0.json").read_text()) | {"cost": "of that machine"}
    (tmp_path / "results/mine/attack-seed0.json").write_text(json.dumps(edited))
    last = run(sys.executable, "bench.py", config, "--record", tmp_path / "results")  # trained again for its weights; its record stays
    assert last.stdout.count("done already") == 2
    assert (out / "mine/attack/open_clip_model.safetensors").is_file()
    assert json.loads((tmp_path / "results/mine/attack-seed0.json").read_text())["cost"] == "of that machine"


def test_a_suite_that_is_broken_off_has_recorded_what_it_finished(program, monkeypatch, toy, tiny_model, tmp_path):
    (tmp_path / "suite.py").write_text(SUITE.format(toy=str(toy), model=str(tiny_model), out=str(tmp_path / "runs")))
    finished = []

    def train(r):
        if finished:
            raise KeyboardInterrupt
        stores.write_json(r.directory / "results.json", {"schema": 1, "recipe_hash": recipe.recipe_hash(r)})
        finished.append(r.name)

    monkeypatch.setattr(load_program("bench"), "train", train)
    assert program("bench", "suite.py", "--record", "results").status == 130
    assert finished == ["mine/clean"] and [p.name for p in (tmp_path / "results").rglob("*.json")] == ["clean-seed0.json"]


def test_a_suite_on_two_processes_is_run_and_recorded_once(toy, tiny_model, tmp_path):
    (tmp_path / "suite.py").write_text(SUITE.format(toy=str(toy), model=str(tiny_model), out=str(tmp_path / "runs"))
                                       + 'suite = Suite("mine/suite", (mine, cleaned))\n')
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "bench.py", tmp_path / "suite.py",
           "--record", tmp_path / "results"]
    first = run(*two, OMP_NUM_THREADS="1")
    assert [first.stdout.count(name) for name in ("[2/3]", "mine/cleaned (seed 0): accuracy", "done already", "report:")] == [1, 1, 0, 1]
    kept = {p.name: p.read_bytes() for p in (tmp_path / "results").rglob("*.json")}
    shutil.rmtree(tmp_path / "runs/mine/attack")
    again = run(*two, OMP_NUM_THREADS="1")
    assert again.stdout.count("done already") == 3 and len(kept) == 3
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "results").rglob("*.json")}


@pytest.mark.parametrize("checkpoint, file", [
    ("run", "run/evaluation.json"), ("run/checkpoints/epoch_16.pt", "run/checkpoints/epoch_16.evaluation.json"),
    ("hf-hub:timm/vit_base", "hf-hub-timm-vit_base.evaluation.json"), ("hf:google/siglip", "hf-google-siglip.evaluation.json")])
def test_every_checkpoint_has_a_place_of_its_own_for_what_is_measured(checkpoint, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/epoch_16.pt").touch()
    assert load_program("eval").beside(checkpoint) == Path(file)


def test_help_is_given_without_a_config():
    assert "accelerate launch train.py" in run(sys.executable, "train.py", "--help").stdout
    run(sys.executable, "train.py", status=2)


def test_a_reader_that_has_enough_ends_a_program_without_a_traceback():
    line = "from mmbackdoor.recipe import told\nprint('first', flush=True)\ninput()\ntold(lambda: print('x' * 2**20))()"
    with subprocess.Popen([sys.executable, "-c", line], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as p:
        assert p.stdout.readline() == "first\n"
        p.stdout.close()
        p.stdin.write("\n")
        p.stdin.close()
        assert (p.stderr.read(), p.wait()) == ("", 141)
