"""The short way to a compiled kernel: what it tells apart must be at least what Triton does."""

import itertools

import numpy as np
import pytest
import torch

from m3kernels.ops import _common
from m3kernels.ops._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
NUMBERS = [
    0,
    1,
    2,
    15,
    16,
    17,
    32,
    -16,
    -1,
    2**31 - 1,
    2**31,
    2**31 + 16,
    -(2**31),
    -(2**31) - 16,
    2**62,
    2**63,
    2**63 + 8,
]
VALUES = [*NUMBERS, 0.0, 1.0, 2.5, np.float64(2.5), True, False, None]


def pointers() -> list[torch.Tensor]:
    memory = torch.zeros(64, dtype=torch.int8)
    start = -memory.data_ptr() % 16
    aligned, not_aligned = memory[start : start + 32], memory[start + 4 : start + 36]
    return [x.view(dtype) for x in (aligned, not_aligned) for dtype in (torch.float32, torch.bfloat16, torch.int32)]


@pytest.mark.parametrize("specialize", [True, False])
def test_what_looks_the_same_is_the_same_to_triton(specialize):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32)).__class__
    known = {}
    for value in [*VALUES, *pointers()]:
        said = native_specialize_impl(backend, value, False, specialize, True)
        assert known.setdefault(_common._kind(value), said) == said, value


def test_kinds_differ_where_triton_compiles_anew():
    kinds = [_common._kind(v) for v in (1, 2, 16, 2**31, 2**63, 1.0, True, None)]
    assert all(a != b for a, b in itertools.combinations(kinds, 2))


class Kernel:
    """Stands in for a JIT function: counts what goes through it, and what goes to what it compiled."""

    class Parameter:
        def __init__(self, name, is_constexpr):
            self.name, self.is_constexpr = name, is_constexpr

    def __init__(self):
        self.fn, self.slow, self.fast = object(), [], []
        self.params = [self.Parameter(n, n.isupper()) for n in ("p_x", "n", "BLOCK", "MASKED")]
        self.function = self.packed_metadata = None

    def __getitem__(self, grid):
        return lambda *args, **meta: self.slow.append((grid, args, meta)) or self

    def launch_metadata(self, *_):
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        self.fast.append(((x, y, z), args))


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setattr(_common, "_launches_directly", lambda: True)
    monkeypatch.setattr(_common, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


def test_second_call_goes_straight_to_the_compiled_kernel(direct):
    kernel, x = Kernel(), torch.zeros(64)
    options = {"BLOCK": 64, "MASKED": True, "num_warps": 4}
    for n in (32, 48):
        _common.launch("op", kernel, (3,), x, n, **options)
    assert len(kernel.slow) == 1 and kernel.fast == [((3, 1, 1), (x, 48, 64, True))]
    _common.launch("op", kernel, (3,), x, 33, **options)  # no multiple of 16
    _common.launch("op", kernel, (3,), x, 32, **{**options, "num_warps": 8})
    assert len(kernel.slow) == 3 and len(kernel.fast) == 1


def test_a_constexpr_that_is_not_given_goes_the_long_way(direct):
    kernel, x = Kernel(), torch.zeros(64)
    for _ in range(2):
        _common.launch("op", kernel, (3,), x, 32, BLOCK=64)
    assert len(kernel.slow) == 2 and not kernel.fast


def test_a_constexpr_among_the_arguments_goes_the_long_way(direct):
    """Its value is no part of the key."""
    kernel, x = Kernel(), torch.zeros(64)
    for block in (64, 128):
        _common.launch("op", kernel, (3,), x, 32, block, MASKED=True)
    assert len(kernel.slow) == 2 and not kernel.fast


def test_failures_name_op_and_shapes(direct):
    kernel = Kernel()
    kernel.params = None
    with pytest.raises(_common.KernelLaunchError, match=r"op: kernel launch failed on cpu for \(64,\)"):
        _common.launch("op", kernel, (3,), torch.zeros(64), 1)
