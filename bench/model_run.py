"""What the train and decode benches share: a peer's failure as a status, memory, the deadline."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from torch import nn

from m3kernels.bench import measure

OK, WRONG, MISSING, FAILED, OOM, SKIPPED = "ok", "WRONG", "missing", "failed", "oom", "skipped"
# in a row of a whole cell
ALL = "all"


def outcome(error: Exception) -> tuple[str, str]:
    """(status, reason) of what a peer raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return OOM, measure.reason(error)
    return MISSING if isinstance(error, ImportError) else FAILED, measure.reason(error)


def free(device: torch.device) -> None:
    """Give back what nobody holds, so that one peer's cached blocks are not another's lack of memory."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def late(deadline: float | None) -> bool:
    """Whether ``deadline`` (of ``time.monotonic()``) has passed."""
    return deadline is not None and time.monotonic() > deadline


def chosen_cells(cells: Iterable, size: tuple[str, ...], quick: bool, only: str) -> list:
    """The cells of these sizes, of those the quick ones if asked for, with ``only`` in their label."""
    return [cell for cell in cells if cell.size in size and (cell.quick or not quick) and only in cell.label]


def run_cells(
    cells: list,
    model_of: Callable[[object], object],
    make: Callable[[object], nn.Module],
    run: Callable[[object, nn.Module], Iterator[dict]],
    row: Callable[..., dict],
    device: torch.device,
    deadline: float | None,
) -> Iterator[dict]:
    """Rows of every cell; one model at a time, made once for cells beside each other that share it.

    Args:
        model_of: a cell's key of its model; ``make``: that model.
        run: the rows of one cell on it; ``row``: ``(cell, peer, status, reason)``, a row without numbers.
    """
    for _, group in groupby(cells, model_of):
        model = None
        for cell in group:
            if late(deadline):
                yield row(cell, ALL, SKIPPED, "the time was over before it began")
                continue
            try:
                if model is None:
                    model = make(cell)
                yield from run(cell, model)
            except Exception as error:  # what breaks a whole cell (no memory for the model, say) is one row
                yield row(cell, ALL, *outcome(error))
        del model
        free(device)
