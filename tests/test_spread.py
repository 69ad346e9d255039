"""Shards spread over processes, threads, a Dask cluster and array jobs: order, failures, and that nothing is left behind."""
from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError
from multiprocessing import parent_process
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mmbackdoor import spread
from mmbackdoor.spread import Here, Spread, map_shards
from mmbackdoor.types import BadInput

PACKAGE = Path(spread.__file__).parent
PROGRAM = """
import os, sys, time
from pathlib import Path
from mmbackdoor.spread import Spread, map_shards

def work(folder):
    Path(folder, f"{os.getpid()}.working").touch()
    time.sleep(100)

if __name__ == "__main__":
    folder, *late = sys.argv[1:]
    try:
        with Spread(processes=2).executor() as executor:
            executor.submit(work, folder)
            while late and not list(Path(folder).glob("*.working")):
                time.sleep(0.01)
            map_shards(work, [folder] * 50, executor, "work")
    except KeyboardInterrupt:
        sys.exit(130)
"""


# ---- what the workers run


def square(x: int) -> int:
    return x * x


def slow_at_first(x: int) -> int:
    time.sleep(0.2 if x == 0 else 0)
    return x


def refuse_odd(x: int) -> int:
    if x % 2:
        raise BadInput(f"{x}.tar: odd\n  and truncated; fetch it again")
    return x


def note(folder: Path, x: int) -> int:
    (folder / f"{x}.{time.monotonic_ns()}").touch()
    refuse_odd(x)
    return x


def meet(folder: Path, x: int) -> dict[str, int]:
    """Comes back when task 1 - x is at work too."""
    (folder / str(x)).touch()
    limit = time.monotonic() + 60
    while not (folder / str(1 - x)).exists() and time.monotonic() < limit:
        time.sleep(0.01)
    return {"pid": os.getpid(), "threads": torch.get_num_threads(), "met": (folder / str(1 - x)).exists()}


def divide(folder: Path, x: int) -> float:
    (folder / str(x)).touch()
    time.sleep(0.02)
    return 1 / x


def die(x: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def process(x: int) -> int:
    return os.getpid()


def label_of(attack: Any, x: int) -> str:
    return f"{attack.label} {x}"


def no_version(package: str) -> str:
    if parent_process() is None:
        return "0.0"
    raise PackageNotFoundError(package)


def other_version(package: str) -> str:
    return f"0.0.{os.getpid()}"


# ---- fixtures


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the import path of workers: there mmbackdoor does not import all that its root re-exports, which takes seconds."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "mmbackdoor").mkdir()
    (folder / "mmbackdoor/__init__.py").write_text(f"__path__ = [{str(PACKAGE)!r}]")
    (folder / "my_configs").mkdir()
    (folder / "my_configs/mine.py").write_text("from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Mine:\n    label: str")
    return folder


@pytest.fixture(scope="module")
def path(light: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(light), *sys.path])
        patch.setenv("OMP_NUM_THREADS", "2")
        yield


@pytest.fixture(scope="module")
def pool(path: None) -> Iterator[Executor]:
    with Spread(processes=2).executor() as executor:
        yield executor


