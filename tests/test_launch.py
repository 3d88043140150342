"""The short way to a compiled kernel: what it tells apart must be at least what Triton does."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from m3kernels.ops import _common
from m3kernels.ops._prepared import Prepared
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


class Launcher:
    """Triton's launcher of a compiled kernel, as of 3.6."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, launch, called: list):
        self.launch, self.called = launch, called

    def __call__(self, *args):
        self.called.append(args)


class Launched(Kernel):
    """A kernel whose launches can be prepared; ``native`` collects what reaches the driver."""

    def __init__(self, described: bool = False):
        super().__init__()
        self.native = []
        self.metadata = SimpleNamespace(tensordesc_meta=[{"swizzle": 3}] if described else None)
        launcher = lambda *args: self.native.append(args)

        def encoding_anew(*args):
            return launcher(*args)

        self.run = Launcher(encoding_anew if described else launcher, self.fast)


def prepared(kernel, **more):
    return Prepared("op", kernel, torch.device("cpu"), (3,), (32,), {"BLOCK": 64, "MASKED": True}, **more)


@pytest.fixture
def one_device(direct, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)


def aligned(elements: int, off: int = 0) -> torch.Tensor:
    memory = torch.zeros(elements + 8)
    first = (-memory.data_ptr() % 16) // 4 + off
    return memory[first : first + elements]


def test_a_prepared_launch_brings_nothing_but_addresses(one_device):
    kernel, x, y = Launched(), aligned(32), aligned(48)
    run = prepared(kernel)
    for t in (x, x, x, y):
        run(t)
    # compiled, found compiled and kept, then by itself
    assert len(kernel.slow) == 1 and len(kernel.fast) == 1
    settled = (False, False, None, None, None, None, None, None)
    assert kernel.native == [(3, 1, 1, 7, None, *settled, t.data_ptr(), 32, 64, True) for t in (x, y)]


def test_a_prepared_launch_minds_marks_device_and_hooks(one_device, monkeypatch):
    from triton import knobs

    kernel, x = Launched(), aligned(32)
    run = prepared(kernel)
    run(aligned(32, off=1))
    assert run.direct is None
    for _ in range(2):
        run(x)
    assert run.direct is not None and not kernel.native
    run(aligned(32, off=1))  # what is compiled takes its address for a multiple of 16
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    run(x)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0)
    hook = lambda metadata: None
    knobs.runtime.launch_exit_hook.add(hook)
    try:
        run(x)
    finally:
        knobs.runtime.launch_exit_hook.remove(hook)
    assert not kernel.native
    run(x)
    assert len(kernel.native) == 1


def test_a_launch_that_is_not_as_known_stays_tritons(one_device):
    kernel, x = Launched(), aligned(32)
    kernel.run.global_scratch_size = 16
    run = prepared(kernel)
    for _ in range(4):
        run(x)
    assert run.direct is None and len(kernel.slow) == 1 and len(kernel.fast) == 3


def test_descriptors_are_encoded_once_an_address(one_device, monkeypatch):
    from triton.backends.nvidia import driver

    encoded = []
    monkeypatch.setattr(driver, "make_tensordesc_arg", lambda x, metadata: encoded.append(x) or [x.data_ptr(), 8, 4])
    kernel, tensors = Launched(described=True), [aligned(32), aligned(48)]
    run = prepared(kernel, blocks=(SimpleNamespace(start=0, of=lambda t: t),))
    for t in (*tensors[:1] * 2, *tensors, *tensors):
        run(t)
    assert [t.data_ptr() for t in encoded] == [t.data_ptr() for t in tensors]
    assert [args[-6:] for args in kernel.native] == [(t.data_ptr(), 8, 4, 32, 64, True) for t in tensors * 2]


def test_a_prepared_launch_that_fails_names_op_and_shapes(one_device):
    kernel = Launched()
    run = prepared(kernel)
    for _ in range(2):
        run(aligned(32))
    run.direct = lambda *args: 1 / 0
    with pytest.raises(_common.KernelLaunchError, match=r"op: kernel launch failed on cpu for \(32,\)"):
        run(aligned(32))
