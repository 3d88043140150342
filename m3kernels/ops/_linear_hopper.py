"""Frozen weights' products with low-rank ones inside them, for Hopper (sm_90a), in Gluon.

    forward     y_j = k_j * (x W_j^T + t_j low_j^T)             all j in one launch
    ACROSS      dx = sum_j (k_j dy_j) W_j + sum_j du_j A_j      one sum over all j

The low-rank product is one or two more steps of a tile's sum in the same accumulators: it costs R / K more arithmetic and no
pass over the result. Its factors may still be in the making when the product begins: they come last. k of DoRA is applied to
y where it is written, to dy on its way from shared memory to the tensor cores.

One warp loads by the copy engine; two warpgroups multiply 64 x 256 each. Programs stay and take tile after tile; the next
tile's operands load while a tile is written. A program keeps to 177 KB and three quarters of the registers: the passes over
x and dy (:mod:`m3kernels.ops._lora_kernels`) run beside it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m3kernels.ops._common import cdiv, sm_count
from m3kernels.ops._lora_launch import MOST, Layout, fill, three
from m3kernels.ops._prepared import KEPT, Prepared

CONSUMERS = gl.constexpr(2)  # warpgroups that compute
ROWS = gl.constexpr(64)  # rows of one
BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(3)  # 144 KB, and 64 KB that results leave from
TOGETHER = gl.constexpr(8)  # tiles of rows side by side, which share what they read of b in the cache
# of x, for what runs beside the products: 12 KB
BESIDE_STAGES = gl.constexpr(3)
BESIDE_ROWS = gl.constexpr(32)
BESIDE_COLS = gl.constexpr(64)

A_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16))
B_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([256, 64], gl.bfloat16))
X_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([32, 64], gl.bfloat16))
B_TILE_ACROSS = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 256], gl.bfloat16))


@gluon.jit
def _tile(index, m_tiles, n_tiles):
    """(row, column) of a tile: a group of rows goes through all columns before the next group."""
    group = index // (TOGETHER * n_tiles)
    within = index - group * (TOGETHER * n_tiles)
    rows = gl.minimum(m_tiles - group * TOGETHER, TOGETHER)
    return group * TOGETHER + within % rows, within // rows


@gluon.jit
def _part_of(n, second, third):
    """(which output, its first column tile) of column tile n; ``second``, ``third``: where those begin."""
    which = (n >= second).to(gl.int32) + (n >= third).to(gl.int32)
    return which, gl.where(which == 0, 0, gl.where(which == 1, second, third))


@gluon.jit
def _load(d_left, d_right, memory, count, row, left_k, right, right_k, ACROSS: gl.constexpr):
    s_a, s_b, full, empty = memory
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), CONSUMERS * d_left.block_type.nbytes + d_right.block_type.nbytes)
    for i in gl.static_range(CONSUMERS):
        tma.async_copy_global_to_shared(
            d_left, [row + i * ROWS, left_k], full.index(slot), s_a.index(slot * CONSUMERS + i)
        )
    if ACROSS:
        tma.async_copy_global_to_shared(d_right, [right_k, right], full.index(slot), s_b.index(slot))
    else:
        tma.async_copy_global_to_shared(d_right, [right, right_k], full.index(slot), s_b.index(slot))


@gluon.jit
def _load_all(d_left, d_right, memory, count, row, col, k_tiles, ACROSS: gl.constexpr):
    for i in range(0, k_tiles):
        _load(d_left, d_right, memory, count + i, row, i * BLOCK_K, col, i * BLOCK_K, ACROSS)
    return count + k_tiles


@gluon.jit
def _produce(left, right, d_t, d_low, memory, order, k_tiles, rows, low_tiles, second, third, starts, ACROSS: gl.constexpr,
             COUNT: gl.constexpr, OVERLAP: gl.constexpr):  # fmt: skip
    m_tiles, n_tiles = order
    count = 0
    for index in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _tile(index, m_tiles, n_tiles)
        row = m * BLOCK_M
        if ACROSS:
            col, t_row, low_row = n * BLOCK_N, row, n * BLOCK_N
            for j in gl.static_range(COUNT):
                count = _load_all(left[j], right[j], memory, count, row, col, k_tiles[j], ACROSS)
        else:
            which, first = _part_of(n, second, third)
            col = (n - first) * BLOCK_N
            t_row, low_row = (
                which * rows + row,
                col + gl.where(which == 0, 0, gl.where(which == 1, starts[0], starts[1])),
            )
            if COUNT == 1 or which == 0:
                count = _load_all(left[0], right[0], memory, count, row, col, k_tiles[0], ACROSS)
            elif COUNT == 2 or which == 1:
                count = _load_all(left[0], right[1], memory, count, row, col, k_tiles[0], ACROSS)
            else:
                count = _load_all(left[0], right[2], memory, count, row, col, k_tiles[0], ACROSS)
        if OVERLAP:
            # the low-rank factors come from the kernel before this one, which still runs during the first tile
            gdc_wait()
            gdc_launch_dependents()
        for i in range(0, low_tiles):
            _load(d_t, d_low, memory, count + i, t_row, i * BLOCK_K, low_row, i * BLOCK_K, ACROSS)
        count += low_tiles


@gluon.jit
def _store(d_out, s_out, acc, row, col):
    tma.store_wait(0)
    s_out.store(acc.to(d_out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(d_out, [row, col], s_out)


@gluon.jit
def _steps(acc, memory, count, n_tiles, which: gl.constexpr, ACROSS: gl.constexpr):
    s_a, s_b, full, empty = memory
    for i in range(0, n_tiles):
        slot = (count + i) % STAGES
        mbarrier.wait(full.index(slot), (count + i) // STAGES & 1)
        b = s_b.index(slot)
        if not ACROSS:
            b = b.permute((1, 0))
        acc = warpgroup_mma(s_a.index(slot * CONSUMERS + which), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # the product before this one has been read
        mbarrier.arrive(empty.index((count + i + STAGES - 1) % STAGES), count=1, pred=i > 0)
    return acc


@gluon.jit
def _scaled_steps(acc, memory, count, n_tiles, p_scale, width, which: gl.constexpr, layout: gl.constexpr):
    """Columns of a times a scale of each, rounded, on their way through registers.

    Through shared memory it took a quarter more time, which that is short of; and two products of one warpgroup in flight
    more registers than there are: the other warpgroup's fills the tensor cores meanwhile.
    """
    s_a, s_b, full, empty = memory
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    o_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, left))
    for i in range(0, n_tiles):
        slot, at = (count + i) % STAGES, i * BLOCK_K + o_k
        scale = gl.load(p_scale + at, mask=at < width, other=0.0)
        mbarrier.wait(full.index(slot), (count + i) // STAGES & 1)
        a = s_a.index(slot * CONSUMERS + which).load(left)
        a = (a.to(gl.float32) * scale[None, :]).to(a.dtype)
        acc = warpgroup_mma(a, s_b.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
    return acc


@gluon.jit
def _consume(outs, p_scale, ns, memory, s_out, order, k_tiles, low_tiles, second, third, starts, which: gl.constexpr,
             ACROSS: gl.constexpr, COUNT: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr):  # fmt: skip
    m_tiles, n_tiles = order
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    empty = memory[3]
    count = 0
    for index in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _tile(index, m_tiles, n_tiles)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        steps = low_tiles
        if ACROSS and SCALED:
            done, before = 0, 0
            for j in gl.static_range(COUNT):
                acc = _scaled_steps(acc, memory, count + done, k_tiles[j], p_scale + before, ns[j], which, layout)
                done += k_tiles[j]
                before += ns[j]
            acc = _steps(acc, memory, count + done, low_tiles, which, ACROSS)
            steps += done
        else:
            for j in gl.static_range(COUNT if ACROSS else 1):
                steps += k_tiles[j]
            acc = _steps(acc, memory, count, steps, which, ACROSS)
        count += steps
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        row = m * BLOCK_M + which * ROWS
        if ACROSS:
            _store(outs[0], s_out.index(which), acc, row, n * BLOCK_N)
        else:
            part, first = _part_of(n, second, third)
            col = (n - first) * BLOCK_N
            if SCALED:
                if OVERLAP:
                    gdc_wait()
                o_n = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
                before = gl.where(part == 0, 0, gl.where(part == 1, starts[0], starts[1]))
                n_cols = gl.where(part == 0, ns[0], gl.where(part == 1, ns[1], ns[2]))
                acc *= gl.load(p_scale + before + o_n, mask=o_n < n_cols, other=0.0)[None, :]
            if COUNT == 1 or part == 0:
                _store(outs[0], s_out.index(which), acc, row, col)
            elif COUNT == 2 or part == 1:
                _store(outs[1], s_out.index(which), acc, row, col)
            else:
                _store(outs[2], s_out.index(which), acc, row, col)
    tma.store_wait(0)


@gluon.jit
def _load_beside(d_x, s_x, ready, count, tile, row_tiles):
    slot = count % BESIDE_STAGES
    mbarrier.expect(ready.index(slot), d_x.block_type.nbytes)
    block = tile // row_tiles
    at = [(tile - block * row_tiles) * BESIDE_ROWS, block * BESIDE_COLS]
    tma.async_copy_global_to_shared(d_x, at, ready.index(slot), s_x.index(slot))


@gluon.jit
def _u_of(p_u, u_stride, tile, row_tiles, rows, part, RANK: gl.constexpr, SPLIT: gl.constexpr, right: gl.constexpr):
    """(hi, lo) of one layer's u beside a tile of x; lo is hi where there is none."""
    o_m = tile % row_tiles * BESIDE_ROWS + gl.arange(0, BESIDE_ROWS, gl.SliceLayout(1, right))
    o_r = gl.arange(0, RANK, gl.SliceLayout(0, right))
    p_u += o_m.to(gl.int64)[:, None] * u_stride + o_r[None, :]
    mask = (o_m < rows)[:, None] & (o_r >= 0)[None, :]
    hi = gl.load(p_u, mask=mask, other=0.0)
    lo = hi
    if SPLIT:
        lo = gl.load(p_u + part, mask=mask, other=0.0)
    return hi, lo


