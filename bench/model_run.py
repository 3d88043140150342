"""What the train and decode benches share: a peer's failure as a status, memory, the deadline."""

import gc
import time

import torch

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
