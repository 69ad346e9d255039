"""Work on shards, spread over processes, a Dask cluster or an array job. There is no engine of our own.

One shard is one task, and tasks run on any `concurrent.futures.Executor`. What is done twice or broken off must be safe
in the task itself: a worker may be killed at any moment, and a rerun is given every shard again.
"""
from __future__ import annotations

import json
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from .types import BadInput

T = TypeVar("T")
R = TypeVar("R")
WINDOW = 4096
"""Tasks in flight: more than the workers of most clusters, and far fewer than the shards of a data set."""
GRACE = 1.0
"""Seconds that a worker has to end its task when the program ends."""
PATIENCE = 5.0
"""Seconds that work is done in this process before others are started: about what it takes them to import torch."""
TIMEOUT = 8.0
"""Seconds to wait for the answer of a Dask scheduler."""


@dataclass(frozen=True)
class Spread:
    """Where shards are worked on."""

    processes: int = 0
    """Worker processes: 0 is one for each core that this process may use, once the work has lasted a few seconds here; 1 works in this
    process."""
    dask_scheduler: str = ""
    """Address of a running Dask scheduler (tcp://HOST:8786), or its scheduler file (.json): its workers do the work."""
    task_index: int = 0
    """Which task of an array job this is, from 0: it takes the shards task_index, task_index + num_tasks, …"""
    num_tasks: int = 1
    """How many tasks the array job has."""

    def share(self, shards: Sequence[T]) -> list[T]:
        """The shards of this task of the array job. Over all tasks, every shard occurs once. Raises BadInput for an impossible index."""
        if self.num_tasks < 1:
            raise BadInput(f"--num-tasks {self.num_tasks}: there is at least one task; give the number of tasks of the array job")
        if not 0 <= self.task_index < self.num_tasks:
            raise BadInput(f"--task-index {self.task_index}: no such task with --num-tasks {self.num_tasks}; "
                           f"count the tasks from 0 to {self.num_tasks - 1}")
        return list(shards[self.task_index :: self.num_tasks])

    @contextmanager
    def executor(self) -> Iterator[Executor]:
        """What `map_shards` runs tasks on; its workers end with the block.

        Raises BadInput where there is no such scheduler, or its workers are lost.
        """
        if self.processes < 0:
            raise BadInput(f"--processes {self.processes}: not a number of processes; give 0 for one on each core")
        n = self.processes or len(os.sched_getaffinity(0))
        if self.dask_scheduler:
            with dask(self.dask_scheduler) as executor:
                yield executor
        elif n == 1:
            yield Here()
        elif not self.processes:
            with late(n) as executor:
                yield executor
        else:
            with pool(n) as executor:
                yield executor


def map_shards(fn: Callable[[T], R], tasks: Sequence[T], executor: Executor, desc: str, unit: str = "shard") -> list[R]:
    """fn of every task, in the order of the tasks.

    `fn` is a function of a module, or a functools.partial of one; it, the tasks and the results are small and picklable.
    A task that fails with BadInput does not stop the others: when all are done, the first message is raised as one
    BadInput. A killed worker is a BadInput too. Any other exception of `fn` ends the map and is raised as it is.
    """
    results: list[Any] = [None] * len(tasks)
    waiting: dict[Future[Any], int] = {}
    with tqdm(total=len(tasks), desc=desc, unit=unit, disable=None) as bar:

        def collect(done: Iterable[Future[Any]]) -> None:
            for future in done:
                results[waiting.pop(future)] = future.result()
                bar.update()

        try:
            for i, task in enumerate(tasks):
                future = executor.submit(Call(fn, task))
                waiting[future] = i
                if future.done() or len(waiting) >= WINDOW:
                    collect(wait(waiting, return_when=FIRST_COMPLETED).done)
            while waiting:
                collect(wait(waiting, return_when=FIRST_COMPLETED).done)
        except BrokenExecutor as error:
            if "Traceback" in str(error.__cause__):  # an exception that cannot be unpickled breaks a pool as well
                raise
            raise BadInput("a worker process was killed, perhaps for want of memory; run again with fewer --processes: "
                           "what is done is kept") from error
        finally:
            for future in waiting:
                future.cancel()
    failed = [result.message for result in results if isinstance(result, Failed)]
    if failed:
        raise BadInput(failed[0] + (f" ({len(failed) - 1} more of {len(tasks)} {unit}s failed too)" if len(failed) > 1 else ""))
    return results


# ---- what a worker runs


@dataclass(frozen=True)
class Failed:
    """The BadInput of a task, on one line. As a result it crosses to the parent without a traceback, and Dask logs none."""

    message: str


