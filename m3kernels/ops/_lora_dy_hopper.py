"""One pass over dy for both of its skinny products, for Hopper (sm_90a), in Gluon.

    du_j = s_j dy_j B_j        dB_j = s_j dy_j^T t_j

A few programs own columns each and go down all rows, while the product already runs on the other multiprocessors
(:mod:`m3kernels.ops._beside`): their dB stays in registers, their B in shared memory. What they add to du of a tile of rows
leaves in fp32; as soon as all have, the warpgroup that sums adds the parts up, in a fixed order, and the product may have du.

One warp loads by the copy engine; two warpgroups take turns with tiles of 64 rows and 128 columns. fp32 adapters beside 16-bit
activations are two 16-bit numbers, hi and lo.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m3kernels.ops._beside import BLOCK_M, READY, TILE, Cut, await_count, best_cut, lateness, rows_written
from m3kernels.ops._common import cdiv, next_power_of_2, sm_count
from m3kernels.ops._linear_hopper import BLOCK_N, Matrix
from m3kernels.ops._lora_launch import Layout, fill, three
from m3kernels.ops._prepared import KEPT, Prepared

ROWS = gl.constexpr(64)
COLS = gl.constexpr(128)
T_STAGES = gl.constexpr(3)
TOLD = gl.constexpr(4)  # tiles of rows whose parts are stored and not yet counted
FAR = gl.constexpr(2**30)
SUMMED = gl.constexpr(1024)  # numbers of du that a warpgroup adds up at once
AT_ONCE = gl.constexpr(4)  # parts of du that are summed from loads side by side
SHARED = 220 * 1024  # bytes of tiles
MOST_STAGES = 10
MOST_RANK = 64
# by columns of B and blocks: microseconds that a program takes for 64 rows, beside a product; measured: docs/adapters.md
ROW_TILE = {
    16: {2: 0.83, 4: 1.4, 6: 2.1, 8: 2.7, 12: 3.05, 16: 4.0},
    32: {2: 1.3, 4: 1.9, 6: 2.5, 8: 3.0},
    64: {2: 2.4, 4: 3.3},
}
FEW = 16  # programs

Y_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16))


@gluon.jit
def _produce(ys, ts, memory, which, first, row_tiles, BLOCKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    # t comes from the forward; the kernel before this one cleared what the next one counts by
    gdc_wait()
    gdc_launch_dependents()
    if which == 0:
        _load(ys[0], ts[0], memory, first, row_tiles, BLOCKS, PARTS, STAGES)
    elif which == 1:
        _load(ys[1], ts[1], memory, first, row_tiles, BLOCKS, PARTS, STAGES)
    else:
        _load(ys[2], ts[2], memory, first, row_tiles, BLOCKS, PARTS, STAGES)


@gluon.jit
def _load(d_y, d_t, memory, first, row_tiles, BLOCKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    s_y, s_t, full, empty, t_full, t_empty, _, _, _, _ = memory
    for m in range(0, row_tiles):
        row, t_slot = m * ROWS, m % T_STAGES
        mbarrier.wait(t_empty.index(t_slot), (m // T_STAGES & 1) ^ 1)
        mbarrier.expect(t_full.index(t_slot), PARTS * d_t[0].block_type.nbytes)
        for p in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(d_t[p], [row, 0], t_full.index(t_slot), s_t.index(t_slot * PARTS + p))
        for i in range(0, BLOCKS):
            count = m * BLOCKS + i
            slot = count % STAGES
            mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), d_y.block_type.nbytes)
            tma.async_copy_global_to_shared(d_y, [row, (first + i) * COLS], full.index(slot), s_y.index(slot))


@gluon.jit
def _fill_b(p_b, p_scale, s_hi, s_lo, col, n_cols, rank, RANK: gl.constexpr, PARTS: gl.constexpr, SCALED: gl.constexpr):
    """B's rows of a block of columns, times DoRA's scale of each."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RANK, RANK // 4], [4, 1], [1, 0])
    o_n, o_r = col + gl.arange(0, COLS, gl.SliceLayout(1, layout)), gl.arange(0, RANK, gl.SliceLayout(0, layout))
    mask = (o_n < n_cols)[:, None] & (o_r < rank)[None, :]
    b = gl.load(p_b + o_n[:, None].to(gl.int64) * rank + o_r[None, :], mask=mask, other=0.0).to(gl.float32)
    if SCALED:
        b *= gl.load(p_scale + o_n, mask=o_n < n_cols, other=0.0)[:, None]
    hi = b.to(s_hi.dtype)
    s_hi.store(hi)
    if PARTS == 2:
        s_lo.store((b - hi.to(gl.float32)).to(hi.dtype))