@pytest.fixture(scope="module")
def scheduler(path: None) -> Iterator[str]:
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("distributed")
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def away() -> Iterator[Callable[[int], str]]:
    """A task with a class of a module that only this process knows."""
    module = sys.modules["only_here"] = ModuleType("only_here")
    module.Mine = type("Mine", (), {"label": "mine", "__module__": "only_here"})  # type: ignore[attr-defined]
    yield partial(label_of, module.Mine())
    del sys.modules["only_here"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(true: Callable[[], object], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.02)
    return bool(true())


# ---- array jobs


@pytest.mark.parametrize("shards", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("tasks", [1, 2, 7, 30])
def test_every_shard_falls_to_one_task_of_an_array_job(shards: int, tasks: int) -> None:
    shares = [Spread(task_index=i, num_tasks=tasks).share(range(shards)) for i in range(tasks)]
    assert sorted(sum(shares, [])) == list(range(shards))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("index", "tasks", "named"), [(3, 3, "--task-index 3"), (-1, 3, "--task-index -1"), (0, 0, "--num-tasks 0"),
                                                       (0, -2, "--num-tasks -2")])
def test_an_impossible_place_in_an_array_job_is_refused(index: int, tasks: int, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        Spread(task_index=index, num_tasks=tasks).share([1, 2, 3])


# ---- on any executor


@pytest.mark.parametrize("make", [Here, partial(ThreadPoolExecutor, 3)])
def test_results_come_in_the_order_of_the_tasks(make: Callable[[], Executor]) -> None:
    with make() as executor:
        assert map_shards(slow_at_first, range(40), executor, "test") == list(range(40))
        assert map_shards(square, [], executor, "test") == []


@pytest.mark.parametrize("make", [Here, partial(ThreadPoolExecutor, 3)])
def test_a_failed_shard_does_not_stop_the_others_and_the_first_is_told(make: Callable[[], Executor], tmp_path: Path) -> None:
    with make() as executor, pytest.raises(BadInput) as told:
        map_shards(partial(note, tmp_path), [2, 5, 4, 3, 6, 7], executor, "test")
    assert str(told.value) == "5.tar: odd and truncated; fetch it again (2 more of 6 shards failed too)"
    assert len(list(tmp_path.iterdir())) == 6


def test_one_failed_shard_is_told_as_it_is() -> None:
    with pytest.raises(BadInput) as told:
        map_shards(refuse_odd, [2, 3], Here(), "test")
    assert str(told.value) == "3.tar: odd and truncated; fetch it again"


def test_a_bug_is_raised_as_it_is_and_the_rest_is_cancelled(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError):
        map_shards(partial(divide, tmp_path), range(50), executor, "test")
    assert len(list(tmp_path.iterdir())) < 50


def test_an_interrupt_in_this_process_stops_at_once() -> None:
    ran = []

    def work(x: int) -> None:
        ran.append(x)
        if x == 3:
            raise KeyboardInterrupt

    with Spread(processes=1).executor() as executor, pytest.raises(KeyboardInterrupt):
        map_shards(work, range(10), executor, "test")
    assert ran == [0, 1, 2, 3]


def test_no_more_than_the_window_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "WINDOW", 5)
    lock, now, most = threading.Lock(), 0, 0

    class Counting(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            future = super().submit(fn, *args, **kwargs)
            future.add_done_callback(ended)
            return future

    def ended(_: Future[Any]) -> None:
        nonlocal now
        with lock:
            now -= 1

    with Counting(2) as executor:
        assert map_shards(slow_at_first, range(60), executor, "test") == list(range(60))
    assert most == 5


def test_progress_in_this_process_is_told_shard_by_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(spread.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(spread, "tqdm", Bar)
    assert map_shards(lambda x: bars[0].n, range(4), Here(), "test") == [0, 1, 2, 3]


def test_progress_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    map_shards(square, range(3), Here(), "test")
    assert capfd.readouterr() == ("", "")


def test_a_negative_number_of_processes_is_refused() -> None:
    with pytest.raises(BadInput, match="--processes -1"), Spread(processes=-1).executor():
        pass


def test_by_default_there_is_a_process_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with Spread().executor() as executor:
        assert isinstance(executor, Here)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6})
    monkeypatch.setattr(spread, "PATIENCE", 0.0)
    with Spread().executor() as executor:
        map_shards(square, [2], executor, "test")
        assert executor.workers._max_workers == 3  # type: ignore[attr-defined]


def test_work_that_is_soon_done_starts_no_process_and_what_is_left_of_longer_work_goes_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    with Spread().executor() as executor:
        assert {map_shards(process, [i], executor, "test")[0] for i in range(3)} == {os.getpid()}
        executor.began -= spread.PATIENCE  # type: ignore[attr-defined]
        later = map_shards(process, range(3), executor, "test")
        assert os.getpid() not in later
    with pytest.raises(ProcessLookupError):
        os.kill(later[0], 0)  # it ended with the block


# ---- a pool of processes; the last of these tests breaks it


def test_two_processes_work_at_once_on_one_thread_each(pool: Executor, tmp_path: Path) -> None:
    a, b = map_shards(partial(meet, tmp_path), [0, 1], pool, "test")
    assert a["met"] and b["met"] and a["threads"] == b["threads"] == 1
    assert len({a["pid"], b["pid"], os.getpid()}) == 3


def test_failures_of_processes_are_told_as_those_of_this_one(pool: Executor) -> None:
    with pytest.raises(BadInput) as told:
        map_shards(refuse_odd, range(20), pool, "test")
    assert str(told.value) == "1.tar: odd and truncated; fetch it again (9 more of 20 shards failed too)"


def test_a_class_of_a_config_file_reaches_the_processes(pool: Executor) -> None:
    from my_configs.mine import Mine  # type: ignore[import-not-found]

    assert map_shards(partial(label_of, Mine("mine")), range(2), pool, "test") == ["mine 0", "mine 1"]


def test_a_class_that_the_processes_cannot_load_is_told_by_its_module(pool: Executor, away: Callable[[int], str]) -> None:
    with pytest.raises(BadInput, match="No module named 'only_here'.*folder that holds the configs"):
        map_shards(away, [0], pool, "test")
    assert map_shards(square, [3], pool, "test") == [9]


def test_a_bug_in_a_process_is_raised_as_it_is(pool: Executor, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        map_shards(partial(divide, tmp_path), range(5), pool, "test")


def test_a_killed_worker_is_told(pool: Executor) -> None:
    with pytest.raises(BadInput, match="killed.*memory; run again with fewer --processes"):
        map_shards(die, range(9), pool, "test")


@pytest.fixture
def start(light: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start() is a program with two processes, in a process group of its own; start("late") sets one to work before the other."""
    (tmp_path / "program.py").write_text(PROGRAM)
    with ExitStack() as stack:

        def run(*args: str) -> subprocess.Popen[str]:
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, str(tmp_path / "program.py"), str(tmp_path), *args], stderr=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(light), *sys.path])}, start_new_session=True))
            stack.callback(process.kill)
            return process

        yield run


def at_work(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.working")]


def test_when_the_program_is_killed_its_processes_end(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    program = start()
    assert eventually(lambda: len(at_work(tmp_path)) == 2, 60)
    assert all(map(alive, at_work(tmp_path)))
    program.kill()
    assert eventually(lambda: not any(map(alive, at_work(tmp_path))), 10)


def test_ctrl_c_ends_the_program_and_its_processes_quietly(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    program = start("late")
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    assert eventually(lambda: at_work(tmp_path) and len(children.read_text().split()) == 3, 60)  # one is Python's resource tracker
    time.sleep(0.3)  # the second process is importing torch
    os.killpg(program.pid, signal.SIGINT)
    _, err = program.communicate(timeout=15)
    assert (program.returncode, err) == (130, "")
    assert not any(map(alive, at_work(tmp_path)))


# ---- Dask; the last of these tests kills a worker


def test_dask_works_on_its_workers_in_order(scheduler: str, tmp_path: Path) -> None:
    with Spread(dask_scheduler=scheduler).executor() as executor:
        a, b = map_shards(partial(meet, tmp_path), [0, 1], executor, "test")
        assert a["met"] and b["met"] and len({a["pid"], b["pid"], os.getpid()}) == 3
        assert map_shards(slow_at_first, range(40), executor, "test") == list(range(40))


def test_dask_does_the_same_call_again(scheduler: str, tmp_path: Path) -> None:
    for _ in range(2):
        with Spread(dask_scheduler=scheduler).executor() as executor:
            map_shards(partial(note, tmp_path), [2, 2], executor, "test")
    assert len(list(tmp_path.iterdir())) == 4


def test_failures_on_dask_are_told_as_those_of_this_process(scheduler: str) -> None:
    with pytest.raises(BadInput) as told, Spread(dask_scheduler=scheduler).executor() as executor:
        map_shards(refuse_odd, range(20), executor, "test")
    assert str(told.value) == "1.tar: odd and truncated; fetch it again (9 more of 20 shards failed too)"


def test_a_class_that_dask_workers_lack_is_told_by_its_module(scheduler: str, away: Callable[[int], str]) -> None:
    with (pytest.raises(BadInput, match="No module named 'only_here'.*folder that holds the configs"),
          Spread(dask_scheduler=scheduler).executor() as executor):
        map_shards(away, [0], executor, "test")


@pytest.mark.parametrize("version", [no_version, other_version])
def test_dask_workers_without_this_package_are_told(scheduler: str, version: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "version", version)
    with pytest.raises(BadInput, match="there; install this version of mmbackdoor"), Spread(dask_scheduler=scheduler).executor():
        pass


def test_a_scheduler_file_names_the_scheduler(scheduler: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text(json.dumps({"address": scheduler}))
    with Spread(dask_scheduler=str(tmp_path / "scheduler.json")).executor() as executor:
        assert map_shards(square, [3], executor, "test") == [9]


def test_killed_dask_workers_are_told(scheduler: str) -> None:
    with pytest.raises(BadInput, match="killed.*memory"), Spread(dask_scheduler=scheduler).executor() as executor:
        map_shards(die, [0], executor, "test")


def test_a_scheduler_that_does_not_answer_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    assert spread.TIMEOUT < 10
    monkeypatch.setattr(spread, "TIMEOUT", 0.3)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))  # and does not listen
        address = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        with pytest.raises(BadInput, match=f"{address}: no scheduler answers.*dask scheduler"), Spread(dask_scheduler=address).executor():
            pass


@pytest.mark.parametrize("text", [None, "{}", "[]", "{", '{"address": 3}', '{"address": "127.0.0.1"}'])
def test_a_scheduler_file_that_names_none_is_told(text: str | None, tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    path = tmp_path / "scheduler.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match="scheduler.json: no scheduler answers"), Spread(dask_scheduler=str(path)).executor():
        pass


def test_without_dask_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BadInput, match=r"mmbackdoor\[cluster\]"), Spread(dask_scheduler="tcp://127.0.0.1:1").executor():
        pass
