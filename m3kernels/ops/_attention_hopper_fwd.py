"""The attention forward of :mod:`m3kernels.ops.attention` for Hopper (sm_90a), in Gluon: warps have roles.

One warp loads: queries once a tile, then keys and values through rings of shared memory, by the copy engine. Two warpgroups
compute, 64 queries each, with two products in flight, so that a block's softmax runs beside the values' product of the block
before it:

    scores = q k(j)^T                issued first, and waited for
    out += p v(j - 1)                issued second, runs on through the softmax
    p, top, sum, shrink = softmax(scores)
    out *= shrink                    once the product is there

Keys are walked from the newest to the oldest: blocks that a mask cuts come first (and last under a window), those between
carry no mask. Programs stay on their multiprocessor and take tile after tile; the next one's keys load during an epilogue.
Shapes, masks and names are those of :mod:`m3kernels.ops._attention_kernels`; the log-sum-exp is natural here.

Measured and dropped (H100): taking turns at the tensor cores (2 to 3% slower), three warpgroups (8 to 10%), blocks of 64 keys
(11 to 16%), rounding p before the product's end (the same).
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from m3kernels.ops._attention_triton import Problem, addressable, like
from m3kernels.ops._common import cdiv, launch, sm_count
from m3kernels.ops._triton import triton

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
CONSUMERS = gl.constexpr(2)  # warpgroups that compute
ROWS = gl.constexpr(64)  # queries of one: the height of its matrix instruction
BLOCK_Q = gl.constexpr(128)
BLOCK_K = gl.constexpr(128)
STAGES = gl.constexpr(3)  # blocks of keys, and of values, in shared memory: 230 KB of 232 at head_dim 128


@gluon.jit
def _sequence(p_cu, batch, length, PACKED: gl.constexpr):
    """(first row, rows) of one sequence: from cu_seqlens where packed, all rows otherwise. An empty one begins at row 0."""
    first = gl.to_tensor(0).to(gl.int64)
    if PACKED:
        first = gl.load(p_cu + batch).to(gl.int64)
        length = (gl.load(p_cu + batch + 1).to(gl.int64) - first).to(gl.int32)
        # the last one may be empty: its first row would lie past the tensor
        first = gl.where(length > 0, first, 0)
    return first, length


@gluon.jit
def _tile(turn, order):
    """(exists, first query, head, sequence) of a program's next tile: later ones, longer under a causal mask, come first.

    Heads go in sections, all tiles of a section before the next section's.
    """
    q_tiles, tiles, heads, heads_at_once, rotate = order
    programs = gl.num_programs(0)
    # rotated, so that not always the same program gets the longest tile of a turn
    index = turn * programs + (gl.program_id(0) + turn * rotate) % programs
    exists = index < tiles
    index = gl.minimum(index, tiles - 1)
    section = index // (q_tiles * heads_at_once)
    within = index - section * (q_tiles * heads_at_once)
    late = within // heads_at_once
    at = section * heads_at_once + within - late * heads_at_once
    batch = at // heads
    return exists, (q_tiles - 1 - late) * BLOCK_Q, at - batch * heads, batch


@gluon.jit
def _blocks(start_q, q_len, k_len, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """(first, end): the blocks of keys that some query of a tile sees; at least one, which may be masked altogether."""
    first, end = 0, gl.cdiv(k_len, BLOCK_K)
    if CAUSAL:
        end = gl.minimum(end, gl.cdiv(gl.maximum(start_q + BLOCK_Q + k_len - q_len, 0), BLOCK_K))
    if WINDOW:
        first = gl.maximum(0, start_q + k_len - q_len - window + 1) // BLOCK_K
    return first, gl.maximum(end, first + 1)


@gluon.jit
def _wait(barriers, count):
    """Until slot ``count % STAGES`` has been filled (or freed) as often as block ``count`` needs."""
    mbarrier.wait(barriers.index(count % STAGES), count // STAGES & 1)


@gluon.jit
def _rows(p, strides, sequences, heads, rows, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """What the copy engine reads (sequence, head, row, dim) by: rows after the last come as zeros. It has at least one row."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BLOCK, DIM], p.dtype.element_ty)
    shape = [sequences, heads, gl.maximum(rows, 1), DIM]
    return tma.make_tensor_descriptor(p, shape, [strides[0], strides[1], strides[2], 1], [1, 1, BLOCK, DIM], layout)


