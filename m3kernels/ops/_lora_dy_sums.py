"""What the programs of :mod:`m3kernels.ops._lora_dy_hopper` leave of du and dB, added up in a fixed order; in Gluon.

Parts are fp32, in the order in which the warpgroups hold them (:func:`m3kernels.ops._beside.share_offsets`). A load takes 2 us
beside a product, so that many are under way at once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from m3kernels.ops._beside import READY, await_count, rows_written, share_offsets

ROWS = gl.constexpr(64)
COLS = gl.constexpr(128)
SUMMED = gl.constexpr(1024)  # numbers of du that a warpgroup adds up at once
MOST_SHARES = gl.constexpr(4)  # programs that have the same columns: their parts of dB are loaded side by side


@gluon.constexpr_function
def unit_rows(rank, count):
    """Rows of du that are summed, and counted, at a time: few where there are few sums to make."""
    return 32 if rank == 64 and count == 1 else 64


@gluon.jit
def put_db(db, p_db, p_scale, factor, o_col, o_r, before, n_cols, rank, SCALED: gl.constexpr):
    """Numbers of dB, times DoRA's scale of each column of dy."""
    db *= factor
    if SCALED:
        db *= gl.load(p_scale + o_col, mask=o_col < n_cols, other=0.0)[:, None]
    o_db = (before + o_col)[:, None].to(gl.int64) * rank + o_r[None, :]
    gl.store(p_db + o_db, db.to(p_db.dtype.element_ty), mask=(o_col < n_cols)[:, None] & (o_r < rank)[None, :])


@gluon.jit
def share_db(sums, p_slabs, p_arrived, p_db, p_scale, factor, first, lane, own, before, n_cols, rank, half: gl.constexpr,
             RANK: gl.constexpr, BLOCKS: gl.constexpr, SCALED: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Leaves dB of these rows; as soon as all shares have, adds up a part of the columns, in the order of the shares."""
    HALF: gl.constexpr = BLOCKS // 2
    # columns of dy, and of those of B, that are added up at once
    SOME: gl.constexpr = COLS if RANK < 64 else COLS // 2
    FEW: gl.constexpr = RANK if RANK < 64 else RANK // 2
    share, shares, _ = own
    size: gl.constexpr = HALF * COLS * RANK
    p_lane = p_slabs + ((lane * 2 + half) * shares).to(gl.int64) * size
    for c in gl.static_range(HALF):
        gl.store(p_lane + share * size + c * (COLS * RANK) + share_offsets(COLS, RANK, layout), sums[c])
    gl.thread_barrier()
    p_count = p_arrived + lane * 2 + half
    gl.atomic_add(p_count, 1, sem="release", scope="gpu")
    await_count(p_count, shares)
    gl.thread_barrier()
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    o_n, o_r = gl.arange(0, SOME, gl.SliceLayout(1, narrow)), gl.arange(0, FEW, gl.SliceLayout(0, narrow))
    o_sum = share_offsets(SOME, FEW, narrow)
    for unit in range(share, HALF * COLS // SOME, shares):
        column = unit * SOME
        col = (first + 2 * (column // COLS) + half) * COLS + column % COLS
        # 64 columns of dy by one of B are 64 numbers
        loaded = ()
        for r in gl.static_range(0, RANK, FEW):
            for k in gl.static_range(MOST_SHARES):
                p_share = p_lane + k * size + unit * (SOME * RANK) + r * 64
                there = (o_sum >= 0) & (k < shares)
                loaded = loaded + (gl.load(p_share + o_sum, mask=there, other=0.0, cache_modifier=".cg"),)
        for r in gl.static_range(0, RANK, FEW):
            total = loaded[r // FEW * MOST_SHARES]
            for k in gl.static_range(1, MOST_SHARES):
                total += loaded[r // FEW * MOST_SHARES + k]
            put_db(total, p_db, p_scale, factor, col + o_n, r + o_r, before, n_cols, rank, SCALED)


@gluon.jit
def _add_up(p_rows, row, lanes, size, p_out, rows, rank, du_stride, factor, SOME: gl.constexpr, MANY: gl.constexpr,
            RANK: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """du of so many rows: the sum of all lanes' parts, in their order, so many at once."""
    # a warp reads whole lines
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [64 // RANK, RANK // 16], [1, 0])
    o_m, o_r = gl.arange(0, SOME, gl.SliceLayout(1, layout)), gl.arange(0, RANK, gl.SliceLayout(0, layout))
    o_part = share_offsets(SOME, RANK, layout)
    p_rows += (row // ROWS).to(gl.int64) * (ROWS * RANK) + row % ROWS // 16 * 64
    total = gl.zeros([SOME, RANK], gl.float32, layout)
    for first in range(0, lanes, MANY):
        for k in gl.static_range(MANY):
            there = (o_part >= 0) & (first + k < lanes)
            total += gl.load(p_rows + (first + k) * size + o_part, mask=there, other=0.0, cache_modifier=".cg")
    total *= factor
    mask = (row + o_m < rows)[:, None] & (o_r < rank)[None, :]
    p_out += (row + o_m)[:, None].to(gl.int64) * du_stride + o_r[None, :]
    hi = total.to(p_out.dtype.element_ty)
    gl.store(p_out, hi, mask=mask)
    if PARTS == 2:
        gl.store(p_out + rank, (total - hi.to(gl.float32)).to(hi.dtype), mask=mask)
        gl.store(p_out + 2 * rank, hi, mask=mask)


@gluon.jit
def sum_du(p_part, p_du, p_work, p_arrived, begins, many, count, row_tiles, rows, rank, padded, du_stride, scalings,
           RANK: gl.constexpr, JOINT: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """du of every so many units of rows, of all projections; of each, ``many`` lanes from ``begins`` on have parts."""
    gdc_wait()
    UNIT: gl.constexpr = unit_rows(RANK, JOINT)
    # few enough that several parts are on their way
    SOME: gl.constexpr = SUMMED // RANK
    MANY: gl.constexpr = 6 if RANK == 64 else 4  # six spill where du has two 16-bit parts
    size = (row_tiles * (ROWS * RANK)).to(gl.int64)
    units, programs = row_tiles * (ROWS // UNIT) * count, gl.num_programs(0)
    # layers differ in how many parts they have: each program takes turns with them
    turn = gl.where(programs % count == 0, programs, units)
    for unit in range(gl.program_id(0), units, programs):
        m, which = unit // count, (unit + unit // turn) % count
        tile = m * UNIT // (2 * ROWS)
        factor = gl.where(which == 0, scalings[0], gl.where(which == 1, scalings[1], scalings[2]))
        begin = gl.where(which == 0, 0, gl.where(which == 1, begins[0], begins[1]))
        lanes = gl.where(which == 0, many[0], gl.where(which == 1, many[1], many[2]))
        await_count(p_arrived + which * (row_tiles // 2) + tile, lanes)
        gl.thread_barrier()
        p_rows, p_out = p_part + begin * size, p_du + which * padded
        for row in range(m * UNIT, (m + 1) * UNIT, SOME):
            _add_up(p_rows, row, lanes, size, p_out, rows, rank, du_stride, factor, SOME, MANY, RANK, PARTS)
        rows_written(p_work + READY + tile)
