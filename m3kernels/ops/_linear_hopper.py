"""Frozen weights' products with low-rank ones inside them, for Hopper (sm_90a), in Gluon.

    forward     y_j = k_j * (x W_j^T + t_j low_j^T)             all j in one launch
    ACROSS      dx = sum_j dz_j W_j + sum_j du_j A_j            one sum over all j

The low-rank product is one or two more steps of a tile's sum in the same accumulators: it costs R / K more arithmetic and no
pass over the result. Its factors may still be in the making when the product begins: they come last. k of DoRA is applied
where y is written.

One warp loads by the copy engine; two warpgroups multiply 64 x 256 each. Programs stay and take tile after tile; the next
tile's operands load while a tile is written. Beside a pass, tiles come from a counter, the last ones in pieces
(:mod:`m3kernels.ops._beside`).
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

from m3kernels.ops._beside import (
    BLOCK_M,
    READY,
    TOGETHER,
    await_count,
    await_rows,
    new_queue,
    next_tile,
    share_offsets,
    told,
    took,
    unit_of,
)

CONSUMERS = gl.constexpr(2)  # warpgroups that compute
ROWS = gl.constexpr(64)  # rows of one
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(3)  # 144 KB, and 64 KB that results leave from
PANEL = gl.constexpr(64)  # columns that leave side by side, and are joined at once of so many shares
PANELS = gl.constexpr(BLOCK_N.value // PANEL.value)
AT_ONCE = gl.constexpr(4)

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
def _steps_of(k_tiles, low_tiles, ACROSS: gl.constexpr, COUNT: gl.constexpr):
    """Steps of a tile's sum, the low-rank ones last."""
    steps = low_tiles
    for j in gl.static_range(COUNT if ACROSS else 1):
        steps += k_tiles[j]
    return steps


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
def _load_all(d_left, d_right, memory, count, row, col, begin, end, ACROSS: gl.constexpr):
    for i in range(begin, end):
        _load(d_left, d_right, memory, count + (i - begin), row, i * BLOCK_K, col, i * BLOCK_K, ACROSS)
    return count + gl.maximum(end - begin, 0)


@gluon.jit
def _produce(left, right, d_t, d_low, p_work, memory, queue, joined, order, cut, k_tiles, rows, low_tiles, second, third, starts,
             ready, ACROSS: gl.constexpr, COUNT: gl.constexpr, OVERLAP: gl.constexpr, BESIDE: gl.constexpr,
             CUT: gl.constexpr):  # fmt: skip
    m_tiles, n_tiles = order
    whole, pieces, units = cut
    count, taken, joins = 0, 0, 0
    index = next_tile(p_work) if BESIDE else gl.program_id(0)
    while index < units:
        if BESIDE:
            told(index, queue, taken)
        steps = _steps_of(k_tiles, low_tiles, ACROSS, COUNT)
        tile, _, begin, end = unit_of(index, whole, pieces, steps)
        m, n = _tile(tile, m_tiles, n_tiles)
        row = m * BLOCK_M
        if ACROSS:
            col, t_row, low_row = n * BLOCK_N, row, n * BLOCK_N
            before = 0
            for j in gl.static_range(COUNT):
                first, last = gl.maximum(begin - before, 0), gl.minimum(end - before, k_tiles[j])
                count = _load_all(left[j], right[j], memory, count, row, col, first, last, ACROSS)
                before += k_tiles[j]
        else:
            which, first = _part_of(n, second, third)
            col = (n - first) * BLOCK_N
            t_row = which * rows + row
            low_row = col + gl.where(which == 0, 0, gl.where(which == 1, starts[0], starts[1]))
            last = gl.minimum(end, k_tiles[0])
            if COUNT == 1 or which == 0:
                count = _load_all(left[0], right[0], memory, count, row, col, begin, last, ACROSS)
            elif COUNT == 2 or which == 1:
                count = _load_all(left[0], right[1], memory, count, row, col, begin, last, ACROSS)
            else:
                count = _load_all(left[0], right[2], memory, count, row, col, begin, last, ACROSS)
        # the low-rank factors come from the kernel before this one, which still runs during the first tile
        if BESIDE:
            if end > steps - low_tiles:
                await_rows(p_work + READY + m, ready)
            gdc_launch_dependents()
        elif OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        first, last = gl.maximum(begin - (steps - low_tiles), 0), end - (steps - low_tiles)
        count = _load_all(d_t, d_low, memory, count, t_row, low_row, first, last, ACROSS)
        taken += 1
        if CUT and index >= whole:
            # a piece waits for the others of its tile: none of those may be this program's next unit
            mbarrier.wait(joined, joins & 1)
            joins += 1
        index = next_tile(p_work) if BESIDE else index + gl.num_programs(0)
    if BESIDE:
        told(units, queue, taken)
        # what follows this kernel may count on the end of the one before it
        gdc_wait()


