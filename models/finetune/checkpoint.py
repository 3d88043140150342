"""Training state on disk: written aside, complete on all ranks, then renamed; read back at any layout.

    folder/step-000050/        .metadata and *.distcp   DCP: trained weights and their moments, by parameter name
                               rng-00000.pt ...         random states of each rank
                               run.json                 written last: step, configuration, versions, fingerprints
    folder/step-000100.tmp/    one that is being written, or whose writer died: never read

DCP written over an older checkpoint and interrupted would load as half of each, without an error: no folder is written twice.
"""

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from m3kernels.models.finetune.config import FinetuneError

RECORD = "run.json"
LOCK = ".lock"
STEP = re.compile(r"step-(\d+)")


class CheckpointFailed(FinetuneError):
    """A checkpoint could not be written; the one before it is whole. On every rank."""


def complete(folder: Path) -> dict[int, Path]:
    """Checkpoints of ``folder`` that are whole, by step, oldest first."""
    if not folder.is_dir():
        return {}
    found = {int(m[1]): child for child in folder.iterdir() if (m := STEP.fullmatch(child.name))}
    return {
        step: path for step, path in sorted(found.items()) if (path / RECORD).exists() and (path / ".metadata").exists()
    }


def read_record(checkpoint: Path) -> dict:
    """``run.json``."""
    return json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))


def together(function: Callable[[], object], what: str, *, everywhere: bool) -> object:
    """Runs ``function`` on every rank, or on the first alone, and raises on all where one failed.

    Raises:
        CheckpointFailed: names the rank and what it said.
    """
    result, error = None, None
    if everywhere or dist.get_rank() == 0:
        try:
            result = function()
        # DCP's is no Exception, and may wrap a KeyboardInterrupt of its writer
        except (Exception, CheckpointException) as raised:
            error = _told(raised)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if said := [e for e in errors if e]:
        raise CheckpointFailed(f"{what}: {said[0]}")
    return result


def from_first(function: Callable[[], object]) -> object:
    """What ``function`` returns on the first rank, on every rank."""
    found = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing into a folder of checkpoints; every rank calls it.

    The lock is the first process's: it ends with that, and forked workers do not have it.

    Raises:
        FinetuneError: another run has it; on every rank.
    """
    with contextlib.ExitStack() as stack:
        if not from_first(lambda: _locked(folder, stack)):
            raise FinetuneError(f"another run is writing to {folder}: end it, or take another name")
        yield


def _locked(folder: Path, stack: contextlib.ExitStack) -> bool:
    """False where another process has the lock; where there are no locks every process has it."""
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(folder / LOCK, "a"))
    except (ImportError, OSError):  # what is wrong with the folder is told when it is written to
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def _told(error: BaseException) -> str:
    """Which rank failed, and of what: DCP raises the first one's exception on all."""
    rank = dist.get_rank()
    failures = getattr(error, "failures", None)
    if failures:
        rank, (error, _) = next(iter(failures.items()))
    return f"rank {rank}: {type(error).__name__}: {error}"