@dataclass(frozen=True)
class Call(Generic[T, R]):
    """One call of fn. To another process it goes as a Parcel."""

    fn: Callable[[T], R]
    task: T
    __name__ = "shard"  # what Dask's dashboard calls it

    def __call__(self) -> R | Failed:
        try:
            return self.fn(self.task)
        except BadInput as error:
            return Failed(" ".join(str(error).split()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Parcel, (bytes(ForkingPickler.dumps((self.fn, self.task))),)


@dataclass(frozen=True)
class Parcel:
    """A Call that is unpacked where it runs.

    So a class that a worker lacks is told by its name: it would end the process of a pool, and Dask's scheduler, which
    unpickles whatever passes through it, would have to know it too.
    """

    job: bytes

    def __call__(self) -> Any:
        torch.set_num_threads(1)  # there is a worker for each core
        try:
            fn, task = ForkingPickler.loads(self.job)  # from our own program, as all that a pool runs
        except (ImportError, AttributeError) as error:
            return Failed(f"{platform.node()}: a worker cannot load what it is to run ({error}); start the program, and Dask's workers, "
                          "in the folder that holds the configs, with the same files and packages")
        return Call(fn, task)()


# ---- executors


class Here(Executor):
    """Runs each task when it is submitted, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Late(Executor):
    """Runs tasks in this process, as `Here` does, and those submitted PATIENCE seconds after the first on the executor that `start`
    gives."""

    def __init__(self, start: Callable[[], Executor]):
        self.start, self.here = start, Here()
        self.workers: Executor | None = None
        self.began: float | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        now = time.monotonic()
        self.began = now if self.began is None else self.began
        if self.workers is None and now - self.began >= PATIENCE:
            self.workers = self.start()
        return (self.workers or self.here).submit(fn, *args, **kwargs)


@contextmanager
def late(n: int) -> Iterator[Executor]:
    """n processes, which are not started for work that is soon done."""
    with ExitStack() as stack:
        yield Late(lambda: stack.enter_context(pool(n)))


class Worker(SpawnProcess):
    """A process that Ctrl-C does not reach, even while it starts: its parent ends it."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the child inherits the mask
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers(SpawnContext):
    Process = Worker  # type: ignore[assignment]


def end_with(program: Connection) -> None:
    """Ends this worker when the other end of the pipe is closed, as it is when the program is killed; a pool would wait forever."""

    def watch() -> None:
        program.poll(None)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def pool(n: int) -> Iterator[Executor]:
    """n processes. When the block is left by an exception they end within GRACE, whatever they are at."""
    there, here = Pipe(duplex=False)
    executor = ProcessPoolExecutor(n, mp_context=Workers(), initializer=end_with, initargs=(there,))
    try:
        yield executor
    except BaseException:
        here.close()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        here.close()
        there.close()


@contextmanager
def dask(scheduler: str) -> Iterator[Executor]:
    """The workers of a Dask cluster. Workers and scheduler need this package, and the workers see the same paths."""
    flag = f"--dask-scheduler {scheduler}"
    try:
        import distributed
    except ImportError as error:
        raise BadInput(f"{flag}: needs Dask; pip install 'mmbackdoor[cluster]'") from error
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # it logs tracebacks; we say what is wrong
    try:
        address = json.loads(Path(scheduler).read_text())["address"] if scheduler.endswith(".json") else scheduler
        distributed.comm.resolve_address(address)  # a Client that is given nonsense hangs when it is freed
        client = distributed.Client(address, timeout=TIMEOUT, set_as_default=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{flag}: no scheduler answers there ({why}); start one with `dask scheduler`, and give the address that it "
                       "tells, such as tcp://HOST:8786, or its --scheduler-file") from error
    lacking = f"there; install this version of mmbackdoor ({version('mmbackdoor')}) for the scheduler and all workers"
    with client:
        try:
            others = set(client.run(version, "mmbackdoor").values()) - {version("mmbackdoor")}
            if others:  # asked first: a worker that cannot unpickle a task ends, and the task waits for another
                raise BadInput(f"{flag}: mmbackdoor is {others.pop()} {lacking}")
            yield client.get_executor(pure=False)  # a pure call is done once for all who ask, and a rerun would do nothing
        except distributed.KilledWorker as error:
            raise BadInput(f"{flag}: the workers of a shard were killed again and again, perhaps for want of memory; give them "
                           "more memory or fewer threads, and run again: what is done is kept") from error
        except CancelledError as error:
            raise BadInput(f"{flag}: the scheduler was lost; start it and run again: what is done is kept") from error
        except (ImportError, RuntimeError) as error:
            missing = next((e for e in (error, error.__cause__) if isinstance(e, ModuleNotFoundError)), None)
            if missing is None:
                raise
            raise BadInput(f"{flag}: {missing} {lacking}") from error
