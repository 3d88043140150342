"""Faults put into runs of the trainer: deaths, signals, numbers that are not finite, disks and memory that end.

A fault is a word: ``kind:rank:step``, such as ``dies_in_step:1:3``; several are separated by commas.
"""

import contextlib
import dataclasses
import io
import os
import signal
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from m3kernels.cli import finetune as command
from m3kernels.models.finetune import checkpoint, process, step, trainer
from m3kernels.models.finetune import run as running
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.optimizer import Trained
from m3kernels.models.finetune.trainer import finetune
from m3kernels.models.ministral3 import Ministral3

Patch = contextlib.AbstractContextManager


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: object, name: str, at: Callable[..., bool], act: Callable[..., object]) -> Patch:
    """``act`` on the arguments of a call where ``at`` is true of them, then the call."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        if at(*args):
            act(*args)
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, call)


def _in_folder(n: int) -> Callable[..., bool]:
    return lambda folder, *_: f"step-{n:06}.tmp" in str(folder)


def _ends_a_file(folder: Path) -> None:
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    _die()


def _in_write(act: Callable[..., object]) -> Callable[[int], Patch]:
    """Before this rank's part of a checkpoint is written."""

    def patch(n: int) -> Patch:
        at = lambda writer, *_: _in_folder(n)(writer.path)
        return _before(checkpoint.FileSystemWriter, "write_data", at, act)

    return patch


def _in_step(act: Callable[..., object]) -> Callable[[int], Patch]:
    """After the backward, before the update of step ``n`` (from 1)."""

    def patch(n: int) -> Patch:
        return _before(step, "learning_rate", lambda _, done: done == n - 1, act)

    return patch


def _with_batch(change: Callable[[object], None]) -> Callable[[int], Patch]:
    """On the batch that step ``n`` computes."""

    def patch(n: int) -> Patch:
        at = lambda built, batch, shared, config, done, beat: done == n - 1
        return _before(running, "run_step", at, lambda built, batch, *_: change(batch))

    return patch


def _nan_pixels(batch) -> None:
    next(m for m in batch.micro_batches if m.pixel_values is not None).pixel_values[0, 0, 0, 0] = torch.nan


def _inf_gradient(n: int) -> Patch:
    calls = []

    def at(_) -> bool:
        calls.append(1)
        return len(calls) == n

    def act(trained: Trained) -> None:
        grad = next(m.grad for m in trained.masters.values() if m.grad is not None)
        (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = torch.inf

    return _before(Trained, "fill_gradients", at, act)


def _stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def _in_data(act: Callable[[], object]) -> Callable[[int], Patch]:
    """While step ``n``'s batch is waited for."""

    def patch(n: int) -> Patch:
        return _before(Plan, "batch", lambda plan, at, *_: at == n - 1 and plan._attempts > 1, lambda *_: act())

    return patch


def _in_evaluation(n: int) -> Patch:
    calls = []

    def evaluate(model, batches, dtype, beat):
        calls.append(1)

        def signalled():
            for i, batch in enumerate(batches):
                if len(calls) == n and i == 0:
                    _stop()
                yield batch

        return original(model, signalled(), dtype, beat)

    original = running.evaluate
    return mock.patch.object(running, "evaluate", evaluate)


def _late(n: int) -> Patch:
    """Two hours pass in step ``n``."""
    passed = []
    clock = types.SimpleNamespace(
        perf_counter=time.perf_counter, monotonic=lambda: time.monotonic() + 7200 * (len(passed) >= n)
    )
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(running, "time", clock))
    stack.enter_context(_before(running, "run_step", lambda *_: True, lambda *_: passed.append(1)))
    return stack


def _wait_for_a_signal(*_) -> None:
    """Until StopSignals has one: at most 20 seconds."""
    for _ in range(2000):
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            return
        time.sleep(0.01)


def _raise(error: BaseException) -> Callable[..., None]:
    def act(*_):
        raise error

    return act