@gluon.jit
def _load(rows, batch, head, start, s_ring, full, empty, count):
    """Waits for a free slot of a ring and fills it; on the first round every slot is free."""
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [batch, head, start, 0], full.index(slot), s_ring.index(slot))


@gluon.jit
def _produce(
    pointers, strides, memory, lengths, window, order,
    GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    p_q, p_k, p_v, p_cu_q, p_cu_k = pointers
    q_strides, k_strides, v_strides = strides
    s_q, q_full, q_empty, s_k, k_full, k_empty, s_v, v_full, v_empty = memory
    q_tiles, tiles, heads = order[0], order[1], order[2]
    if not PACKED:
        sequences = tiles // (q_tiles * heads)
        q_rows = _rows(p_q, q_strides, sequences, heads, lengths[0], ROWS, DIM)
        k_rows = _rows(p_k, k_strides, sequences, heads // GROUP, lengths[1], BLOCK_K, DIM)
        v_rows = _rows(p_v, v_strides, sequences, heads // GROUP, lengths[1], BLOCK_K, DIM)
    count, q_count = 0, 0  # blocks of keys, and tiles, loaded so far
    for turn in range(0, gl.cdiv(tiles, gl.num_programs(0))):
        exists, start_q, head, batch = _tile(turn, order)
        q_first, q_len = _sequence(p_cu_q, batch, lengths[0], PACKED)
        k_first, k_len = _sequence(p_cu_k, batch, lengths[1], PACKED)
        if exists & (start_q < q_len):
            if PACKED:
                # bounded by this sequence, in memory that holds the last one's bounds: copies by those must have ended
                if count > 0:
                    for i in gl.static_range(STAGES):
                        _wait(k_full, gl.maximum(count - 1 - i, 0))
                        _wait(v_full, gl.maximum(count - 1 - i, 0))
                    for i in gl.static_range(CONSUMERS):
                        mbarrier.wait(q_full.index(i), (q_count - 1) & 1)
                batch = 0
                q_rows = _rows(p_q + q_first * q_strides[2], q_strides, 1, heads, q_len, ROWS, DIM)
                k_rows = _rows(p_k + k_first * k_strides[2], k_strides, 1, heads // GROUP, k_len, BLOCK_K, DIM)
                v_rows = _rows(p_v + k_first * v_strides[2], v_strides, 1, heads // GROUP, k_len, BLOCK_K, DIM)
            for i in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(i), (q_count & 1) ^ 1)
                mbarrier.expect(q_full.index(i), q_rows.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_rows, [batch, head, start_q + i * ROWS, 0], q_full.index(i), s_q.index(i)
                )
            q_count += 1
            first, end = _blocks(start_q, q_len, k_len, window, CAUSAL, WINDOW)
            kv_head = head // GROUP
            _load(k_rows, batch, kv_head, (end - 1) * BLOCK_K, s_k, k_full, k_empty, count)
            # values are wanted one block later than their keys
            for i in range(1, end - first):
                _load(k_rows, batch, kv_head, (end - 1 - i) * BLOCK_K, s_k, k_full, k_empty, count + i)
                _load(v_rows, batch, kv_head, (end - i) * BLOCK_K, s_v, v_full, v_empty, count + i - 1)
            count += end - first
            _load(v_rows, batch, kv_head, first * BLOCK_K, s_v, v_full, v_empty, count - 1)


@gluon.jit
def _softmax(b_top, b_sum, scores, newest, o_k, window, to_base2, WINDOW: gl.constexpr, MASKED: gl.constexpr):
    """(p, top, sum, shrink): takes a block's unscaled scores into the running maximum and sum of its rows.

    ``newest`` is the last key that each row sees.
    """
    if MASKED:
        seen = o_k[None, :] <= newest[:, None]
        if WINDOW:
            seen &= o_k[None, :] > newest[:, None] - window
        scores = gl.where(seen, scores, -float("inf"))
    new_top = gl.maximum(b_top, gl.max(scores, axis=1))
    safe = new_top
    if MASKED:
        # a row that has seen nothing yet has no maximum to subtract
        safe = gl.where(new_top == -float("inf"), 0.0, new_top)
    p = gl.exp2(scores * to_base2 - (safe * to_base2)[:, None])
    shrink = gl.exp2(b_top * to_base2 - safe * to_base2)
    return p, new_top, b_sum * shrink + gl.sum(p, axis=1), shrink


@gluon.jit
def _scores(q, s_k, k_full, count, layout: gl.constexpr):
    """Waits for block ``count`` of the keys and issues their product with the queries."""
    _wait(k_full, count)
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, layout)
    return warpgroup_mma(q, s_k.index(count % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _walk(
    b_p, b_out, b_top, b_sum, count, newer, older, q, memory, newest, o_dk, window, to_base2,
    WINDOW: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Blocks ``newer`` down to ``older``: each one's scores, and the values of the one before it, whose p is ``b_p``."""
    s_k, k_full, k_empty, s_v, v_full, v_empty = memory
    scores_layout: gl.constexpr = b_top.type.layout.parent
    for block in range(newer, older - 1, -1):
        scores = _scores(q, s_k, k_full, count, scores_layout)
        _wait(v_full, count - 1)
        out = warpgroup_mma(b_p, s_v.index((count - 1) % STAGES), b_out, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_empty.index(count % STAGES), count=1)
        p, b_top, b_sum, shrink = _softmax(
            b_top, b_sum, scores, newest, block * BLOCK_K + o_dk, window, to_base2, WINDOW, MASKED
        )
        # passed at once, it ends a basic block: within one, ptxas puts the wait for the product before the softmax
        _wait(v_full, count - 1)
        # b_p stays in its registers until the product that reads them is done
        b_out, b_p = warpgroup_mma_wait(0, deps=(out, b_p))
        mbarrier.arrive(v_empty.index((count - 1) % STAGES), count=1)
        b_out *= gl.convert_layout(shrink, gl.SliceLayout(1, b_out.type.layout))[:, None]
        b_p = gl.convert_layout(p.to(s_v.dtype), b_p.type.layout)
        count += 1
    return b_p, b_out, b_top, b_sum, count


@gluon.jit
def _consume(
    pointers, strides, memory, lengths, window, order, scale,
    which: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    p_out, p_lse, p_cu_q, p_cu_k = pointers
    out_strides, lse_strides = strides
    s_q, q_full, q_empty, s_k, k_full, k_empty, s_v, v_full, v_empty = memory
    ring = (s_k, k_full, k_empty, s_v, v_full, v_empty)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    to_base2 = scale.to(gl.float32) * LOG2E
    o_row = gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
    o_dk = gl.arange(0, BLOCK_K, gl.SliceLayout(0, scores_layout))
    q = s_q.index(which)
    count, q_count = 0, 0  # blocks of keys, and tiles, taken so far
    for turn in range(0, gl.cdiv(order[1], gl.num_programs(0))):
        exists, start_q, head, batch = _tile(turn, order)
        q_first, q_len = _sequence(p_cu_q, batch, lengths[0], PACKED)
        k_first, k_len = _sequence(p_cu_k, batch, lengths[1], PACKED)
        if exists & (start_q < q_len):
            first, end = _blocks(start_q, q_len, k_len, window, CAUSAL, WINDOW)
            start_q += which * ROWS
            sees = k_len - 1  # the newest key that this warpgroup's first query sees
            newest = gl.full_like(o_row, 0) + sees
            if CAUSAL:
                sees = start_q + k_len - q_len
                newest = sees + o_row
            # blocks below ``cut`` are seen in full on their newer side, those from ``opened`` on on their older side
            cut = gl.minimum(gl.maximum(sees + 1, 0) // BLOCK_K, end - 1)
            opened = first
            if WINDOW:
                opened = gl.maximum(first, gl.cdiv(gl.maximum(sees + ROWS - window, 0), BLOCK_K))

            b_top = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, scores_layout))
            b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores_layout))
            b_out = gl.zeros([ROWS, DIM], gl.float32, out_layout)
            mbarrier.wait(q_full.index(which), q_count & 1)
            scores = _scores(q, s_k, k_full, count, scores_layout)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(count % STAGES), count=1)
            o_k = (end - 1) * BLOCK_K + o_dk
            p, b_top, b_sum, _ = _softmax(b_top, b_sum, scores, newest, o_k, window, to_base2, WINDOW, True)
            b_p = gl.convert_layout(p.to(s_v.dtype), p_layout)
            count += 1
            b_p, b_out, b_top, b_sum, count = _walk(
                b_p, b_out, b_top, b_sum, count, end - 2, gl.maximum(cut, first), q, ring, newest, o_dk, window, to_base2,
                WINDOW, True,
            )  # fmt: skip
            b_p, b_out, b_top, b_sum, count = _walk(
                b_p, b_out, b_top, b_sum, count, cut - 1, opened, q, ring, newest, o_dk, window, to_base2, WINDOW, False
            )
            if WINDOW:
                b_p, b_out, b_top, b_sum, count = _walk(
                    b_p, b_out, b_top, b_sum, count, gl.minimum(cut, opened) - 1, first, q, ring, newest, o_dk, window,
                    to_base2, WINDOW, True,
                )  # fmt: skip
            mbarrier.arrive(q_empty.index(which), count=1)
            q_count += 1
            _wait(v_full, count - 1)
            out = warpgroup_mma(b_p, s_v.index((count - 1) % STAGES), b_out, is_async=True)
            b_out, b_p = warpgroup_mma_wait(0, deps=(out, b_p))
            mbarrier.arrive(v_empty.index((count - 1) % STAGES), count=1)

            empty = b_sum == 0.0
            lse = gl.where(empty, -float("inf"), b_top * to_base2 + gl.log2(gl.where(empty, 1.0, b_sum))) * LN2
            at_batch, at_head = batch.to(gl.int64), head.to(gl.int64)
            o_q = start_q + o_row
            p_lse_row = p_lse + at_batch * lse_strides[0] + at_head * lse_strides[1] + q_first
            gl.store(p_lse_row + o_q, lse, mask=o_q < q_len)
            weight = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, b_sum))
            weight = gl.convert_layout(weight, gl.SliceLayout(1, out_layout))[:, None]
            # a row that has seen nothing gets 0, whatever values it was multiplied with
            b_out = gl.where(weight > 0.0, b_out * weight, 0.0)
            o_q = start_q + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
            o_dim = gl.arange(0, DIM, gl.SliceLayout(0, out_layout))
            p_out_rows = p_out + at_batch * out_strides[0] + at_head * out_strides[1] + q_first * out_strides[2]
            offsets = o_q.to(gl.int64)[:, None] * out_strides[2] + o_dim[None, :]
            gl.store(p_out_rows + offsets, b_out.to(p_out.dtype.element_ty), mask=(o_q < q_len)[:, None])


# numbers that differ from call to call are no reason to compile again
VARYING = "lse_batch_stride lse_head_stride seq_q seq_k window q_tiles tiles heads heads_at_once rotate".split()


@gluon.jit(do_not_specialize=VARYING)
def attention_fwd_hopper_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_cu_q, p_cu_k,
    q_batch_stride, q_head_stride, q_seq_stride,
    k_batch_stride, k_head_stride, k_seq_stride,
    v_batch_stride, v_head_stride, v_seq_stride,
    out_batch_stride, out_head_stride, out_seq_stride, lse_batch_stride, lse_head_stride,
    seq_q, seq_k, scale, window, q_tiles, tiles, heads, heads_at_once, rotate,
    GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = p_q.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, DIM], dtype)
    s_q = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DIM], q_layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, DIM], k_layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, DIM], k_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    memory = (s_q, q_full, q_empty, s_k, k_full, k_empty, s_v, v_full, v_empty)
    lengths, order = (seq_q, seq_k), (q_tiles, tiles, heads, heads_at_once, rotate)
    sources, results = (p_q, p_k, p_v, p_cu_q, p_cu_k), (p_out, p_lse, p_cu_q, p_cu_k)
    q_strides, k_strides = (q_batch_stride, q_head_stride, q_seq_stride), (k_batch_stride, k_head_stride, k_seq_stride)
    read = (q_strides, k_strides, (v_batch_stride, v_head_stride, v_seq_stride))
    written = ((out_batch_stride, out_head_stride, out_seq_stride), (lse_batch_stride, lse_head_stride))
    # named: a number written into the lists below is no constexpr
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (results, written, memory, lengths, window, order, scale, upper, DIM, CAUSAL, WINDOW, PACKED)),
            (_consume, (results, written, memory, lengths, window, order, scale, lower, DIM, CAUSAL, WINDOW, PACKED)),
            (_produce, (sources, read, memory, lengths, window, order, GROUP, DIM, CAUSAL, WINDOW, PACKED)),
        ],
        [4, 1],
        [232, 40],
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory that a launch keeps its descriptors in."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


