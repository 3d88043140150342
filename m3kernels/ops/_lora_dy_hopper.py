"""One pass over dy for both of its skinny products, then one over x, for Hopper (sm_90a), in Gluon.

    du_j = s_j dy_j B_j        dB_j = s_j dy_j^T t_j        dA_j = du_j^T x

A few programs own columns each and go down all rows, while the product already runs on the other multiprocessors
(:mod:`m3kernels.ops._beside`): their dB stays in registers, their B in shared memory. What they add to du of a tile of rows
leaves in fp32; as soon as all have, the warpgroup that sums adds the parts up, in a fixed order, and the product may have du.
Several may share the same columns, each with every so many tiles of rows: then each adds up a part of dB at the end.
Then, at small ranks, they own columns of x, for dA; else a kernel after the product makes it.

One warp loads by the copy engine; two warpgroups take turns with tiles of 64 rows and 128 columns. fp32 adapters beside 16-bit
activations are two 16-bit numbers, hi and lo.
"""

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

from m3kernels.ops._beside import READY, await_all, share_offsets
from m3kernels.ops._lora_dy_sums import COLS, ROWS, put_db, share_db, sum_du, unit_rows

TOLD = gl.constexpr(4)  # tiles of rows whose parts are stored and not yet counted
FAR = gl.constexpr(2**30)
Y_TILE = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16))


