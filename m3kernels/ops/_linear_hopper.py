"""A frozen weight's product with a low-rank one inside it, for Hopper (sm_90a), in Gluon.

    out = scale * (a b + t l)            a (M, K), b (K, N); t (M, R), l (R, N); scale (N,), or 1

The low-rank product is one or two more steps of the sum over K in the same accumulators: it costs R / K more arithmetic and
no pass over ``out``. b is the weight as it lies, (N, K) in a forward or (K, N) where its input's gradient is asked for.

One warp loads by the copy engine; two warpgroups multiply 64 x 256 each. Programs stay and take tile after tile; the next
tile's operands load while a tile is written.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from m3kernels.ops._common import cdiv, sm_count
from m3kernels.ops._prepared import KEPT, Prepared

CONSUMERS = gl.constexpr(2)  # warpgroups that compute
ROWS = gl.constexpr(64)  # rows of one
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(3)  # 144 KB, and 64 KB that results leave from
TOGETHER = gl.constexpr(8)  # tiles of rows side by side, which share what they read of b in the cache

A_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16))
B_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([256, 64], gl.bfloat16))
B_TILE_ACROSS = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 256], gl.bfloat16))


@gluon.jit
def _tile(index, m_tiles, n_tiles):
    """(row, column) of a tile: a group of rows goes through all columns before the next group."""
    group = index // (TOGETHER * n_tiles)
    within = index - group * (TOGETHER * n_tiles)
    rows = gl.minimum(m_tiles - group * TOGETHER, TOGETHER)
    return group * TOGETHER + within % rows, within // rows


@gluon.jit
def _load(d_left, d_right, memory, count, row, col, k, ACROSS: gl.constexpr):
    s_a, s_b, full, empty = memory
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), CONSUMERS * d_left.block_type.nbytes + d_right.block_type.nbytes)
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(d_left, [row + i * ROWS, k], full.index(slot), s_a.index(slot * CONSUMERS + i))
    if ACROSS:
        tma.async_copy_global_to_shared(d_right, [k, col], full.index(slot), s_b.index(slot))
    else:
        tma.async_copy_global_to_shared(d_right, [col, k], full.index(slot), s_b.index(slot))


@gluon.jit
def _produce(d_a, d_b, d_t, d_l, memory, order, ACROSS: gl.constexpr):
    m_tiles, n_tiles, k_tiles, low_tiles = order
    count = 0
    for index in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _tile(index, m_tiles, n_tiles)
        row, col = m * BLOCK_M, n * BLOCK_N
        for i in range(0, k_tiles):
            _load(d_a, d_b, memory, count + i, row, col, i * BLOCK_K, ACROSS)
        for i in range(0, low_tiles):
            _load(d_t, d_l, memory, count + k_tiles + i, row, col, i * BLOCK_K, ACROSS)
        count += k_tiles + low_tiles


@gluon.jit
def _consume(
    d_out, p_scale, n_cols, memory, s_out, order, which: gl.constexpr, ACROSS: gl.constexpr, SCALED: gl.constexpr
):
    s_a, s_b, full, empty = memory
    m_tiles, n_tiles, k_tiles, low_tiles = order
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    count = 0
    for index in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _tile(index, m_tiles, n_tiles)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        for i in range(0, k_tiles + low_tiles):
            slot = count % STAGES
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            b = s_b.index(slot)
            if not ACROSS:
                b = b.permute((1, 0))
            acc = warpgroup_mma(s_a.index(slot * CONSUMERS + which), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # the product before this one has been read
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=i > 0)
            count += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        if SCALED:
            o_n = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            acc *= gl.load(p_scale + o_n, mask=o_n < n_cols, other=0.0)[None, :]
        tma.store_wait(0)
        s_out.index(which).store(acc.to(d_out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_out, [m * BLOCK_M + which * ROWS, n * BLOCK_N], s_out.index(which))
    tma.store_wait(0)


VARYING = "n_cols m_tiles n_tiles k_tiles low_tiles".split()


@gluon.jit(do_not_specialize=VARYING)
def linear_low_rank_kernel(
    p_scale, d_a, d_b, d_t, d_l, d_out, n_cols, m_tiles, n_tiles, k_tiles, low_tiles,
    ACROSS: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_a.dtype
    s_a = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], A_TILE)
    if ACROSS:
        s_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], B_TILE_ACROSS)
    else:
        s_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], B_TILE)
    s_out = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_N], B_TILE_ACROSS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    memory, order = (s_a, s_b, full, empty), (m_tiles, n_tiles, k_tiles, low_tiles)
    # named: a number written into the lists below is no constexpr
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (d_out, p_scale, n_cols, memory, s_out, order, upper, ACROSS, SCALED)),
            (_consume, (d_out, p_scale, n_cols, memory, s_out, order, lower, ACROSS, SCALED)),
            (_produce, (d_a, d_b, d_t, d_l, memory, order, ACROSS)),
        ],
        [4, 1],
        [232, 40],
    )


class Matrix(NamedTuple):
    """What the copy engine moves of a tensor: from element ``start`` on, rows that begin ``stride`` elements apart."""

    rows: int
    cols: int
    stride: int
    start: int
    block: tuple[int, int]
    layout: gl.NVMMASharedLayout

    def of(self, t: Tensor) -> TensorDescriptor:
        # what its constructor checks, `_prepared` has
        blocks = object.__new__(TensorDescriptor)
        blocks.base = t.as_strided((self.rows, self.cols), (self.stride, 1), t.storage_offset() + self.start)
        blocks.shape, blocks.strides, blocks.block_shape = [self.rows, self.cols], [self.stride, 1], list(self.block)
        blocks.layout, blocks.padding = self.layout, "zero"
        return blocks


@lru_cache(KEPT)
def _prepared(
    m: int, k: int, n: int, rank: int, strides: tuple[int, ...], starts: tuple[int, int], across: bool, scaled: bool,
    dtype: torch.dtype, device: torch.device,
) -> Prepared | None:  # fmt: skip
    """The launch, or None where this kernel does not take the product; ``strides`` and ``starts``: see below."""
    if any(stride % 8 or not stride for stride in strides) or any(start % 8 for start in starts):
        return None  # the copy engine reads rows that begin at 16-byte marks
    tiles = cdiv(m, BLOCK_M.value) * cdiv(n, BLOCK_N.value)
    if dtype not in (torch.bfloat16, torch.float16) or n % 8 or tiles < sm_count(device):
        return None
    (a_stride, weight_stride, t_stride, low_stride), (t_start, low_start) = strides, starts
    left = (ROWS.value, BLOCK_K.value), A_TILE.value
    if across:
        right = (BLOCK_K.value, BLOCK_N.value), B_TILE_ACROSS.value
        weight, low = (k, n, weight_stride), (rank, n, low_stride)
    else:
        right = (BLOCK_N.value, BLOCK_K.value), B_TILE.value
        weight, low = (n, k, weight_stride), (n, rank, low_stride)
    blocks = (
        None,
        Matrix(m, k, a_stride, 0, *left),
        Matrix(*weight, 0, *right),
        Matrix(m, rank, t_stride, t_start, *left),
        Matrix(*low, low_start, *right),
        Matrix(m, n, n, 0, (ROWS.value, BLOCK_N.value), B_TILE_ACROSS.value),
    )
    return Prepared(
        "lora_linear",
        linear_low_rank_kernel,
        device,
        (min(tiles, sm_count(device)),),
        (n, cdiv(m, BLOCK_M.value), cdiv(n, BLOCK_N.value), cdiv(k, BLOCK_K.value), cdiv(rank, BLOCK_K.value)),
        {"ACROSS": across, "SCALED": scaled, "num_warps": 4, "maxnreg": 168},
        blocks,
    )


def linear_low_rank(
    a: Tensor, weight: Tensor, t: Tensor, low: Tensor, rank: int, starts: tuple[int, int], across: bool,
    scale: Tensor | None, shape: tuple[int, ...],
) -> Tensor | None:  # fmt: skip
    """The product in ``shape``, rows side by side, or None where this kernel does not take it.

    ``weight`` is (N, K) or, ``across``, (K, N); ``rank`` columns of t and columns (or rows) of ``low`` count, and begin
    ``starts`` elements into them. All tensors are matrices of unit stride in the last dimension.
    """
    if (a.data_ptr() | weight.data_ptr() | t.data_ptr() | low.data_ptr()) & 15 or weight.dtype != a.dtype:
        return None
    strides = (a.stride(0), weight.stride(0), t.stride(0), low.stride(0))
    n = weight.shape[1 if across else 0]
    run = _prepared(*a.shape, n, rank, strides, starts, across, scale is not None, a.dtype, a.device)
    if run is None or weight.stride(1) != 1:
        return None
    out = a.new_empty(shape)
    run(a if scale is None else scale, a, weight, t, low, out)
    return out