L2_BYTES = 20 * 2**20  # of keys and values that one section of heads may have; an H100 has 50 MB of cache in two halves


def _order(groups: int, group: int, kv_bytes: int, q_tiles: int, uneven: bool) -> tuple[int, int]:
    """(heads at once, rotation) of the tiles' order, for ``groups`` key/value heads of ``group`` query heads each."""
    if uneven and q_tiles >= 32:
        # even shares of long tiles count for more than the cache (by 1 to 2% at 4k to 16k; below it is the reverse)
        return groups * group, 82
    fitting = max(1, L2_BYTES // max(1, kv_bytes))
    return max(n for n in range(1, min(groups, fitting) + 1) if groups % n == 0) * group, 0


def forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out like q, log-sum-exp (B, H, S) in fp32)."""
    q, k, v = map(addressable, (q, k, v))
    (batch, heads, seq, dim), kv_heads = q.shape, k.shape[1]
    out, lse = like(q), q.new_empty((batch, heads, seq), dtype=torch.float32)
    packed, sequences, longest_q, longest_k = problem.packed, problem.sequences(q), problem.longest_q, problem.longest_k
    causal, window = problem.causal, problem.window
    # a context variable: autograd's threads, where checkpointing runs forwards, do not have the main one's
    triton.set_allocator(_scratch)
    q_tiles, group = cdiv(longest_q, BLOCK_Q.value), heads // kv_heads
    tiles = q_tiles * heads * sequences
    order = _order(kv_heads * sequences, group, 2 * longest_k * dim * k.element_size(), q_tiles, causal and window == 0)
    cu_q, cu_k = (problem.cu_q, problem.cu_k) if packed else (lse, lse)
    launch(
        "attention",
        attention_fwd_hopper_kernel,
        (min(tiles, sm_count(q.device)),),
        *(q, k, v, out, lse, cu_q, cu_k, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(0 if packed else out.stride(0), *out.stride()[1:3], 0 if packed else lse.stride(0), lse.stride(1)),
        *(longest_q, longest_k, problem.scale, window, q_tiles, tiles, heads, *order),
        GROUP=group,
        DIM=dim,
        CAUSAL=causal,
        WINDOW=window > 0,
        PACKED=packed,
        num_warps=4,
    )
    return out, lse