@gluon.jit
def _put(s_out, acc, p_scale, n_cols, SCALED: gl.constexpr):
    """A tile, or a panel of it, to where it leaves from; times DoRA's scale of each column, of which there are ``n_cols``."""
    if SCALED:
        o_n = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        acc *= gl.load(p_scale + o_n, mask=o_n < n_cols, other=0.0)[None, :]
    s_out.store(acc.to(s_out.dtype))


@gluon.jit
def _join(acc, s_out, p_shares, p_arrived, piece, pieces, p_scale, n_cols, which: gl.constexpr, SCALED: gl.constexpr,
          layout: gl.constexpr):  # fmt: skip
    """Leaves a piece's share of a sum; as soon as all have, adds up every so many panels of it, in the order of the shares."""
    size: gl.constexpr = CONSUMERS * ROWS * BLOCK_N
    gl.store(p_shares + piece * size + share_offsets(ROWS, BLOCK_N, layout), acc)
    gl.thread_barrier()
    gl.atomic_add(p_arrived, 1, sem="release", scope="gpu")
    await_count(p_arrived, pieces)
    gl.thread_barrier()
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PANEL, 16])
    o_share = share_offsets(ROWS, PANEL, narrow)
    for panel in range(piece, PANELS, pieces):
        p_panel = p_shares + panel * (ROWS * PANEL)
        total = gl.zeros([ROWS, PANEL], gl.float32, narrow)
        for first in range(0, pieces, AT_ONCE):
            for k in gl.static_range(AT_ONCE):
                there = (o_share >= 0) & (first + k < pieces)
                total += gl.load(p_panel + (first + k) * size + o_share, mask=there, other=0.0, cache_modifier=".cg")
        col = panel * PANEL
        _put(s_out.index(which * PANELS + panel), total, p_scale + col, n_cols - col, SCALED)


