"""What ranks run for tests/parallel/test_parallel_check.py."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from torch.distributed.fsdp import FSDPModule

from m3kernels.bench.parallel_runs import Layout, Runs, layouts


@contextlib.contextmanager
def averaged(ranks: int) -> Iterator[None]:
    """Gradients divided by the data-parallel ranks, which is wrong: the loss is divided by the tokens of all of them."""
    original = FSDPModule.set_gradient_divide_factor

    def divided(self, factor: float) -> None:
        original(self, factor * ranks)

    with mock.patch.object(FSDPModule, "set_gradient_divide_factor", divided):
        yield


def train(folder: Path, dp: int, wrong: bool) -> str:
    """The name of a run in fp64 of all weights."""
    with averaged(dp) if wrong else contextlib.nullcontext():
        return Runs(folder, "cpu").whole("none", "fp64", (1, dp))


def train_everywhere(folder: Path, scheme: str) -> list[tuple[Layout, str, str]]:
    """(layout of two ranks, the names of its runs in fp64 and bf16)."""
    runs = Runs(folder, "cpu")
    return [(at, *(runs.whole(scheme, precision, at) for precision in ("fp64", "bf16_mixed"))) for at in layouts(2)]
