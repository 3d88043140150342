"""Frozen weights' products with low-rank ones inside them, for Hopper (sm_90a), in Gluon.

    forward     y_j = k_j * (x W_j^T + t_j low_j^T)             all j in one launch
    ACROSS      dx = sum_j dz_j W_j + sum_j du_j A_j            one sum over all j

The low-rank product is one or two more steps of a tile's sum in the same accumulators: it costs R / K more arithmetic and no
pass over the result. Its factors may still be in the making when the product begins: they come last. k of DoRA is applied
where y is written.

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m3kernels.ops._beside import BLOCK_M, READY, TOGETHER, await_rows, new_queue, next_tile, told, took
from m3kernels.ops._common import cdiv, sm_count
from m3kernels.ops._lora_launch import MOST, Layout, fill, three
from m3kernels.ops._prepared import KEPT, Prepared

CONSUMERS = gl.constexpr(2)  # warpgroups that compute
ROWS = gl.constexpr(64)  # rows of one
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(3)  # 144 KB, and 64 KB that results leave from

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
def _produce(left, right, d_t, d_low, p_work, memory, queue, order, k_tiles, rows, low_tiles, second, third, starts, ready,
             ACROSS: gl.constexpr, COUNT: gl.constexpr, OVERLAP: gl.constexpr, BESIDE: gl.constexpr):  # fmt: skip
    m_tiles, n_tiles = order
    total = m_tiles * n_tiles
    count, taken = 0, 0
    index = next_tile(p_work) if BESIDE else gl.program_id(0)
    while index < total:
        if BESIDE:
            told(index, queue, taken)
        m, n = _tile(index, m_tiles, n_tiles)
        row = m * BLOCK_M
        if ACROSS:
            col, t_row, low_row = n * BLOCK_N, row, n * BLOCK_N
            for j in gl.static_range(COUNT):
                count = _load_all(left[j], right[j], memory, count, row, col, k_tiles[j], ACROSS)
        else:
            which, first = _part_of(n, second, third)
            col = (n - first) * BLOCK_N
            t_row = which * rows + row
            low_row = col + gl.where(which == 0, 0, gl.where(which == 1, starts[0], starts[1]))
            if COUNT == 1 or which == 0:
                count = _load_all(left[0], right[0], memory, count, row, col, k_tiles[0], ACROSS)
            elif COUNT == 2 or which == 1:
                count = _load_all(left[0], right[1], memory, count, row, col, k_tiles[0], ACROSS)
            else:
                count = _load_all(left[0], right[2], memory, count, row, col, k_tiles[0], ACROSS)
        # the low-rank factors come from the kernel before this one, which still runs during the first tile
        if BESIDE:
            await_rows(p_work + READY + m, ready)
            gdc_launch_dependents()
        elif OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        for i in range(0, low_tiles):
            _load(d_t, d_low, memory, count + i, t_row, i * BLOCK_K, low_row, i * BLOCK_K, ACROSS)
        count += low_tiles
        taken += 1
        index = next_tile(p_work) if BESIDE else index + gl.num_programs(0)
    if BESIDE:
        told(total, queue, taken)
        # what follows this kernel may count on the end of the one before it
        gdc_wait()


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
def _consume(outs, p_scale, ns, memory, queue, s_out, order, k_tiles, low_tiles, second, third, starts, which: gl.constexpr,
             ACROSS: gl.constexpr, COUNT: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr,
             BESIDE: gl.constexpr):  # fmt: skip
    m_tiles, n_tiles = order
    total = m_tiles * n_tiles
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    empty = memory[3]
    count, taken = 0, 0
    index = took(queue, taken) if BESIDE else gl.program_id(0)
    while index < total:
        m, n = _tile(index, m_tiles, n_tiles)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        steps = low_tiles
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
                if OVERLAP and not BESIDE:
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
        taken += 1
        index = took(queue, taken) if BESIDE else index + gl.num_programs(0)
    tma.store_wait(0)


VARYING = "n1 n2 n3 k_tiles1 k_tiles2 k_tiles3 m_tiles n_tiles rows low_tiles second third start2 start3 ready".split()


@gluon.jit(do_not_specialize=VARYING)
def linear_low_rank_kernel(
    p_scale, p_work, d_a1, d_a2, d_a3, d_b1, d_b2, d_b3, d_t, d_low, d_out1, d_out2, d_out3,
    n1, n2, n3, k_tiles1, k_tiles2, k_tiles3, m_tiles, n_tiles, rows, low_tiles, second, third, start2, start3, ready,
    ACROSS: gl.constexpr, COUNT: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr, BESIDE: gl.constexpr,
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
    queue = new_queue()
    memory, order, k_tiles = (s_a, s_b, full, empty), (m_tiles, n_tiles), (k_tiles1, k_tiles2, k_tiles3)
    left, right, outs, ns = (d_a1, d_a2, d_a3), (d_b1, d_b2, d_b3), (d_out1, d_out2, d_out3), (n1, n2, n3)
    starts = (start2, start3)
    # named: a number written into the lists below is no constexpr
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (outs, p_scale, ns, memory, queue, s_out, order, k_tiles, low_tiles, second, third, starts, upper,
                        ACROSS, COUNT, SCALED, OVERLAP, BESIDE)),
            (_consume, (outs, p_scale, ns, memory, queue, s_out, order, k_tiles, low_tiles, second, third, starts, lower,
                        ACROSS, COUNT, SCALED, OVERLAP, BESIDE)),
            (_produce, (left, right, d_t, d_low, p_work, memory, queue, order, k_tiles, rows, low_tiles, second, third, starts,
                        ready, ACROSS, COUNT, OVERLAP, BESIDE)),
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


@lru_cache(KEPT)
def _prepared(
    m: int, ks: tuple[int, ...], ns: tuple[int, ...], layout: Layout, strides: tuple[int, ...], weight_strides: tuple[int, ...],
    across: bool, scaled: bool, overlaps: bool, makers: int, dtype: torch.dtype, device: torch.device,
) -> Prepared | None:  # fmt: skip
    """The launch, or None where this kernel does not take the product.

    ``ks``: columns of the left operands; ``ns``: of the outputs.
    """
    count = len(weight_strides)
    if any(stride % 8 or not stride for stride in strides + weight_strides):
        return None  # the copy engine reads rows that begin at 16-byte marks
    first = [0]
    for n in ns:
        first.append(first[-1] + cdiv(n, BLOCK_N.value))
    m_tiles, n_tiles = cdiv(m, BLOCK_M.value), first[-1]
    fits = dtype in (torch.bfloat16, torch.float16) and not any(n % 8 for n in ns)
    if not fits or m_tiles * n_tiles < sm_count(device):
        return None
    left, piece = ((ROWS.value, BLOCK_K.value), A_TILE.value), ((ROWS.value, BLOCK_N.value), B_TILE_ACROSS.value)
    padded, width = layout.padded, layout.width
    if across:
        right = (BLOCK_K.value, BLOCK_N.value), B_TILE_ACROSS.value
        low_tiles = cdiv(count * padded, BLOCK_K.value)
        weights = [Matrix(k, ns[0], stride, *right) for k, stride in zip(ks, weight_strides)]
        t = Matrix(m, count * padded, count * padded, *left)
        low = Matrix(count * padded, ns[0], ns[0], *right)
        beyond = (n_tiles, n_tiles)
    else:
        right = (BLOCK_N.value, BLOCK_K.value), B_TILE.value
        low_tiles = cdiv(width, BLOCK_K.value)
        weights = [Matrix(n, ks[0], stride, *right) for n, stride in zip(ns, weight_strides)]
        t = Matrix(count * m, width, padded, *left)
        low = Matrix(sum(ns), width, padded, *right)
        beyond = (*first[1:count], *[n_tiles] * (MOST - count))
    lefts = [Matrix(m, k, stride, *left) for k, stride in zip(ks, strides)]
    outs = [Matrix(m, n, n, *piece) for n in ns]
    last = lambda found: [*found, *found[-1:] * (MOST - len(found))]
    # where the second and the third output begin
    starts, k_tiles = (sum(ns[:1]), sum(ns[:2])), tuple(cdiv(k, BLOCK_K.value) for k in ks)
    return Prepared(
        "lora_linear",
        linear_low_rank_kernel,
        device,
        (min(m_tiles * n_tiles, sm_count(device)),),
        (*fill(ns, 0), *fill(k_tiles, 0), m_tiles, n_tiles, m, low_tiles, *beyond, *starts, makers),
        {
            "ACROSS": across,
            "COUNT": count,
            "SCALED": scaled,
            "OVERLAP": overlaps,
            "BESIDE": makers > 0,
            "num_warps": 4,
            "maxnreg": 168,
        }
        | ({"launch_pdl": True} if overlaps else {}),
        (None, None, *last(lefts), *last(weights), t, low, *last(outs)),
    )


def takes(
    lefts: list[Tensor],
    weights: list[Tensor],
    layout: Layout,
    across: bool,
    scale: Tensor | None,
    ns: list[int],
    overlaps: bool,
    makers: int = 0,
) -> Prepared | None:
    """The launch of :func:`linear_low_rank`, or None where this kernel does not take it."""
    bits, dtype = 0, lefts[0].dtype
    for tensor in (*lefts, *weights):
        bits |= tensor.data_ptr()
        if tensor.stride(1) != 1 or tensor.dtype != dtype:
            return None
    if bits & 15:
        return None
    return _prepared(
        lefts[0].shape[0], tuple([a.shape[1] for a in lefts]), tuple(ns), layout, tuple([a.stride(0) for a in lefts]),
        tuple([w.stride(0) for w in weights]), across, scale is not None, overlaps, makers, dtype, lefts[0].device,
    )  # fmt: skip


def linear_low_rank(
    lefts: list[Tensor], weights: list[Tensor], t: Tensor, low: Tensor, layout: Layout, across: bool, scale: Tensor | None,
    sizes: list[tuple[int, ...]], overlaps: bool, work: Tensor | None = None, makers: int = 0,
) -> list[Tensor] | None:  # fmt: skip
    """The products in ``sizes``, rows side by side, or None where this kernel does not take them.

    One left operand and several weights (N, K) give several results; ``across``, several of both, weights (K, N), one sum.
    ``t`` and ``low``: fresh, as :mod:`m3kernels.ops._lora_launch` lays them. ``scale``: of all results' columns. ``overlaps``:
    the kernel before this one wrote t and low and lets this one begin, as this one does the next. ``work``: that of
    :mod:`m3kernels.ops._beside`, where a kernel beside this one writes each tile of rows in ``makers`` parts.
    """
    run = takes(lefts, weights, layout, across, scale, [size[-1] for size in sizes], overlaps, makers)
    if run is None:
        return None
    outs = [t.new_empty(size) for size in sizes]
    run(
        t if scale is None else scale,
        low if work is None else work,
        *three(lefts),
        *three(weights),
        t,
        low,
        *three(outs),
    )
    return outs