@gluon.jit
def _stream(bs, p_scale, p_part, p_db, s_b, s_du, memory, which, first, row_tiles, ns, rank, scalings,
            own: gl.constexpr, RANK: gl.constexpr, BLOCKS: gl.constexpr, PARTS: gl.constexpr, SCALED: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """du and dB of every second block of columns, from ``own`` on."""
    HALF: gl.constexpr = BLOCKS // 2
    s_y, s_t, full, empty, t_full, t_empty, half_full, half_empty, stored, told = memory
    before = gl.where(which == 0, 0, gl.where(which == 1, ns[0], ns[0] + ns[1]))
    n_cols = gl.where(which == 0, ns[0], gl.where(which == 1, ns[1], ns[2]))
    p_b = bs[0]
    if which == 1:
        p_b = bs[1]
    elif which == 2:
        p_b = bs[2]
    for c in gl.static_range(HALF):
        i = 2 * c + own
        s_hi, s_lo, col = s_b.index(i * PARTS), s_b.index(i * PARTS + PARTS - 1), (first + i) * COLS
        _fill_b(p_b, p_scale + before, s_hi, s_lo, col, n_cols, rank, RANK, PARTS, SCALED)
    fence_async_shared()
    gl.thread_barrier()
    gdc_wait()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANK, 16])
    o_m, o_r = gl.arange(0, ROWS, gl.SliceLayout(1, layout)), gl.arange(0, RANK, gl.SliceLayout(0, layout))
    o_n = gl.arange(0, COLS, gl.SliceLayout(1, layout))
    sums = ()
    for _ in gl.static_range(HALF):
        sums = sums + (gl.zeros([COLS, RANK], gl.float32, layout),)
    for m in range(0, row_tiles):
        t_slot = m % T_STAGES
        mbarrier.wait(t_full.index(t_slot), m // T_STAGES & 1)
        du = gl.zeros([ROWS, RANK], gl.float32, layout)
        # zero, unknown to the compiler: it would keep every block's addresses in registers
        zero = m // FAR
        added = ()
        for c in gl.static_range(HALF):
            i = 2 * c + own + zero
            count = m * BLOCKS + i
            slot = count % STAGES
            db = sums[c]
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            for p in gl.static_range(PARTS):
                du = warpgroup_mma(s_y.index(slot), s_b.index(i * PARTS + p), du, is_async=True)
                db = warpgroup_mma(s_y.index(slot).permute((1, 0)), s_t.index(t_slot * PARTS + p), db, is_async=True)
            du, db = warpgroup_mma_wait(0, deps=(du, db))
            mbarrier.arrive(empty.index(slot), count=1)
            added = added + (db,)
        sums = added
        mbarrier.arrive(t_empty.index(t_slot), count=1)
        if own == 1:
            mbarrier.wait(half_empty, (m & 1) ^ 1)
            s_du.store(du)
            gl.thread_barrier()
            mbarrier.arrive(half_full, count=1)
        else:
            mbarrier.wait(half_full, m & 1)
            du += s_du.load(layout)
            gl.thread_barrier()
            mbarrier.arrive(half_empty, count=1)
            p_rows = p_part + (gl.program_id(0) * row_tiles + m).to(gl.int64) * (ROWS * RANK)
            gl.store(p_rows + o_m[:, None] * RANK + o_r[None, :], du)
            if m % 2 == 1:
                tile = m // 2
                mbarrier.wait(told.index(tile % TOLD), (tile // TOLD & 1) ^ 1)
                gl.thread_barrier()
                mbarrier.arrive(stored.index(tile % TOLD), count=1)
    factor = gl.where(which == 0, scalings[0], gl.where(which == 1, scalings[1], scalings[2]))
    for c in gl.static_range(HALF):
        o_col = (first + 2 * c + own) * COLS + o_n
        db = sums[c] * factor
        if SCALED:
            db *= gl.load(p_scale + before + o_col, mask=o_col < n_cols, other=0.0)[:, None]
        o_db = (before + o_col)[:, None].to(gl.int64) * rank + o_r[None, :]
        gl.store(p_db + o_db, db.to(p_db.dtype.element_ty), mask=(o_col < n_cols)[:, None] & (o_r < rank)[None, :])


@gluon.jit
def _tell(p_arrived, memory, which, row_tiles):
    """Counts this program's parts of du.

    In a warp of its own: the fence waits a microsecond for what was stored, longer than the products of a tile take.
    """
    gdc_wait()
    stored, told = memory[8], memory[9]
    for tile in range(0, row_tiles // 2):
        mbarrier.wait(stored.index(tile % TOLD), tile // TOLD & 1)
        gl.atomic_add(p_arrived + which * (row_tiles // 2) + tile, 1, sem="release", scope="gpu")
        mbarrier.arrive(told.index(tile % TOLD), count=1)


@gluon.jit
def _sum(p_part, p_du, p_work, p_arrived, begins, many, count, row_tiles, rows, rank, padded, du_stride, scalings,
         RANK: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """du of every so many tiles of 64 rows, of all projections; of each, ``many`` programs from ``begins`` on have parts."""
    gdc_wait()
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RANK, RANK // 4], [4, 1], [1, 0])
    # few enough that several parts are on their way
    SOME: gl.constexpr = SUMMED // RANK
    o_m, o_r = gl.arange(0, SOME, gl.SliceLayout(1, layout)), gl.arange(0, RANK, gl.SliceLayout(0, layout))
    o_part = o_m[:, None] * RANK + o_r[None, :]
    size = row_tiles * (ROWS * RANK)
    for unit in range(gl.program_id(0), row_tiles * count, gl.num_programs(0)):
        m, which = unit // count, unit % count
        tile = m // 2
        factor = gl.where(which == 0, scalings[0], gl.where(which == 1, scalings[1], scalings[2]))
        begin = gl.where(which == 0, 0, gl.where(which == 1, begins[0], begins[1]))
        programs = gl.where(which == 0, many[0], gl.where(which == 1, many[1], many[2]))
        await_count(p_arrived + which * (row_tiles // 2) + tile, programs)
        gl.thread_barrier()
        for row in range(m * ROWS, (m + 1) * ROWS, SOME):
            total = gl.zeros([SOME, RANK], gl.float32, layout)
            for first in range(0, programs, AT_ONCE):
                for k in gl.static_range(AT_ONCE):
                    p_rows = p_part + (begin + first + k).to(gl.int64) * size + row.to(gl.int64) * RANK
                    there = (o_part >= 0) & (first + k < programs)
                    total += gl.load(p_rows + o_part, mask=there, other=0.0, cache_modifier=".cg")
            total *= factor
            mask = (row + o_m < rows)[:, None] & (o_r < rank)[None, :]
            p_out = p_du + (row + o_m)[:, None].to(gl.int64) * du_stride + which * padded + o_r[None, :]
            hi = total.to(p_du.dtype.element_ty)
            gl.store(p_out, hi, mask=mask)
            if PARTS == 2:
                gl.store(p_out + rank, (total - hi.to(gl.float32)).to(hi.dtype), mask=mask)
                gl.store(p_out + 2 * rank, hi, mask=mask)
        rows_written(p_work + READY + tile)


VARYING = "n1 n2 n3 rows row_tiles rank padded du_stride count begin2 begin3 programs1 programs2 programs3".split()


@gluon.jit(do_not_specialize=VARYING)
def lora_dy_kernel(
    d_y1, d_y2, d_y3, d_hi1, d_hi2, d_hi3, d_lo1, d_lo2, d_lo3, p_b1, p_b2, p_b3, p_scale, p_part, p_du, p_db, p_work, p_arrived,
    s1, s2, s3, n1, n2, n3, rows, row_tiles, rank, padded, du_stride, count, begin2, begin3, programs1, programs2, programs3,
    RANK: gl.constexpr, BLOCKS: gl.constexpr, PARTS: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr,
    T_TILE: gl.constexpr, B_TILE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_y1.dtype
    s_y = gl.allocate_shared_memory(dtype, [STAGES, ROWS, COLS], Y_TILE)
    s_t = gl.allocate_shared_memory(dtype, [T_STAGES * PARTS, ROWS, RANK], T_TILE)
    s_b = gl.allocate_shared_memory(dtype, [BLOCKS * PARTS, COLS, RANK], B_TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    t_full = gl.allocate_shared_memory(gl.int64, [T_STAGES, 1], mbarrier.MBarrierLayout())
    t_empty = gl.allocate_shared_memory(gl.int64, [T_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(T_STAGES):
        mbarrier.init(t_full.index(i), count=1)
        mbarrier.init(t_empty.index(i), count=2)
    stored = gl.allocate_shared_memory(gl.int64, [TOLD, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int64, [TOLD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(TOLD):
        mbarrier.init(stored.index(i), count=1)
        mbarrier.init(told.index(i), count=1)
    # du of the odd blocks on its way to the warpgroup of the even ones
    s_du = gl.allocate_shared_memory(gl.float32, [ROWS, RANK], gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))
    half_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    half_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(half_full, count=1)
    mbarrier.init(half_empty, count=1)
    memory = (s_y, s_t, full, empty, t_full, t_empty, half_full, half_empty, stored, told)
    ys, bs, ns, scalings = (d_y1, d_y2, d_y3), (p_b1, p_b2, p_b3), (n1, n2, n3), (s1, s2, s3)
    ts = ((d_hi1, d_lo1), (d_hi2, d_lo2), (d_hi3, d_lo3))
    program = gl.program_id(0)
    which = (program >= begin2).to(gl.int32) + (program >= begin3).to(gl.int32)
    begin = gl.where(which == 0, 0, gl.where(which == 1, begin2, begin3))
    first = (program - begin) * BLOCKS
    # named: a number written into the lists below is no constexpr
    even: gl.constexpr = 0
    odd: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_stream, (bs, p_scale, p_part, p_db, s_b, s_du, memory, which, first, row_tiles, ns, rank, scalings,
                       even, RANK, BLOCKS, PARTS, SCALED, STAGES)),
            (_stream, (bs, p_scale, p_part, p_db, s_b, s_du, memory, which, first, row_tiles, ns, rank, scalings,
                       odd, RANK, BLOCKS, PARTS, SCALED, STAGES)),
            (_sum, (p_part, p_du, p_work, p_arrived, (begin2, begin3), (programs1, programs2, programs3), count, row_tiles, rows,
                    rank, padded, du_stride, scalings, RANK, PARTS)),
            (_produce, (ys, ts, memory, which, first, row_tiles, BLOCKS, PARTS, STAGES)),
            (_tell, (p_arrived, memory, which, row_tiles)),
        ],
        [4, 4, 1, 1],
        [200, 72, 40, 40],
    )  # fmt: skip


class Pass(NamedTuple):
    """The launch and its sizes.

    ``parts``: numbers of du in the making; ``arrivals``, ``work``: counters, its own and those that the product has too;
    ``cut`` of that product; ``tiles`` of rows.
    """

    run: Prepared
    parts: int
    arrivals: int
    work: int
    cut: Cut
    tiles: int


class Form(NamedTuple):
    """Columns of a power of 2, blocks of 128 columns of one program, stages."""

    rank: int
    blocks: int
    stages: int

    @classmethod
    def of(cls, layout: Layout, blocks: int) -> "Form | None":
        rank, parts = max(16, next_power_of_2(layout.rank)), 2 if layout.split else 1
        free = SHARED - 2 * rank * (parts * (blocks * COLS.value + T_STAGES.value * ROWS.value) + 2 * ROWS.value)
        stages = min(MOST_STAGES, free // (2 * ROWS.value * COLS.value))
        return cls(rank, blocks, stages) if blocks in ROW_TILE[rank] and stages >= 3 else None

    def programs(self, ns: tuple[int, ...]) -> list[int]:
        return [cdiv(n, COLS.value * self.blocks) for n in ns]

    def tiles(self) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
        return tuple(
            gl.NVMMASharedLayout.get_default_for([n, self.rank], gl.bfloat16) for n in (ROWS.value, COLS.value)
        )

    def busy(self, rows: int, split: bool) -> float:
        """Microseconds beside a product."""
        return cdiv(rows, ROWS.value) * ROW_TILE[self.rank][self.blocks] * (1.75 if split else 1.0)


def best(layout: Layout, rows: int, ns: tuple[int, ...], width: int, sms: int) -> tuple[Form, Cut] | None:
    """The form with which the product beside it ends first, and its cut; of few programs, if it can be: each hands on a du."""
    forms = [form for blocks in ROW_TILE[16] if (form := Form.of(layout, blocks))]
    few = [form for form in forms if sum(form.programs(ns)) <= FEW] or forms[-1:]
    m_tiles, n_tiles, tile = cdiv(rows, BLOCK_M.value), cdiv(width, BLOCK_N.value), TILE * sum(ns)

    def end(form: Form) -> tuple[float, int, Form, Cut]:
        programs, busy = sum(form.programs(ns)), form.busy(rows, layout.split)
        late = lateness(m_tiles, n_tiles, tile, sms - programs, lambda tiles: busy * tiles / m_tiles)
        ends, cut = best_cut(busy, programs, m_tiles * n_tiles, tile, sms, 2 * layout.count)
        return ends + late, programs, form, cut

    # all must be there at once, beside another stream's as well
    found = min((end(form) for form in few if sum(form.programs(ns)) <= sms // 2), default=None)
    return found and found[2:]


@lru_cache(KEPT)
def prepared(
    layout: Layout, rows: int, ns: tuple[int, ...], width: int, scalings: tuple[float, ...], scaled: bool, dtype: torch.dtype,
    adapters: torch.dtype, device: torch.device,
) -> Pass | None:  # fmt: skip
    """None where this kernel does not take the pass: ranks over 64, columns that the engine cannot copy."""
    if layout.rank > MOST_RANK or dtype not in (torch.bfloat16, torch.float16) or any(n % 8 for n in ns):
        return None
    if layout.split and layout.rank % 8:
        return None
    found = best(layout, rows, ns, width, sm_count(device))
    if found is None:
        return None
    form, cut = found
    programs, parts = form.programs(ns), 2 if layout.split else 1
    row_tiles = 2 * cdiv(rows, BLOCK_M.value)
    t_tile, b_tile = form.tiles()
    t_of = lambda j, part: Matrix(
        rows, layout.rank, layout.padded, (ROWS.value, form.rank), t_tile,
        j * rows * layout.padded + part * layout.rank,
    )  # fmt: skip
    ys = [Matrix(rows, n, n, (ROWS.value, COLS.value), Y_TILE.value) for n in ns]
    his, los = ([t_of(j, part) for j in range(layout.count)] for part in (0, parts - 1))
    last = lambda found: [*found, *found[-1:] * (3 - len(found))]
    total = sum(programs)
    begins = [sum(programs[:1]), sum(programs[:2])]
    begins = [begin if j + 1 < layout.count else total for j, begin in enumerate(begins)]
    run = Prepared(
        "lora_linear backward (dy)",
        lora_dy_kernel,
        device,
        (total,),
        (
            *fill(scalings, 0.0),
            *fill(ns, 0),
            rows,
            row_tiles,
            layout.rank,
            layout.padded,
            layout.count * layout.padded,
            layout.count,
        )
        + (*begins, *fill(tuple(programs), 0)),
        {"RANK": form.rank, "BLOCKS": form.blocks, "PARTS": parts, "SCALED": scaled, "STAGES": form.stages}
        | {"T_TILE": t_tile, "B_TILE": b_tile, "num_warps": 4, "maxnreg": 128, "launch_pdl": True},
        (*last(ys), *last(his), *last(los), *[None] * 9),
    )
    return Pass(
        run,
        total * row_tiles * ROWS.value * form.rank,
        layout.count * row_tiles // 2,
        cut.work(rows),
        cut,
        row_tiles // 2,
    )


def du_and_db(
    plan: Pass, dys: list[Tensor], t: Tensor, many_b: list[Tensor], scale: Tensor | None, layout: Layout, db: Tensor,
    work: Tensor, arrived: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """du (M, count * padded) as parts; writes db. And what this pass still reads when the product beside it begins to write.

    ``scale``: DoRA's (N of all,), of B's rows; ``work`` and ``arrived``: set to zero by the kernel before this one.
    """
    part = t.new_empty(plan.parts, dtype=torch.float32)
    du = layout.buffer(t, dys[0].shape[0], layout.count * layout.padded)
    plan.run(
        *three(dys),
        *three([t]),
        *three([t]),
        *three(many_b),
        part if scale is None else scale,
        part,
        du,
        db,
        work,
        arrived,
    )
    return du, part