@gluon.jit
def _produce(ys, ts, d_x, d_du, p_work, memory, which, first, own, row_tiles, rank, padded, makers, stripes,
             BLOCKS: gl.constexpr, X_BLOCKS: gl.constexpr, JOINT: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
             T_STAGES: gl.constexpr):  # fmt: skip
    # t comes from the forward; the kernel before this one cleared what the next one counts by
    gdc_wait()
    gdc_launch_dependents()
    if which == 0:
        _load(ys[0], ts[0], memory, first, own, BLOCKS, PARTS, STAGES, T_STAGES)
    elif which == 1:
        _load(ys[1], ts[1], memory, first, own, BLOCKS, PARTS, STAGES, T_STAGES)
    else:
        _load(ys[2], ts[2], memory, first, own, BLOCKS, PARTS, STAGES, T_STAGES)
    if X_BLOCKS:
        await_all(p_work + READY, row_tiles // 2, makers)
        count, t_count = 2 * own[2] * BLOCKS, 2 * own[2]
        for stripe in range(gl.program_id(0), stripes, gl.num_programs(0)):
            for m in range(0, row_tiles):
                for j in gl.static_range(JOINT):
                    _load_small((d_du, d_du), memory, t_count, m * ROWS, j * padded, rank, PARTS, T_STAGES)
                    t_count += 1
                for i in range(0, X_BLOCKS):
                    _load_block(d_x, memory, count, m * ROWS, (stripe * X_BLOCKS + i) * COLS, STAGES)
                    count += 1


@gluon.jit
def _rows_of(step, own):
    """The tile of 64 rows that a program takes in a step; ``own``: (its share of the tiles of 128, of how many, its number)."""
    share, shares, _ = own
    return 2 * (share + step // 2 * shares) + step % 2


@gluon.jit
def _load(d_y, d_t, memory, first, own, BLOCKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
          T_STAGES: gl.constexpr):  # fmt: skip
    for step in range(0, 2 * own[2]):
        row = _rows_of(step, own) * ROWS
        _load_small(d_t, memory, step, row, 0, 0, PARTS, T_STAGES)
        for i in range(0, BLOCKS):
            _load_block(d_y, memory, step * BLOCKS + i, row, (first + i) * COLS, STAGES)


@gluon.jit
def _load_small(d_t, memory, count, row, col, apart, PARTS: gl.constexpr, T_STAGES: gl.constexpr):
    """Parts of t or du, ``apart`` columns from each other."""
    s_t, full, empty = memory[1], memory[4], memory[5]
    slot = count % T_STAGES
    mbarrier.wait(empty.index(slot), (count // T_STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), PARTS * d_t[0].block_type.nbytes)
    for p in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(d_t[p], [row, col + p * apart], full.index(slot), s_t.index(slot * PARTS + p))


@gluon.jit
def _load_block(d_y, memory, count, row, col, STAGES: gl.constexpr):
    s_y, full, empty = memory[0], memory[2], memory[3]
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), d_y.block_type.nbytes)
    tma.async_copy_global_to_shared(d_y, [row, col], full.index(slot), s_y.index(slot))


@gluon.jit
def _rows_of_b(p_b, col, n_cols, rank, RANK: gl.constexpr):
    """B's rows of a block of columns."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // RANK, RANK // 4], [4, 1], [1, 0])
    o_n, o_r = col + gl.arange(0, COLS, gl.SliceLayout(1, layout)), gl.arange(0, RANK, gl.SliceLayout(0, layout))
    mask = (o_n < n_cols)[:, None] & (o_r < rank)[None, :]
    return gl.load(p_b + o_n[:, None].to(gl.int64) * rank + o_r[None, :], mask=mask, other=0.0)


@gluon.jit
def _fill_b(b, p_scale, s_hi, s_lo, col, n_cols, PARTS: gl.constexpr, SCALED: gl.constexpr):
    """Rows of B, times DoRA's scale of each, to shared memory."""
    b = b.to(gl.float32)
    if SCALED:
        o_n = col + gl.arange(0, COLS, gl.SliceLayout(1, b.type.layout))
        b *= gl.load(p_scale + o_n, mask=o_n < n_cols, other=0.0)[:, None]
    hi = b.to(s_hi.dtype)
    s_hi.store(hi)
    if PARTS == 2:
        s_lo.store((b - hi.to(gl.float32)).to(hi.dtype))


@gluon.jit
def _stream(bs, p_scale, p_part, p_slabs, p_arrived, p_db, p_da, s_b, s_du, memory, which, first, lane, own, row_tiles, ns, width,
            rank, scalings, stripes, half: gl.constexpr, RANK: gl.constexpr, BLOCKS: gl.constexpr, X_BLOCKS: gl.constexpr,
            JOINT: gl.constexpr, PARTS: gl.constexpr, SCALED: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
            T_STAGES: gl.constexpr):  # fmt: skip
    """du and dB of every second block of columns, from ``half`` on, then dA of those of x."""
    HALF: gl.constexpr = BLOCKS // 2
    s_y, s_t, full, empty, t_full, t_empty, half_full, half_empty, stored, told = memory
    before = gl.where(which == 0, 0, gl.where(which == 1, ns[0], ns[0] + ns[1]))
    n_cols = gl.where(which == 0, ns[0], gl.where(which == 1, ns[1], ns[2]))
    p_b = bs[0]
    if which == 1:
        p_b = bs[1]
    elif which == 2:
        p_b = bs[2]
    # two blocks on their way at a time, where registers allow
    PAIR: gl.constexpr = 2 if HALF % 2 == 0 and PARTS == 1 else 1
    for begin in gl.static_range(0, HALF, PAIR):
        pair = ()
        for c in gl.static_range(PAIR):
            pair = pair + (_rows_of_b(p_b, (first + 2 * (begin + c) + half) * COLS, n_cols, rank, RANK),)
        for c in gl.static_range(PAIR):
            i = 2 * (begin + c) + half
            s_hi, s_lo = s_b.index(i * PARTS), s_b.index(i * PARTS + PARTS - 1)
            _fill_b(pair[c], p_scale + before, s_hi, s_lo, (first + i) * COLS, n_cols, PARTS, SCALED)
    fence_async_shared()
    gl.thread_barrier()
    gdc_wait()
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANK, 16])
    o_n, o_r = gl.arange(0, COLS, gl.SliceLayout(1, layout)), gl.arange(0, RANK, gl.SliceLayout(0, layout))
    sums = ()
    for _ in gl.static_range(HALF):
        sums = sums + (gl.zeros([COLS, RANK], gl.float32, layout),)
    for step in range(0, 2 * own[2]):
        t_slot = step % T_STAGES
        mbarrier.wait(t_full.index(t_slot), step // T_STAGES & 1)
        du = gl.zeros([ROWS, RANK], gl.float32, layout)
        # zero, unknown to the compiler: it would keep every block's addresses in registers
        zero = step // FAR
        added = ()
        for c in gl.static_range(HALF):
            i = 2 * c + half + zero
            count = step * BLOCKS + i
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
        if half == 1:
            mbarrier.wait(half_empty, (step & 1) ^ 1)
            s_du.store(du)
            gl.thread_barrier()
            mbarrier.arrive(half_full, count=1)
        else:
            mbarrier.wait(half_full, step & 1)
            du += s_du.load(layout)
            gl.thread_barrier()
            mbarrier.arrive(half_empty, count=1)
            p_rows = p_part + (lane * row_tiles + _rows_of(step, own)).to(gl.int64) * (ROWS * RANK)
            gl.store(p_rows + share_offsets(ROWS, RANK, layout), du)
            if step % 2 == 1:
                tile = step // 2
                mbarrier.wait(told.index(tile % TOLD), (tile // TOLD & 1) ^ 1)
                gl.thread_barrier()
                mbarrier.arrive(stored.index(tile % TOLD), count=1)
    factor = gl.where(which == 0, scalings[0], gl.where(which == 1, scalings[1], scalings[2]))
    if SHARED:
        share_db(sums, p_slabs, p_arrived, p_db, p_scale + before, factor, first, lane, own, before, n_cols, rank, half, RANK,
                 BLOCKS, SCALED, layout)  # fmt: skip
    else:
        for c in gl.static_range(HALF):
            o_col = (first + 2 * c + half) * COLS + o_n
            put_db(sums[c], p_db, p_scale + before, factor, o_col, o_r, before, n_cols, rank, SCALED)
    if X_BLOCKS:
        sizes = (2 * own[2], row_tiles, width, rank, stripes)
        _stream_x(p_da, memory, sizes, half, RANK, BLOCKS, X_BLOCKS, JOINT, PARTS, STAGES, T_STAGES)


@gluon.jit
def _stream_x(p_da, memory, sizes, half: gl.constexpr, RANK: gl.constexpr, BLOCKS: gl.constexpr, X_BLOCKS: gl.constexpr,
              JOINT: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, T_STAGES: gl.constexpr):  # fmt: skip
    """dA of all projections, of every second block of columns of x, after ``steps`` over dy."""
    steps, row_tiles, width, rank, stripes = sizes
    HALF: gl.constexpr = X_BLOCKS // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANK, 16])
    s_x, s_du, full, empty, t_full, t_empty = memory[0], memory[1], memory[2], memory[3], memory[4], memory[5]
    o_r, o_n = gl.arange(0, RANK, gl.SliceLayout(0, layout)), gl.arange(0, COLS, gl.SliceLayout(1, layout))
    count, t_count = steps * BLOCKS, steps
    for stripe in range(gl.program_id(0), stripes, gl.num_programs(0)):
        sums = ()
        for _ in gl.static_range(HALF * JOINT):
            sums = sums + (gl.zeros([COLS, RANK], gl.float32, layout),)
        for _ in range(0, row_tiles):
            for j in gl.static_range(JOINT):
                mbarrier.wait(t_full.index((t_count + j) % T_STAGES), (t_count + j) // T_STAGES & 1)
            added = ()
            for c in gl.static_range(HALF):
                place = count + 2 * c + half
                slot = place % STAGES
                mbarrier.wait(full.index(slot), place // STAGES & 1)
                for j in gl.static_range(JOINT):
                    da = sums[c * JOINT + j]
                    for p in gl.static_range(PARTS):
                        small = s_du.index((t_count + j) % T_STAGES * PARTS + p)
                        da = warpgroup_mma(s_x.index(slot).permute((1, 0)), small, da, is_async=True)
                    added = added + (da,)
            sums = warpgroup_mma_wait(0, deps=added)
            if HALF * JOINT == 1:
                sums = (sums,)  # of one, Gluon gives no tuple
            for c in gl.static_range(HALF):
                mbarrier.arrive(empty.index((count + 2 * c + half) % STAGES), count=1)
            for j in gl.static_range(JOINT):
                mbarrier.arrive(t_empty.index((t_count + j) % T_STAGES), count=1)
            count += X_BLOCKS
            t_count += JOINT
        for c in gl.static_range(HALF):
            o_col = (stripe * X_BLOCKS + 2 * c + half) * COLS + o_n
            mask = (o_col < width)[:, None] & (o_r < rank)[None, :]
            for j in gl.static_range(JOINT):
                o_da = (j * rank + o_r).to(gl.int64)[None, :] * width + o_col[:, None]
                gl.store(p_da + o_da, sums[c * JOINT + j].to(p_da.dtype.element_ty), mask=mask)


@gluon.jit
def _tell(p_arrived, memory, which, own, row_tiles):
    """Counts this program's parts of du.

    In a warp of its own: the fence waits a microsecond for what was stored, longer than the products of a tile take.
    """
    gdc_wait()
    stored, told = memory[8], memory[9]
    share, shares, tiles = own
    for i in range(0, tiles):
        mbarrier.wait(stored.index(i % TOLD), i // TOLD & 1)
        tile = share + i * shares
        gl.atomic_add(p_arrived + which * (row_tiles // 2) + tile, 1, sem="release", scope="gpu")
        mbarrier.arrive(told.index(i % TOLD), count=1)


VARYING = (
    "n1 n2 n3 rows row_tiles width rank padded du_stride count stripes begin2 begin3 lanes1 lanes2 lanes3 lanes shares slabs_at"
).split()


@gluon.jit(do_not_specialize=VARYING)
def lora_dy_kernel(
    d_y1, d_y2, d_y3, d_hi1, d_hi2, d_hi3, d_lo1, d_lo2, d_lo3, d_x, d_du, p_b1, p_b2, p_b3, p_scale, p_part, p_du, p_db, p_da,
    p_work, p_arrived, s1, s2, s3, n1, n2, n3, rows, row_tiles, width, rank, padded, du_stride, count, stripes,
    begin2, begin3, lanes1, lanes2, lanes3, lanes, shares, slabs_at,
    RANK: gl.constexpr, BLOCKS: gl.constexpr, X_BLOCKS: gl.constexpr, JOINT: gl.constexpr, PARTS: gl.constexpr,
    SCALED: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr, T_STAGES: gl.constexpr, T_TILE: gl.constexpr,
    B_TILE: gl.constexpr,
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
    lane, share = gl.program_id(0) % lanes, gl.program_id(0) // lanes
    own = (share, shares, (row_tiles // 2 - share + shares - 1) // shares)
    which = (lane >= begin2).to(gl.int32) + (lane >= begin3).to(gl.int32)
    begin = gl.where(which == 0, 0, gl.where(which == 1, begin2, begin3))
    first = (lane - begin) * BLOCKS
    # behind the counts of du's parts, those of dB's
    p_slabs, p_shared = p_part + slabs_at.to(gl.int64), p_arrived + count * (row_tiles // 2)
    makers = count * (2 * ROWS // unit_rows(RANK, JOINT))
    # named: a number written into the lists below is no constexpr
    even: gl.constexpr = 0
    odd: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_stream, (bs, p_scale, p_part, p_slabs, p_shared, p_db, p_da, s_b, s_du, memory, which, first, lane, own, row_tiles,
                       ns, width, rank, scalings, stripes, even, RANK, BLOCKS, X_BLOCKS, JOINT, PARTS, SCALED, SHARED, STAGES,
                       T_STAGES)),
            (_stream, (bs, p_scale, p_part, p_slabs, p_shared, p_db, p_da, s_b, s_du, memory, which, first, lane, own, row_tiles,
                       ns, width, rank, scalings, stripes, odd, RANK, BLOCKS, X_BLOCKS, JOINT, PARTS, SCALED, SHARED, STAGES,
                       T_STAGES)),
            (sum_du, (p_part, p_du, p_work, p_arrived, (begin2, begin3), (lanes1, lanes2, lanes3), count, row_tiles, rows,
                      rank, padded, du_stride, scalings, RANK, JOINT, PARTS)),
            (_produce, (ys, ts, d_x, d_du, p_work, memory, which, first, own, row_tiles, rank, padded, makers, stripes, BLOCKS,
                        X_BLOCKS, JOINT, PARTS, STAGES, T_STAGES)),
            (_tell, (p_arrived, memory, which, own, row_tiles)),
        ],
        [4, 4, 1, 1],
        [200, 72, 40, 40],
    )  # fmt: skip