@gluon.jit
def _copy(d_out, s_out, row, col, panel, step, which: gl.constexpr):
    """Every so many panels of a warpgroup's."""
    fence_async_shared()
    for i in range(panel, PANELS, step):
        tma.async_copy_shared_to_global(d_out, [row, col + i * PANEL], s_out.index(which * PANELS + i))


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
def _consume(outs, p_scale, p_work, p_shares, ns, memory, queue, joined, s_out, s_tiles, order, cut, k_tiles, low_tiles, second,
             third, starts, which: gl.constexpr, ACROSS: gl.constexpr, COUNT: gl.constexpr, SCALED: gl.constexpr,
             OVERLAP: gl.constexpr, BESIDE: gl.constexpr, CUT: gl.constexpr):  # fmt: skip
    m_tiles, n_tiles = order
    whole, pieces, units = cut
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    empty = memory[3]
    count, taken = 0, 0
    index = took(queue, taken) if BESIDE else gl.program_id(0)
    while index < units:
        tile, piece, begin, end = unit_of(index, whole, pieces, _steps_of(k_tiles, low_tiles, ACROSS, COUNT))
        m, n = _tile(tile, m_tiles, n_tiles)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        acc = _steps(acc, memory, count, end - begin, which, ACROSS)
        count += end - begin
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        row = m * BLOCK_M + which * ROWS
        part, col = 0, n * BLOCK_N
        p_columns, n_cols = p_scale, 0
        if not ACROSS:
            part, first = _part_of(n, second, third)
            col = (n - first) * BLOCK_N
            if SCALED:
                if OVERLAP and not BESIDE:
                    gdc_wait()
                p_columns = p_scale + gl.where(part == 0, 0, gl.where(part == 1, starts[0], starts[1])) + col
                n_cols = gl.where(part == 0, ns[0], gl.where(part == 1, ns[1], ns[2])) - col
        tma.store_wait(0)
        panel, step = 0, 1
        if CUT and index >= whole:
            share = (index - whole - piece).to(gl.int64) * CONSUMERS + which
            p_arrived = p_work + READY + m_tiles + (tile - whole) * CONSUMERS + which
            p_tile = p_shares + share * (ROWS * BLOCK_N)
            _join(acc, s_out, p_tile, p_arrived, piece, pieces, p_columns, n_cols, which, SCALED, layout)
            mbarrier.arrive(joined, count=1)
            panel, step = piece, pieces
        else:
            _put(s_tiles.index(which), acc, p_columns, n_cols, SCALED)
        if ACROSS or COUNT == 1 or part == 0:
            _copy(outs[0], s_out, row, col, panel, step, which)
        elif COUNT == 2 or part == 1:
            _copy(outs[1], s_out, row, col, panel, step, which)
        else:
            _copy(outs[2], s_out, row, col, panel, step, which)
        taken += 1
        index = took(queue, taken) if BESIDE else index + gl.num_programs(0)
    tma.store_wait(0)


VARYING = (
    "n1 n2 n3 k_tiles1 k_tiles2 k_tiles3 m_tiles n_tiles whole pieces units rows low_tiles second third start2 start3 ready"
).split()


@gluon.jit(do_not_specialize=VARYING)
def linear_low_rank_kernel(
    p_scale, p_work, p_shares, d_a1, d_a2, d_a3, d_b1, d_b2, d_b3, d_t, d_low, d_out1, d_out2, d_out3,
    n1, n2, n3, k_tiles1, k_tiles2, k_tiles3, m_tiles, n_tiles, whole, pieces, units, rows, low_tiles,
    second, third, start2, start3, ready,
    ACROSS: gl.constexpr, COUNT: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr, BESIDE: gl.constexpr,
    CUT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_a1.dtype
    s_a = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], A_TILE)
    if ACROSS:
        s_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], B_TILE_ACROSS)
    else:
        s_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], B_TILE)
    s_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_N], B_TILE_ACROSS)
    s_out = s_tiles._reinterpret(dtype, [CONSUMERS * PANELS, ROWS, PANEL], B_TILE_ACROSS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    joined = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(joined, count=CONSUMERS)
    queue = new_queue()
    memory, order, k_tiles = (s_a, s_b, full, empty), (m_tiles, n_tiles), (k_tiles1, k_tiles2, k_tiles3)
    left, right, outs, ns = (d_a1, d_a2, d_a3), (d_b1, d_b2, d_b3), (d_out1, d_out2, d_out3), (n1, n2, n3)
    starts, cut = (start2, start3), (whole, pieces, units)
    # named: a number written into the lists below is no constexpr
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (outs, p_scale, p_work, p_shares, ns, memory, queue, joined, s_out, s_tiles, order, cut, k_tiles,
                        low_tiles, second, third, starts, upper, ACROSS, COUNT, SCALED, OVERLAP, BESIDE, CUT)),
            (_consume, (outs, p_scale, p_work, p_shares, ns, memory, queue, joined, s_out, s_tiles, order, cut, k_tiles,
                        low_tiles, second, third, starts, lower, ACROSS, COUNT, SCALED, OVERLAP, BESIDE, CUT)),
            (_produce, (left, right, d_t, d_low, p_work, memory, queue, joined, order, cut, k_tiles, rows, low_tiles, second,
                        third, starts, ready, ACROSS, COUNT, OVERLAP, BESIDE, CUT)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
