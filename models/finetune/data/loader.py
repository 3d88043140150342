"""Batches of one step after the other, made ahead by worker processes."""

import dataclasses
import gc
import signal
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.batches import StepBatch

_FIELDS = ("input_ids", "labels", "pixel_values")
# bytes; a view of 8-byte integers must begin at a multiple of them
_ALIGNED = 8


class Batches(Protocol):
    """What makes a rank's batch of any step, as a Plan does."""

    is_stream: bool

    def batch(self, step: int, rank: int, ranks: int) -> StepBatch: ...


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker: some cannot be pickled, and DataLoader makes others unreadable."""

    step: int
    text: str
    is_ours: bool


@dataclass(frozen=True)
class _Sent:
    """A batch whose tensors are views of one: each tensor that a process sends holds a file open, and with thousands of
    them it runs out of these without a word.

    Attributes:
        batch: with None for every tensor.
        views: (first byte, shape, dtype) of each, in the order of ``_FIELDS`` in one micro batch after the other.
        data: (bytes) uint8.
    """

    batch: StepBatch
    views: tuple[tuple[int, torch.Size, torch.dtype] | None, ...]
    data: Tensor

    @classmethod
    def of(cls, batch: StepBatch) -> "_Sent":
        tensors = [getattr(micro, name) for micro in batch.micro_batches for name in _FIELDS]
        starts = list(accumulate((0 if x is None else -(-x.nbytes // _ALIGNED) * _ALIGNED for x in tensors), initial=0))
        data = _shared(starts[-1])
        views = tuple(None if x is None else (at, x.shape, x.dtype) for at, x in zip(starts, tensors))
        for view, x in zip(views, tensors):
            if x is not None:
                _viewed(data, *view).copy_(x)
        without = (dataclasses.replace(micro, **dict.fromkeys(_FIELDS)) for micro in batch.micro_batches)
        return cls(dataclasses.replace(batch, micro_batches=tuple(without)), views, data)

    def received(self) -> StepBatch:
        tensors = iter([view and _viewed(self.data, *view) for view in self.views])
        filled = (
            dataclasses.replace(micro, **{name: next(tensors) for name in _FIELDS})
            for micro in self.batch.micro_batches
        )
        return dataclasses.replace(self.batch, micro_batches=tuple(filled))


def _shared(nbytes: int) -> Tensor:
    # here and not when it is sent: that is done by a thread whose exceptions leave the rank waiting for ever
    try:
        return torch.empty(nbytes, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise FinetuneError(
            f"{nbytes / 2**20:.0f} MiB of shared memory for a worker's batch cannot be had ({error}). Enlarge /dev/shm "
            "(docker run --shm-size), lower dataset.num_workers, or take 0, which needs none"
        ) from error


def _viewed(data: Tensor, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return data[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Steps(Dataset):
    def __init__(self, plan: Batches, first: int, last: int, rank: int, ranks: int) -> None:
        self.plan, self.first, self.last, self.rank, self.ranks = plan, first, last, rank, ranks

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int) -> StepBatch | _Sent | _Failure:
        step = self.first + i
        try:
            batch = self.plan.batch(step, self.rank, self.ranks)
            return batch if get_worker_info() is None else _Sent.of(batch)
        except FinetuneError as error:
            return _Failure(step, str(error), True)
        except Exception:
            return _Failure(step, traceback.format_exc(), False)


def step_batches(
    plan: Batches, first_step: int, last_step: int, *, rank: int, ranks: int, num_workers: int, prefetch: int = 2
) -> Iterator[StepBatch]:
    """A rank's batches of the steps from ``first_step`` to before ``last_step``, in order.

    The generator ends its workers when it is closed, is over or raises. It draws nothing from torch's global generator.

    Args:
        plan: usually a Plan.
        rank, ranks: data-parallel.
        num_workers: processes; 0 makes batches here, when they are asked for. A stream has one at most: each would
            read all of it.
        prefetch: batches that each worker makes ahead; they are kept in shared memory.

    Raises:
        FinetuneError: what the plan raises, or a worker that died; the message names the step.
        RuntimeError: another exception of the plan, with its traceback.
    """
    workers = min(num_workers, 1) if plan.is_stream else num_workers
    with closing(_fetched(_Steps(plan, first_step, last_step, rank, ranks), workers, prefetch)) as batches:
        for batch in batches:
            if isinstance(batch, _Failure) and batch.is_ours:
                raise FinetuneError(f"the data of step {batch.step}: {batch.text}")
            if isinstance(batch, _Failure):
                raise RuntimeError(f"the data of step {batch.step}:\n{batch.text}")
            yield batch.received() if isinstance(batch, _Sent) else batch


def _fetched(steps: _Steps, workers: int, prefetch: int) -> Iterator[StepBatch | _Sent | _Failure]:
    if not workers or not len(steps):
        yield from (steps[i] for i in range(len(steps)))
        return
    # with its own generator: DataLoader draws a seed, and dropout would differ with the number of workers
    options = {"generator": torch.Generator(), "worker_init_fn": begin_worker, "prefetch_factor": prefetch}
    fetched = iter(DataLoader(steps, batch_size=None, num_workers=workers, **options))
    try:
        for step in range(steps.first, steps.last):
            try:
                batch = next(fetched)
            except RuntimeError as error:
                raise FinetuneError(
                    f"the data of step {step}: a worker process died ({' '.join(str(error).split())}). Short of memory, "
                    "or of shared memory (/dev/shm)? Lower dataset.num_workers; 0 makes batches in the rank itself"
                ) from error
            yield batch
    finally:
        del fetched


def begin_worker(worker: int) -> None:
    """A signal to the whole group is for the rank: it saves, for which it needs no new batch, and ends its workers.

    A rank collects no garbage in its steps, and its workers are forked there.
    """
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