def _out_of_memory(n: int) -> Patch:
    calls = []

    def at(*_) -> bool:
        calls.append(1)
        return len(calls) == n

    said = "CUDA out of memory. Tried to allocate 3.00 GiB\nmore"
    return _before(Ministral3, "forward", at, _raise(torch.OutOfMemoryError(said)))


FULL = OSError(28, "No space left on device")
FAULTS: dict[str, Callable[[int], Patch]] = {
    "dies_in_step": _in_step(lambda *_: _die()),
    "dies_in_write": _in_write(lambda *_: _die()),
    # the first rank, when all is written but not yet renamed; then with its own file cut off
    "dies_before_rename": lambda n: _before(checkpoint, "_sync", _in_folder(n), lambda *_: _die()),
    "dies_with_half_a_file": lambda n: _before(checkpoint, "_sync", _in_folder(n), _ends_a_file),
    "stopped_in_step": _in_step(lambda *_: _stop()),
    "interrupted_in_step": _in_step(lambda *_: _stop(signal.SIGINT)),
    "stopped_in_load": lambda n: _before(trainer, "build", lambda *_: True, lambda *_: _stop()),
    "stopped_in_data": _in_data(_stop),
    "stopped_in_evaluation": _in_evaluation,
    "waits_in_step": _in_step(_wait_for_a_signal),
    "late": _late,
    "sleeps_in_step": _in_step(lambda *_: time.sleep(60)),
    "nan_pixels": _with_batch(_nan_pixels),
    "inf_gradient": _inf_gradient,
    "disk_full": lambda n: _before(checkpoint, "_write_rng", _in_folder(n), _raise(FULL)),
    "disk_full_in_write": _in_write(_raise(FULL)),
    "no_data": _in_data(_raise(OSError("the data's disk is gone"))),
    "out_of_memory": _out_of_memory,
}


@contextlib.contextmanager
def faults(words: str, rank: int) -> Iterator[None]:
    """Those of ``words`` that are ``rank``'s."""
    with contextlib.ExitStack() as stack:
        for word in filter(None, words.split(",")):
            kind, whose, n = word.split(":")
            if int(whose) == rank:
                stack.enter_context(FAULTS[kind](int(n)))
        yield


@dataclasses.dataclass
class Ended:
    """How a run of a rank ended.

    Attributes:
        step: how many are over; None where it raised.
        error, kind: the message and class of what it raised; empty where it did not.
        unchanged: whether the weights were, by each step that was tried.
    """

    step: int | None = None
    error: str = ""
    kind: str = ""
    unchanged: list[bool] = dataclasses.field(default_factory=list)


def run_with(made: FinetuneConfig, words: str = "") -> Ended:
    """A run with faults on this rank; for the pool's ranks."""
    ended = Ended()
    original = running.run_step

    def watched(built, *args):
        before = {name: _whole(m).clone() for name, m in built.trained.masters.items()}
        try:
            return original(built, *args)
        finally:
            if not words.startswith(("dies", "sleeps")):
                after = built.trained.masters
                ended.unchanged.append(all(torch.equal(_whole(after[name]), x) for name, x in before.items()))

    with mock.patch.object(running, "run_step", watched), faults(words, dist.get_rank()):
        try:
            ended.step = finetune(made).step
        except FinetuneError as error:
            ended.error, ended.kind = str(error), type(error).__name__
    return ended


def run_command(arguments: list[str], words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of ``m3kernels finetune``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), faults(words, dist.get_rank()):
        code = command.run(arguments)
    return code, out.getvalue(), err.getvalue()


def signalled(first: int, second: int, repeated_s: float) -> str:
    """What a process that gets two signals has saved by."""
    with mock.patch.object(process, "REPEATED_S", repeated_s), process.StopSignals() as signals:
        _stop(first)
        time.sleep(0.05)
        _stop(second)
        time.sleep(0.05)
    return signals.received


def _whole(x: torch.Tensor) -> torch.Tensor:
    return (x.to_local() if hasattr(x, "to_local") else x).detach()