class Checkpointer:
    """Writes checkpoints of a run and keeps the newest and the best; every rank calls every method alike.

    Args:
        folder: of the ``step-N`` folders.
        keep: how many of the newest stay; 0 keeps all.
        async_save: write on a thread, from a copy in host memory, while the training goes on.
    """

    def __init__(self, folder: Path, *, keep: int, async_save: bool):
        self.folder, self.keep = folder, keep
        self.best_step: int | None = None
        self._best_there: int | None = None
        self._pending: tuple[object, Path, Path] | None = None
        # threads of their own must not share collectives with the training
        self._group = dist.new_group(backend="gloo") if async_save and dist.get_world_size() > 1 else None
        self._async = async_save

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        return from_first(lambda: next(reversed(complete(self.folder).values()), None))

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping) -> None:
        """Writes the state after ``step`` steps, unless that stands there; waits for one that is still being written.

        Raises:
            CheckpointFailed: the disk was full or failed; what was there before is untouched.
        """
        self.wait()
        final = self.folder / f"step-{step:06}"
        temporary = final.with_name(final.name + ".tmp")
        what = f"checkpoint of step {step} in {self.folder} was not written (the one before it is whole)"
        if from_first(lambda: step in complete(self.folder)):
            return
        together(lambda: self._make_room(temporary, final, tensors), what, everywhere=False)
        try:
            together(lambda: _write_rng(temporary), what, everywhere=True)
            together(lambda: _write_json(temporary / RECORD, record), what, everywhere=False)
            writer = FileSystemWriter(temporary, single_file_per_rank=True, thread_count=1)
            if self._async:
                future = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group)
                self._pending = (future, temporary, final)
                return
            together(lambda: dcp.save(dict(tensors), storage_writer=writer), what, everywhere=True)
            self._commit(temporary, final, what)
        except CheckpointFailed:
            _discard(temporary)
            raise

    def poll(self) -> bool:
        """Whether one is written but not yet committed on this rank; ranks then agree to call :meth:`wait`."""
        return self._pending is not None and self._pending[0].done()

    def wait(self) -> None:
        """Ends an asynchronous save.

        Raises:
            CheckpointFailed: it failed.
        """
        if self._pending is None:
            return
        (future, temporary, final), self._pending = self._pending, None
        what = f"checkpoint {final} was not written (the one before it is whole)"
        try:
            together(future.result, what, everywhere=True)
            self._commit(temporary, final, what)
        except CheckpointFailed:
            _discard(temporary)
            raise

    def _make_room(self, temporary: Path, final: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("step-*.tmp"):
            shutil.rmtree(old)
        needed = sum(t.numel() * t.element_size() for t in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{needed / 2**30:.2f} GiB are needed on the disk of {self.folder}, {free / 2**30:.2f} are free"
            )
        if final.exists():
            _discard(final)
        temporary.mkdir()

    def _commit(self, temporary: Path, final: Path, what: str) -> None:
        def rename() -> None:
            _sync(temporary)
            temporary.rename(final)
            _sync(self.folder)
            self._purge()

        together(rename, what, everywhere=False)

    def _purge(self) -> None:
        """Deletes what is older than the newest ``keep`` complete ones, but the best."""
        whole = complete(self.folder)
        if not self.keep:
            return
        # a best one that could not be written leaves the best before it
        self._best_there = self.best_step if self.best_step in whole else self._best_there
        for step in list(whole)[: -self.keep]:
            if step != self._best_there:
                _discard(whole[step])

    def load(self, checkpoint: Path, tensors: dict[str, Tensor]) -> bool:
        """Reads a checkpoint into ``tensors`` in place, whatever layout wrote it; random states, too, where they fit.

        Returns:
            Whether random states were restored: not at another number of ranks.

        Raises:
            FinetuneError: it holds other tensors than these.
        """
        reader = FileSystemReader(checkpoint)
        there = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
        wanted = {name: tuple(t.shape) for name, t in tensors.items()}
        if there != wanted:
            differing = sorted(n for n in there.keys() | wanted.keys() if there.get(n) != wanted.get(n))
            raise FinetuneError(
                f"{checkpoint} holds other parameters than are trained now: {len(differing)} differ, such as {differing[:3]}; "
                "resume with the same peft.*, model.freeze_* and pretrained checkpoint, or save somewhere else"
            )
        dcp.load(tensors, storage_reader=reader)
        if read_record(checkpoint)["ranks"] != dist.get_world_size():
            return False
        _read_rng(checkpoint)
        return True


def _discard(folder: Path) -> None:
    """Deletes a folder on the first rank; renamed first: half of it never stands under a name that is read."""
    if dist.get_rank() == 0 and folder.exists():
        doomed = folder.with_name(f"{folder.name}.deleted.tmp")
        with contextlib.suppress(OSError):
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)


def _write_json(path: Path, value: Mapping) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_rng(folder: Path) -> None:
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, folder / f"rng-{dist.get_rank():05}.pt")


def _read_rng(folder: Path) -> None:
    # numpy's and Python's states are no tensors; the file is the run's own
    state = torch.load(folder / f"rng-{dist.get_rank():05}.pt", weights_only=False)
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
