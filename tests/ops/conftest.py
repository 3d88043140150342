"""Fixtures of the ops' tests on a GPU."""

import fcntl
import tempfile
import time
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_kept():
    """What one worker's allocator keeps, the others cannot have."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def whole_gpu():
    """One such test at a time over all of pytest-xdist's workers: each fills much of the GPU. Leaves nothing behind."""
    with open(Path(tempfile.gettempdir()) / "m3kernels-whole-gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def room(whole_gpu):
    """Skips where 60 GiB are not free after a minute: the other workers' tests are small and soon over."""
    for _ in range(60):
        if torch.cuda.mem_get_info()[0] >= 60 * 2**30:
            break
        time.sleep(1)
    else:
        pytest.skip("needs 60 GiB of free GPU memory")
