"""The folders of a conversion: which native checkpoint is meant, room on the disk, and what may be written over."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from m3kernels.models.ministral3._files import CheckpointError
from m3kernels.models.ministral3.layout import MANIFEST, PROGRESS
from m3kernels.models.ministral3.weights import INDEX

STEP = re.compile(r"(?:iter_|step-)(\d+)")


def native_folder(path: str | Path) -> Path:
    """``path``, or the latest complete iter_NNNNNNN or step-N in it. Raises CheckpointError where there is none."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give a native checkpoint, or the folder that holds its steps")
    if (path / MANIFEST).is_file():
        return path
    steps = [(int(match[1]), child) for child in path.iterdir() if (match := STEP.fullmatch(child.name))]
    complete = [step for step in steps if (step[1] / MANIFEST).is_file()]
    if complete:
        return max(complete)[1]
    if (path / PROGRESS).is_file():
        raise CheckpointError(f"{path} is an import that did not finish: run the same import again, it goes on")
    if steps:
        names = ", ".join(sorted(child.name for _, child in steps))
        raise CheckpointError(f"{path} holds {names}, none of them complete (no {MANIFEST}): save or import again")
    raise CheckpointError(
        f"{path} is no native checkpoint (no {MANIFEST}, no iter_NNNNNNN or step-N): make one with m3kernels convert import"
    )


def check_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError naming needed and free bytes where ``needed`` more do not fit."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{needed} bytes are needed on the disk of {folder}, and {free} are free: free some, or choose another folder"
        )


def check_apart(target: Path, *others: Path) -> None:
    """Raises CheckpointError where ``target`` is, holds, or lies in a folder that is read."""
    target = target.resolve()
    for other in (other.resolve() for other in others):
        if target == other or target in other.parents or other in target.parents:
            raise CheckpointError(f"{target} would be written, and {other} is read: choose a folder apart from it")


def check_new(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError unless ``folder`` is absent or empty, or a checkpoint that ``overwrite`` gives up."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder to write")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{folder} is not empty: choose another, or replace it with --overwrite (overwrite=True)")
    foreign = [child.name for child in folder.iterdir() if not child.is_file()]
    if foreign or not (folder / "config.json").is_file() and not (folder / PROGRESS).is_file():
        what = f"holds {', '.join(sorted(foreign)[:8])}" if foreign else "has no config.json"
        raise CheckpointError(
            f"{folder} is more than a checkpoint ({what}) and is not overwritten: choose another folder"
        )


def clear(folder: Path) -> None:
    """Removes a checkpoint's weights and our own files, the mark of completeness first."""
    ours = [folder / name for name in (MANIFEST, PROGRESS, INDEX)]
    for path in (*ours, *folder.glob("*.safetensors"), *folder.glob("*.tmp")):
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` when the block ends, and vanishes when it fails; an old ``target`` stays until then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    made.mkdir()
    try:
        yield made
        if target.exists():
            target.rename(old)
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def progress_bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that takes the bytes done since it was last called."""
    if not shown:
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
