"""What ranks run for tests/finetune/test_checkpoint.py."""

import contextlib
import resource
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from m3kernels.models.finetune import checkpoint
from m3kernels.models.finetune.checkpoint import Checkpointer, CheckpointFailed, complete, read_record


def state(value: float) -> dict[str, torch.Tensor]:
    """A sharded and a whole tensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.arange(24.0).view(8, 3) + value
    return {"weights.a": distribute_tensor(rows, mesh, [Shard(0)]), "exp_avg.b": torch.full((5,), value)}


def record(step: int) -> dict:
    return {"step": step, "ranks": dist.get_world_size()}


def whole(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def saver(folder: str, keep: int = 0, async_save: bool = False) -> Checkpointer:
    return Checkpointer(Path(folder), keep=keep, async_save=async_save)


def save(folder: str, step: int, value: float, async_save: bool = False) -> list[float]:
    """Random numbers that come after what was saved."""
    torch.manual_seed(dist.get_rank() + step)
    saves = saver(folder, async_save=async_save)
    saves.save(step, state(value), record(step))
    drawn = torch.rand(3).tolist()
    saves.wait()
    return drawn


def load(folder: str) -> tuple[int, dict, bool, list[float]]:
    loads = saver(folder)
    latest = loads.latest()
    tensors = state(-1.0)
    restored = loads.load(latest, tensors)
    return read_record(latest)["step"], whole(tensors), restored, torch.rand(3).tolist()


def load_other(folder: str) -> str:
    loads = saver(folder)
    try:
        loads.load(loads.latest(), {"weights.a": torch.zeros(8, 3), "weights.c": torch.zeros(2)})
    except ValueError as error:
        return str(error)
    return ""


def overwritten_while_writing(folder: str) -> tuple[bool, dict]:
    """Whether a checkpoint is there before it is waited for, and what it holds though its source was changed meanwhile."""
    saves = saver(folder, async_save=True)
    tensors = state(1.0)
    saves.save(3, tensors, record(3))
    early = bool(complete(Path(folder)))
    for t in tensors.values():
        t.zero_()
    saves.wait()
    return early, load(folder)[1]


def failing(folder: str, how: str) -> tuple[str, list[str], dict]:
    """(what a failed save says, what is in the folder, what is read then)."""
    saves = saver(folder)
    saves.save(1, state(1.0), record(1))
    said = ""
    with _broken(how):
        try:
            saves.save(2, state(2.0), record(2))
        except CheckpointFailed as error:
            said = str(error)
    there = sorted(p.name for p in Path(folder).iterdir())
    dist.barrier()
    read = load(folder)[1]
    # the disk has room again
    saves.save(3, state(3.0), record(3))
    return said, there, read


def _broken(how: str):
    last = dist.get_rank() == dist.get_world_size() - 1
    if how == "little room":
        usage = mock.Mock(free=10)
        return mock.patch.object(checkpoint.shutil, "disk_usage", return_value=usage)
    if how == "one rank":
        original = checkpoint._write_rng
        raising = mock.Mock(side_effect=OSError(28, "No space left on device"))
        return mock.patch.object(checkpoint, "_write_rng", raising if last else original)
    return _limited_files() if last else contextlib.nullcontext()


@contextlib.contextmanager
def _limited_files():
    """Files end after 64 bytes, as on a disk that fills up in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = checkpoint._write_rng
    try:
        with mock.patch.object(checkpoint, "_write_rng", lambda folder: (original(folder), _limit(64, hard))):
            yield
    finally:
        _limit(soft, hard)


def _limit(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def retention(folder: str, keep: int, best: int, steps: list[int]) -> list[int]:
    saves = saver(folder, keep=keep)
    for step in steps:
        if step == best:
            saves.best_step = best
        saves.save(step, state(float(step)), record(step))
    return list(complete(Path(folder)))
