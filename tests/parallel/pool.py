"""Runs a function on the ranks of a process group, in worker processes that are kept between jobs.

    def job(scale):  # at module level: workers find it by its name
        return dist.get_rank() * scale

    assert run(4, job, 10) == [0, 10, 20, 30]

Workers are forked from a server that has imported torch already, on the first job that needs so many, and live as long as
the process that asked (one of pytest-xdist's workers, say). Each job has a process group of its own.
"""

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "m3kernels"]
# what the other ranks get to notice that one has failed: gloo tells them at once
GRACE_S = 3.0
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)


class RankFailed(RuntimeError):
    """A rank's failure as text: the cause of the exception that :func:`run` raises."""


class Crashed(RankFailed):
    """A rank that a signal of its own code ended, in torch's threads once in some thousand jobs of gloo."""


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    stacks: Path  # where it writes its threads' stacks when asked


class Pool:
    """Worker processes, and the jobs that run on them one after the other."""

    def __init__(self):
        # a process that has looked for GPUs cannot be forked into one that uses them, and the preloaded modules look
        self._context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="m3kernels-pool-")
        self._workers: list[_Worker] = []
        self._jobs = self._started = 0
        self._server = None

    def run(self, world_size: int, function: Callable, *args, timeout_s: float = 180.0, backend: str = "gloo") -> list:
        """``function(*args)`` on every rank of a fresh process group; its results in the order of the ranks.

        The function is named at the level of a module, and everything that goes in and out can be pickled; each rank has
        arguments of its own. With "nccl" rank r uses the GPU r.

        Raises:
            What the first rank to fail raised, with that rank's traceback (and those of others) as its cause.
            TimeoutError: not all ranks were done in time; the message shows where they were. They are killed.
        """
        __tracebackhide__ = True  # pytest shows the rank's lines instead
        workers = self._first(world_size)
        self._jobs += 1
        options = {
            "port": self._store().port,
            "name": f"job-{self._jobs}",
            "world_size": world_size,
            "timeout_s": timeout_s,
            "backend": backend,
        }
        payload = pickle.dumps((function, args))
        for rank, worker in enumerate(workers):
            worker.connection.send((sys.path, rank, options, payload))
        answers = self._answers(workers, timeout_s)
        late = [rank for rank in range(world_size) if rank not in answers]
        stacks = "".join(f"\nrank {rank}:\n{self._killed(workers[rank])}" for rank in late)
        failures = sorted((a for a in answers.values() if not a.succeeded), key=lambda a: a.at)
        if failures:
            cause = RankFailed("\n".join(f"rank {a.rank} of {world_size}:\n{a.text}" for a in failures) + stacks)
            raise failures[0].value from cause
        if late:
            name = getattr(function, "__qualname__", function)
            raise TimeoutError(f"{name}: ranks {late} of {world_size} were not done after {timeout_s} s{stacks}")
        return [answers[rank].value for rank in range(world_size)]

    def _answers(self, workers: list[_Worker], timeout_s: float) -> dict[int, "_Answer"]:
        """Answers by rank; not of ranks that are late, or still busy some time after another one failed."""
        answers, deadline = {}, time.monotonic() + timeout_s
        while len(answers) < len(workers):
            open_ = {w.connection: rank for rank, w in enumerate(workers) if rank not in answers}
            ready = wait(open_, max(0.0, deadline - time.monotonic()))
            if not ready:
                return answers
            for connection in ready:
                rank = open_[connection]
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    answer = self._died(rank, workers[rank])
                answers[rank] = answer
                if not answer.succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _store(self):
        """The ranks' meeting place, a server here on a free port: each job uses names of its own."""
        if self._server is None:
            from torch.distributed import TCPStore

            self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._server

    def _first(self, n: int) -> list[_Worker]:
        self._workers = [w for w in self._workers if w.process.is_alive()]
        while len(self._workers) < n:
            ours, theirs = self._context.Pipe()
            self._started += 1
            stacks = Path(self._folder.name) / f"stacks-{self._started}"
            process = self._context.Process(target=_serve, args=(theirs, str(stacks)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, stacks))
        return self._workers[:n]

    def _died(self, rank: int, worker: _Worker) -> "_Answer":
        worker.process.join(GRACE_S)
        text = f"the process ended with exit code {worker.process.exitcode}\n{worker.stacks.read_text()}"
        # a death comes before what the others say about their lost connection
        kind = Crashed if worker.process.exitcode in CRASHES else RankFailed
        return _Answer(rank, False, kind(f"rank {rank}: {text}"), text, at=0.0)

    def _killed(self, worker: _Worker) -> str:
        """Ends a worker that is stuck; where its threads were."""
        if worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGUSR1)
            time.sleep(0.2)
            worker.process.kill()
            worker.process.join()
        worker.connection.close()
        return worker.stacks.read_text()

    def shutdown(self) -> None:
        """Ends the workers; the next job starts new ones."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(GRACE_S)
            if worker.process.is_alive():
                self._killed(worker)
        self._workers, self._server = [], None


@dataclass
class _Answer:
    rank: int
    succeeded: bool
    value: object  # a result or an exception
    text: str
    at: float


def _serve(connection: Connection, stacks: str) -> None:
    """A worker's life: jobs until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    # names of hosts need not resolve where tests run
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        while True:
            try:
                path, rank, options, payload = connection.recv()
            except (EOFError, KeyboardInterrupt):
                return
            sys.path[:] = path
            try:
                sent = _job(rank, payload, **options)
            except BaseException as error:
                sent = _failure(rank, error)
            connection.send_bytes(sent)


