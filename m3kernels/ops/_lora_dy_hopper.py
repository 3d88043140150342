"""One pass over dy for both of its skinny products, for Hopper (sm_90a), in Gluon.

    du_j = dy_j B_j, a part for each block of columns        dB_j = dy_j^T t_j, a part for each program and block

One warp loads by the copy engine; a warpgroup makes du of a tile (64 rows, 256 columns), another one adds to dB. Tiles are
numbered down the rows of a block of columns, then the next block's; each program takes the same number of them in a row, so
that a block's dB has parts of a few programs that follow each other: part ``program + block``. fp32 adapters beside 16-bit
activations stand as [hi | lo] columns, added up before a part is stored.
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

from m3kernels.ops._common import cdiv, sm_count
from m3kernels.ops._linear_hopper import Matrix
from m3kernels.ops._lora_launch import Layout, fill, three
from m3kernels.ops._prepared import KEPT, Prepared

ROWS = gl.constexpr(64)
COLS = gl.constexpr(256)
T_STAGES = gl.constexpr(4)
# by columns of B, hi and lo; of 32 KB, beside B's and t's tiles of 10 to 48 KB
STAGES = {16: 6, 32: 6, 64: 5}
# above, du's parts are as large as dy: cuBLAS's two passes are faster
RANKS = (16, 32)

Y_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 256], gl.bfloat16))


@gluon.jit
def _place(tile, row_tiles, second, third):
    """(block, row tile, which projection, its block) of a tile; ``second``, ``third``: first blocks of those."""
    block = tile // row_tiles
    which = (block >= second).to(gl.int32) + (block >= third).to(gl.int32)
    first = gl.where(which == 0, 0, gl.where(which == 1, second, third))
    return block, tile - block * row_tiles, which, block - first


@gluon.jit
def _load(d_y, d_t, memory, count, row, col, STAGES: gl.constexpr):
    s_y, s_t, full, empty, t_full, t_empty = memory
    slot, t_slot = count % STAGES, count % T_STAGES
    mbarrier.wait(t_empty.index(t_slot), (count // T_STAGES & 1) ^ 1)
    mbarrier.expect(t_full.index(t_slot), d_t.block_type.nbytes)
    tma.async_copy_global_to_shared(d_t, [row, 0], t_full.index(t_slot), s_t.index(t_slot))
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), d_y.block_type.nbytes)
    tma.async_copy_global_to_shared(d_y, [row, col], full.index(slot), s_y.index(slot))


@gluon.jit
def _produce(ys, ts, memory, first, end, order, STAGES: gl.constexpr):
    row_tiles, second, third = order
    for tile in range(first, end):
        _, m, which, inside = _place(tile, row_tiles, second, third)
        row, col = m * ROWS, inside * COLS
        if which == 0:
            _load(ys[0], ts[0], memory, tile - first, row, col, STAGES)
        elif which == 1:
            _load(ys[1], ts[1], memory, tile - first, row, col, STAGES)
        else:
            _load(ys[2], ts[2], memory, tile - first, row, col, STAGES)


@gluon.jit
def _joined(acc, M: gl.constexpr, RANK: gl.constexpr, SPLIT: gl.constexpr, layout: gl.constexpr):
    """hi + lo."""
    if SPLIT:
        hi, lo = acc.reshape([M, 2, RANK]).permute((0, 2, 1)).split()
        return gl.convert_layout(hi + lo, layout)
    else:
        return gl.convert_layout(acc, layout)


@gluon.jit
def _fill_b(p_b, p_scale, s_b, col, n_cols, RANK: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr):
    """B's rows of a block of columns, times DoRA's scale of each, as [hi | lo]."""
    columns: gl.constexpr = RANK * (2 if SPLIT else 1)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // columns, columns // 4], [4, 1], [1, 0])
    o_n, o_c = gl.arange(0, COLS, gl.SliceLayout(1, layout)), gl.arange(0, columns, gl.SliceLayout(0, layout))
    p_tile = p_b + (col + o_n)[:, None].to(gl.int64) * RANK + (o_c % RANK)[None, :]
    b = gl.load(p_tile, mask=(col + o_n < n_cols)[:, None] & (o_c >= 0)[None, :], other=0.0).to(gl.float32)
    if SCALED:
        b *= gl.load(p_scale + col + o_n, mask=col + o_n < n_cols, other=0.0)[:, None]
    hi = b.to(s_b.dtype)
    if SPLIT:
        lo = (b - hi.to(gl.float32)).to(s_b.dtype)
        s_b.store(gl.where((o_c < RANK)[None, :], hi, lo))
    else:
        s_b.store(hi)
    fence_async_shared()


@gluon.jit
def _make_du(
    bs, p_scale, p_du, s_b, memory, first, end, order, ns, rows, STAGES: gl.constexpr, RANK: gl.constexpr, SPLIT: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    s_y, _, full, empty, _, _ = memory
    row_tiles, second, third = order
    columns: gl.constexpr = RANK * (2 if SPLIT else 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANK, 16])
    o_m, o_r = gl.arange(0, ROWS, gl.SliceLayout(1, narrow)), gl.arange(0, RANK, gl.SliceLayout(0, narrow))
    known = -1
    for tile in range(first, end):
        block, m, which, inside = _place(tile, row_tiles, second, third)
        if block != known:
            if which == 0:
                _fill_b(bs[0], p_scale, s_b, inside * COLS, ns[0], RANK, SPLIT, SCALED)
            elif which == 1:
                _fill_b(bs[1], p_scale + ns[0], s_b, inside * COLS, ns[1], RANK, SPLIT, SCALED)
            else:
                _fill_b(bs[2], p_scale + ns[0] + ns[1], s_b, inside * COLS, ns[2], RANK, SPLIT, SCALED)
            known = block
        count = tile - first
        slot = count % STAGES
        acc = gl.zeros([ROWS, columns], gl.float32, layout)
        mbarrier.wait(full.index(slot), count // STAGES & 1)
        acc = warpgroup_mma(s_y.index(slot), s_b, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
        row = m * ROWS + o_m
        o_du = (block.to(gl.int64) * rows + row)[:, None] * RANK + o_r[None, :]
        gl.store(
            p_du + o_du, _joined(acc, ROWS, RANK, SPLIT, narrow), mask=(row < rows)[:, None] & (o_r < RANK)[None, :]
        )


@gluon.jit
def _make_db(p_db, memory, first, end, order, STAGES: gl.constexpr, RANK: gl.constexpr, SPLIT: gl.constexpr):
    s_y, s_t, full, empty, t_full, t_empty = memory
    row_tiles, second, third = order
    columns: gl.constexpr = RANK * (2 if SPLIT else 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANK, 16])
    o_n, o_r = gl.arange(0, COLS, gl.SliceLayout(1, narrow)), gl.arange(0, RANK, gl.SliceLayout(0, narrow))
    o_db = o_n[:, None] * RANK + o_r[None, :]
    acc = gl.zeros([COLS, columns], gl.float32, layout)
    for tile in range(first, end):
        count, block = tile - first, tile // row_tiles
        slot, t_slot = count % STAGES, count % T_STAGES
        mbarrier.wait(t_full.index(t_slot), count // T_STAGES & 1)
        mbarrier.wait(full.index(slot), count // STAGES & 1)
        acc = warpgroup_mma(s_y.index(slot).permute((1, 0)), s_t.index(t_slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
        mbarrier.arrive(t_empty.index(t_slot), count=1)
        if (tile + 1 == end) | ((tile + 1) // row_tiles != block):
            place = (gl.program_id(0) + block).to(gl.int64) * (COLS * RANK)
            gl.store(p_db + place + o_db, _joined(acc, COLS, RANK, SPLIT, narrow))
            acc = gl.zeros([COLS, columns], gl.float32, layout)


VARYING = "n1 n2 n3 rows row_tiles tiles each second third".split()


@gluon.jit(do_not_specialize=VARYING)
def lora_dy_kernel(
    d_y1, d_y2, d_y3, d_t1, d_t2, d_t3, p_b1, p_b2, p_b3, p_scale, p_du, p_db,
    n1, n2, n3, rows, row_tiles, tiles, each, second, third,
    RANK: gl.constexpr, SPLIT: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr, T_TILE: gl.constexpr,
    B_TILE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_y1.dtype
    columns: gl.constexpr = RANK * (2 if SPLIT else 1)
    s_y = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLS], Y_TILE)
    s_t = gl.allocate_shared_memory(dtype, [T_STAGES, ROWS, columns], T_TILE)
    s_b = gl.allocate_shared_memory(dtype, [COLS, columns], B_TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [T_STAGES, 1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [T_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(T_STAGES):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=1)
    memory, order = (s_y, s_t, full, empty, t_full, t_empty), (row_tiles, second, third)
    ys, ts, bs, ns = (d_y1, d_y2, d_y3), (d_t1, d_t2, d_t3), (p_b1, p_b2, p_b3), (n1, n2, n3)
    first = gl.program_id(0) * each
    end = gl.minimum(first + each, tiles)
    gl.warp_specialize(
        [
            (_make_du, (bs, p_scale, p_du, s_b, memory, first, end, order, ns, rows, STAGES, RANK, SPLIT, SCALED)),
            (_make_db, (p_db, memory, first, end, order, STAGES, RANK, SPLIT)),
            (_produce, (ys, ts, memory, first, end, order, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )


class Pass(NamedTuple):
    """The launch, its tiles for each program, and the fp32 numbers that it hands over."""

    run: Prepared
    row_tiles: int
    each: int
    du_size: int
    db_size: int


def tile_of(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@lru_cache(KEPT)
def prepared(
    layout: Layout, rows: int, ns: tuple[int, ...], scaled: bool, dtype: torch.dtype, adapters: torch.dtype,
    device: torch.device,
) -> Pass | None:  # fmt: skip
    """None where this kernel does not take the pass: other ranks than 16 and 32, columns that the engine cannot copy."""
    rank, columns = layout.rank, layout.rank * (2 if layout.split else 1)
    if rank not in RANKS or dtype not in (torch.bfloat16, torch.float16):
        return None
    if any(n % 8 for n in ns):
        return None
    first = [0]
    for n in ns:
        first.append(first[-1] + cdiv(n, COLS.value))
    row_tiles = cdiv(rows, ROWS.value)
    tiles = row_tiles * first[-1]
    each = cdiv(tiles, sm_count(device))
    programs, count = cdiv(tiles, each), layout.count
    t_tile, b_tile = tile_of(ROWS.value, columns), tile_of(COLS.value, columns)
    last = lambda found: [*found, *found[-1:] * (3 - len(found))]
    ys = [Matrix(rows, n, n, (ROWS.value, COLS.value), Y_TILE.value) for n in ns]
    ts = [
        Matrix(rows, columns, layout.padded, (ROWS.value, columns), t_tile, j * rows * layout.padded)
        for j in range(count)
    ]
    run = Prepared(
        "lora_linear backward (dy)",
        lora_dy_kernel,
        device,
        (programs,),
        (*fill(ns, 0), rows, row_tiles, tiles, each, *first[1:count], *[first[-1]] * (3 - count)),
        {
            "RANK": rank,
            "SPLIT": layout.split,
            "SCALED": scaled,
            "STAGES": STAGES[columns],
            "T_TILE": t_tile,
            "B_TILE": b_tile,
        }
        | {"num_warps": 4, "maxnreg": 168},
        (*last(ys), *last(ts), None, None, None, None, None, None),
    )
    return Pass(run, row_tiles, each, first[-1] * rows * rank, (programs + first[-1]) * COLS.value * rank)


def du_and_db_parts(
    plan: Pass, dys: list[Tensor], t: Tensor, many_b: list[Tensor], scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(blocks, M, R) and (parts, 256, R) in fp32; ``scale``: DoRA's (N of all,), of B's rows for du."""
    du = t.new_empty(plan.du_size, dtype=torch.float32)
    db = t.new_empty(plan.db_size, dtype=torch.float32)
    plan.run(*three(dys), *three([t]), *three(many_b), du if scale is None else scale, du, db)
    return du, db