@gluon.jit
def _add_beside(acc, x, hi, lo, SPLIT: gl.constexpr):
    acc = mma_v2(x, hi, acc)
    if SPLIT:
        acc = mma_v2(x, lo, acc)
    return acc


@gluon.jit
def _beside(d_x, p_u, p_sums, s_x, ready, tiles, row_tiles, each, rows, padded, COUNT: gl.constexpr, RANK: gl.constexpr,
            SPLIT: gl.constexpr):  # fmt: skip
    """Parts of dA_j = du_j^T x in the time that the products leave, transposed: two warps, a tile of 32 rows at a time.

    Tiles are numbered down the rows of a block of columns, then the next block's; part ``program + block`` is a program's.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [2, 1], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    o_n = gl.arange(0, BESIDE_COLS, gl.SliceLayout(1, layout))
    o_sum = o_n[:, None] * RANK + gl.arange(0, RANK, gl.SliceLayout(0, layout))[None, :]
    size: gl.constexpr = BESIDE_COLS * RANK
    stride = COUNT * padded
    first = gl.program_id(0) * each
    end = gl.minimum(first + each, tiles)
    gdc_wait()
    for i in gl.static_range(BESIDE_STAGES - 1):
        if first + i < end:
            _load_beside(d_x, s_x, ready, i, first + i, row_tiles)
    acc1 = gl.zeros([BESIDE_COLS, RANK], gl.float32, layout)
    acc2, acc3 = acc1, acc1
    hi1, lo1 = _u_of(p_u, stride, first, row_tiles, rows, RANK, RANK, SPLIT, right)
    hi2, lo2, hi3, lo3 = hi1, lo1, hi1, lo1
    if COUNT > 1:
        hi2, lo2 = _u_of(p_u + padded, stride, first, row_tiles, rows, RANK, RANK, SPLIT, right)
    if COUNT > 2:
        hi3, lo3 = _u_of(p_u + 2 * padded, stride, first, row_tiles, rows, RANK, RANK, SPLIT, right)
    for tile in range(first, end):
        count, block = tile - first, tile // row_tiles
        slot = count % BESIDE_STAGES
        mbarrier.wait(ready.index(slot), count // BESIDE_STAGES & 1)
        x = s_x.index(slot).permute((1, 0)).load(left)
        # both warps have read the tile before this one
        gl.thread_barrier()
        if tile + BESIDE_STAGES - 1 < end:
            _load_beside(d_x, s_x, ready, count + BESIDE_STAGES - 1, tile + BESIDE_STAGES - 1, row_tiles)
        acc1 = _add_beside(acc1, x, hi1, lo1, SPLIT)
        # the next tile's, whose latency would else be paid in every step
        hi1, lo1 = _u_of(p_u, stride, tile + 1, row_tiles, rows, RANK, RANK, SPLIT, right)
        if COUNT > 1:
            acc2 = _add_beside(acc2, x, hi2, lo2, SPLIT)
            hi2, lo2 = _u_of(p_u + padded, stride, tile + 1, row_tiles, rows, RANK, RANK, SPLIT, right)
        if COUNT > 2:
            acc3 = _add_beside(acc3, x, hi3, lo3, SPLIT)
            hi3, lo3 = _u_of(p_u + 2 * padded, stride, tile + 1, row_tiles, rows, RANK, RANK, SPLIT, right)
        if (tile + 1 == end) | ((tile + 1) // row_tiles != block):
            p_own = p_sums + (gl.program_id(0) + block).to(gl.int64) * (size * COUNT)
            gl.store(p_own + o_sum, acc1)
            if COUNT > 1:
                gl.store(p_own + size + o_sum, acc2)
            if COUNT > 2:
                gl.store(p_own + 2 * size + o_sum, acc3)
            acc1 = gl.zeros([BESIDE_COLS, RANK], gl.float32, layout)
            acc2, acc3 = acc1, acc1


VARYING = "n1 n2 n3 k_tiles1 k_tiles2 k_tiles3 m_tiles n_tiles rows low_tiles second third start2 start3".split()
VARYING += "tiles_beside row_tiles_beside each_beside padded".split()


@gluon.jit(do_not_specialize=VARYING)
def linear_low_rank_kernel(
    p_scale, d_a1, d_a2, d_a3, d_b1, d_b2, d_b3, d_t, d_low, d_out1, d_out2, d_out3, d_x, p_u, p_sums,
    n1, n2, n3, k_tiles1, k_tiles2, k_tiles3, m_tiles, n_tiles, rows, low_tiles, second, third, start2, start3,
    tiles_beside, row_tiles_beside, each_beside, padded,
    ACROSS: gl.constexpr, COUNT: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr, RANK: gl.constexpr,
    SPLIT: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_a1.dtype
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
    memory, order, k_tiles = (s_a, s_b, full, empty), (m_tiles, n_tiles), (k_tiles1, k_tiles2, k_tiles3)
    left, right, outs, ns = (d_a1, d_a2, d_a3), (d_b1, d_b2, d_b3), (d_out1, d_out2, d_out3), (n1, n2, n3)
    starts = (start2, start3)
    # named: a number written into the lists below is no constexpr
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    if BESIDE:
        s_x = gl.allocate_shared_memory(dtype, [BESIDE_STAGES, BESIDE_ROWS, BESIDE_COLS], X_TILE)
        ready = gl.allocate_shared_memory(gl.int64, [BESIDE_STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(BESIDE_STAGES):
            mbarrier.init(ready.index(i), count=1)
        gl.warp_specialize(
            [
                (_consume, (outs, p_scale, ns, memory, s_out, order, k_tiles, low_tiles, second, third, starts, upper, ACROSS, COUNT, SCALED, OVERLAP)),
                (_consume, (outs, p_scale, ns, memory, s_out, order, k_tiles, low_tiles, second, third, starts, lower, ACROSS, COUNT, SCALED, OVERLAP)),
                (_beside, (d_x, p_u, p_sums, s_x, ready, tiles_beside, row_tiles_beside, each_beside, rows, padded, COUNT, RANK, SPLIT)),
                (_produce, (left, right, d_t, d_low, memory, order, k_tiles, rows, low_tiles, second, third, starts, ACROSS, COUNT, OVERLAP)),
            ],
            [4, 2, 1],
            [168, 168, 168],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (outs, p_scale, ns, memory, s_out, order, k_tiles, low_tiles, second, third, starts, upper, ACROSS, COUNT, SCALED, OVERLAP)),
                (_consume, (outs, p_scale, ns, memory, s_out, order, k_tiles, low_tiles, second, third, starts, lower, ACROSS, COUNT, SCALED, OVERLAP)),
                (_produce, (left, right, d_t, d_low, memory, order, k_tiles, rows, low_tiles, second, third, starts, ACROSS, COUNT, OVERLAP)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip


class Matrix(NamedTuple):
    """What the copy engine moves of a tensor: from element ``start`` on, rows that begin ``stride`` elements apart."""

    rows: int
    cols: int
    stride: int
    block: tuple[int, int]
    layout: gl.NVMMASharedLayout
    start: int = 0

    def of(self, t: Tensor) -> TensorDescriptor:
        # what its constructor checks, `_prepared` has
        blocks = object.__new__(TensorDescriptor)
        blocks.base = t.as_strided((self.rows, self.cols), (self.stride, 1), t.storage_offset() + self.start)
        blocks.shape, blocks.strides, blocks.block_shape = [self.rows, self.cols], [self.stride, 1], list(self.block)
        blocks.layout, blocks.padding = self.layout, "zero"
        return blocks


class Tiles(NamedTuple):
    """How the parts of dA lie: ``tiles`` in all, ``row_tiles`` for a block of ``BESIDE_COLS``, ``each`` for a program."""

    tiles: int
    row_tiles: int
    each: int
    size: int

    @classmethod
    def of(cls, m: int, k: int, programs: int, layout: Layout) -> "Tiles":
        row_tiles, blocks = cdiv(m, BESIDE_ROWS.value), cdiv(k, BESIDE_COLS.value)
        each = cdiv(row_tiles * blocks, programs)
        return cls(
            row_tiles * blocks, row_tiles, each, (programs + blocks) * BESIDE_COLS.value * layout.rank * layout.count
        )


@lru_cache(KEPT)
def _prepared(
    m: int, ks: tuple[int, ...], ns: tuple[int, ...], layout: Layout, strides: tuple[int, ...], weight_strides: tuple[int, ...],
    x_stride: int, across: bool, scaled: bool, overlaps: bool, dtype: torch.dtype, device: torch.device,
) -> tuple[Prepared, Tiles] | None:  # fmt: skip
    """The launch, or None where this kernel does not take the product.

    ``ks``: columns of the left operands; ``ns``: of the outputs; ``x_stride``: where dA is made beside it, else 0.
    """
    count = len(weight_strides)
    if any(stride % 8 or not stride for stride in strides + weight_strides) or x_stride % 8:
        return None  # the copy engine reads rows that begin at 16-byte marks
    first = [0]
    for n in ns:
        first.append(first[-1] + cdiv(n, BLOCK_N.value))
    m_tiles, n_tiles = cdiv(m, BLOCK_M.value), first[-1]
    fits = dtype in (torch.bfloat16, torch.float16) and not any(n % 8 for n in ns)
    if not fits or m_tiles * n_tiles < sm_count(device):
        return None
    left, piece = ((ROWS.value, BLOCK_K.value), A_TILE.value), ((ROWS.value, BLOCK_N.value), B_TILE_ACROSS.value)
    padded, width, programs = layout.padded, layout.width, sm_count(device)
    if across:
        right = (BLOCK_K.value, BLOCK_N.value), B_TILE_ACROSS.value
        low_tiles = cdiv(count * padded, BLOCK_K.value)
        weights = [Matrix(k, ns[0], stride, *right) for k, stride in zip(ks, weight_strides)]
        t = Matrix(m, count * padded, count * padded, *left)
        low = Matrix(count * padded, ns[0], ns[0], *right)
        starts, sizes, second_third = ks, ks, (n_tiles, n_tiles)
    else:
        right = (BLOCK_N.value, BLOCK_K.value), B_TILE.value
        low_tiles = cdiv(width, BLOCK_K.value)
        weights = [Matrix(n, ks[0], stride, *right) for n, stride in zip(ns, weight_strides)]
        t = Matrix(count * m, width, padded, *left)
        low = Matrix(sum(ns), width, padded, *right)
        starts, sizes, second_third = ns, ns, (*first[1:count], *[n_tiles] * (MOST - count))
    second_start, third_start = (sum(starts[:1]), sum(starts[:2]))
    lefts = [Matrix(m, k, stride, *left) for k, stride in zip(ks, strides)]
    outs = [Matrix(m, n, n, *piece) for n in ns]
    last = lambda found: [*found, *found[-1:] * (MOST - len(found))]
    beside = Tiles.of(m, ns[0], programs, layout)
    k_tiles = tuple(cdiv(k, BLOCK_K.value) for k in ks)
    x_blocks = BESIDE_ROWS.value, BESIDE_COLS.value
    run = Prepared(
        "lora_linear",
        linear_low_rank_kernel,
        device,
        (programs,),
        (*fill(sizes, 0), *fill(k_tiles, 0), m_tiles, n_tiles, m, low_tiles, *second_third, second_start, third_start)
        + (*beside[:3], padded),
        {
            "ACROSS": across,
            "COUNT": count,
            "SCALED": scaled,
            "OVERLAP": overlaps,
            "RANK": layout.rank if x_stride else 16,
        }
        | {"SPLIT": layout.split, "BESIDE": x_stride > 0, "num_warps": 4, "maxnreg": 168}
        | ({"launch_pdl": True} if overlaps else {}),
        (None, *last(lefts), *last(weights), t, low, *last(outs))
        + (Matrix(m, ns[0], x_stride or ns[0], x_blocks, X_TILE.value), None, None),
    )
    return run, beside


class Products(NamedTuple):
    """Results, and where it was made beside them what dA is the sum of."""

    outs: list[Tensor]
    parts: Tensor
    tiles: Tiles


def linear_low_rank(
    lefts: list[Tensor], weights: list[Tensor], t: Tensor, low: Tensor, layout: Layout, across: bool, scale: Tensor | None,
    sizes: list[tuple[int, ...]], overlaps: bool, x: Tensor | None = None,
) -> Products | None:  # fmt: skip
    """The products in ``sizes``, rows side by side, or None where this kernel does not take them.

    One left operand and several weights (N, K) give several results; ``across``, several of both, weights (K, N), one sum.
    ``t`` and ``low``: fresh, as :mod:`m3kernels.ops._lora_launch` lays them. ``scale``: of all results' columns, or ``across``
    of all left columns. ``overlaps``: the kernel before this one wrote t and low and lets this one begin. ``x`` (M, columns of
    the result): dA_j = t_j^T x is made beside the product.
    """
    bits, dtype = 0, t.dtype
    for tensor in (*lefts, *weights, *([] if x is None else [x])):
        bits |= tensor.data_ptr()
        if tensor.stride(1) != 1 or tensor.dtype != dtype:
            return None
    if bits & 15:
        return None
    found = _prepared(
        lefts[0].shape[0], tuple([a.shape[1] for a in lefts]), tuple([size[-1] for size in sizes]), layout,
        tuple([a.stride(0) for a in lefts]), tuple([w.stride(0) for w in weights]), 0 if x is None else x.stride(0), across,
        scale is not None, overlaps, dtype, t.device,
    )  # fmt: skip
    if found is None:
        return None
    run, tiles = found
    outs = [t.new_empty(size) for size in sizes]
    parts = t.new_empty(0 if x is None else tiles.size, dtype=torch.float32)
    scale, x, given = (t if scale is None else scale), (outs[0] if x is None else x), (t if x is None else parts)
    run(scale, *three(lefts), *three(weights), t, low, *three(outs), x, t, given)
    return Products(outs, parts, tiles)