def _failure(rank: int, error: BaseException) -> bytes:
    at, text = time.monotonic(), traceback.format_exc()
    try:
        sent = pickle.dumps(_Answer(rank, False, error, text, at))
        pickle.loads(sent)
    except Exception:
        sent = pickle.dumps(_Answer(rank, False, RankFailed(text), text, at))
    return sent


@cache
def _meeting_place(port: int):
    """The connection is kept: one in twenty takes five seconds to make."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, wait_for_workers=False)


def _job(rank: int, payload: bytes, port: int, name: str, world_size: int, timeout_s: float, backend: str) -> bytes:
    """The pickled answer."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import debug

    # ranks share GPUs over gloo, where there are fewer
    local = rank % max(1, torch.cuda.device_count()) if backend == "gloo" else rank
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world_size))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(name, _meeting_place(port))
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    # one that failed at once would close connections that another is still making
    store.set(f"connected-{rank}", "")
    store.wait([f"connected-{r}" for r in range(world_size)])
    try:
        function, args = pickle.loads(payload)
        torch.manual_seed(0)
        return pickle.dumps(_Answer(rank, True, function(*args), "", time.monotonic()))
    except BaseException as error:
        # its time is taken before the group ends, which is what the other ranks fail of
        return _failure(rank, error)
    finally:
        # what DTensor remembers of shardings holds meshes, whose groups end here
        debug._clear_sharding_prop_cache()
        dist.destroy_process_group()


_pool: Pool | None = None


def run(world_size: int, function: Callable, *args, timeout_s: float = 180.0, backend: str = "gloo") -> list:
    """:meth:`Pool.run` on the pool of this process; once more, with a warning, where a rank crashed in native code.

    An assertion that fails is never tried again.
    """
    __tracebackhide__ = True
    global _pool
    if _pool is None:
        _pool = Pool()
        atexit.register(shutdown)
    try:
        return _pool.run(world_size, function, *args, timeout_s=timeout_s, backend=backend)
    except Crashed as crash:
        warnings.warn(f"{getattr(function, '__qualname__', function)} runs once more: {crash}")
        _pool.shutdown()
        return _pool.run(world_size, function, *args, timeout_s=timeout_s, backend=backend)


def shutdown() -> None:
    """Ends this process's pool; the next job starts another."""
    global _pool
    if _pool is not None:
        _pool.shutdown()
        _pool = None
