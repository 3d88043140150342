"""Attention's backward for Hopper at head_dim 128: five products in one kernel, in Gluon (Triton 3.6).

One program owns 128 keys and walks the queries that see them, for all query heads that share the keys: dk and dv stay
in registers. A producer warp fills a ring of (q, dout, lse, delta) tiles; two warpgroups take 64 keys each:

    s^T = k q^T   dp^T = v dout^T   p = exp2(s - lse)   ds = p * (dp - delta)   dv += p^T dout   dk += ds^T q

Keys are the rows of all of these, so that p and ds feed dv and dk from registers. ds goes to shared memory too, where
each warpgroup reads all 128 keys of it, makes dq = ds k for 64 of the 128 dimensions, and adds that to fp32 memory, in
no fixed order (dk and dv have one). ds and the sum of dq are not scaled: dk is scaled at its store, dq in the last kernel.

That fp32 sum lies in whole tiles of 64 queries, in the order in which threads hold one: (half of the dimensions, 8
columns, thread, 4 floats), for additions of 16 bytes that coalesce. The copy engine's additions were slower: products
of 64 by 64 nearly fill shared memory's bandwidth, and those pass through it twice more.

Packed sequences share descriptors: a tile past its sequence's end reads the next one's rows; their p and ds are zeros.
"""

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

from m3kernels.ops._attention_bwd_kernels import attention_delta_kernel
from m3kernels.ops._attention_kernels import sequence as sequence_rows
from m3kernels.ops._attention_triton import Problem, addressable, like
from m3kernels.ops._common import cdiv, launch
from m3kernels.ops._triton import tl, triton

LOG2E = gl.constexpr(1.4426950408889634)
DIM = gl.constexpr(128)
BLOCK_Q = gl.constexpr(64)
BLOCK_K = gl.constexpr(128)
# a warpgroup's keys in s, dp, dk and dv, and its dimensions in dq
HALF = gl.constexpr(64)

ROWS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# 64 rows by 64 or 128 columns over the four warps of a warpgroup; the same as a left operand
MMA_64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
MMA_128 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA_128, 2))
# MMA_64 as (thread, 8 columns, the 2 rows by 2 columns of them that a thread holds)
OWNED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        lane_bases=[[1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0], [16, 0, 0]],
        warp_bases=[[32, 0, 0], [64, 0, 0]],
        block_bases=[],
        shape=[128, 8, 4],
    )
)
# one compiled kernel serves all of them
SIZES = ["lse_batch_stride", "lse_head_stride", "seq_q", "seq_k", "kv_heads", "pairs", "together", "dq_tiles", "window"]


@gluon.jit
def _sequence(p_cu, sequence, length, PACKED: gl.constexpr):
    """(first row, rows) of one sequence."""
    first = gl.to_tensor(0)
    if PACKED:
        first = gl.load(p_cu + sequence)
        length = gl.load(p_cu + sequence + 1) - first
    return first, length


@gluon.jit
def _produce(descs, tiles, bars, stats, tile, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """The loads: k and v once, then (q, dout, lse, delta) of every query tile of every head."""
    d_q, d_k, d_v, d_dout = descs
    m_q, m_k, m_v, m_dout, m_lse, m_delta, m_ds = tiles
    bar_kv, bar_full, bar_empty, bar_ds = bars
    p_lse, p_delta, lse_head_stride = stats
    batch, kv_head, q_first, q_len, k_row, begin, end = tile
    mbarrier.expect(bar_kv, 2 * BLOCK_K * DIM * 2)
    tma.async_copy_global_to_shared(d_k, [batch, kv_head, k_row, 0], bar_kv, m_k)
    tma.async_copy_global_to_shared(d_v, [batch, kv_head, k_row, 0], bar_kv, m_v)
    o_row = gl.arange(0, BLOCK_Q, layout=gl.BlockedLayout([2], [32], [1], [0]))
    step = gl.to_tensor(0)
    for shared in range(0, GROUP):
        head = kv_head * GROUP + shared
        p_lse_head = p_lse + head.to(gl.int64) * lse_head_stride
        p_delta_head = p_delta + head.to(gl.int64) * lse_head_stride
        for i in range(begin, end):
            stage = step % STAGES
            full = bar_full.index(stage)
            o_q = i * BLOCK_Q + o_row
            lse = gl.load(p_lse_head + o_q, mask=o_q < q_len, other=-float("inf"))
            delta = gl.load(p_delta_head + o_q, mask=o_q < q_len, other=0.0)
            mbarrier.wait(bar_empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full, 2 * BLOCK_Q * DIM * 2)
            row = q_first + i * BLOCK_Q
            tma.async_copy_global_to_shared(d_q, [batch, head, row, 0], full, m_q.index(stage))
            tma.async_copy_global_to_shared(d_dout, [batch, head, row, 0], full, m_dout.index(stage))
            # p of a row that sees nothing, or lies past the end, comes out as 0
            m_lse.index(stage).store(gl.where(lse == -float("inf"), float("inf"), lse * LOG2E))
            m_delta.index(stage).store(delta)
            mbarrier.arrive(full, count=1)
            step += 1


@gluon.jit
def _seen(start_q, start_k, q_len, k_len, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """(keys, queries): the last query stands beside the last key; a window of w holds the w newest keys."""
    o_k = gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA_64))[:, None]
    o_q = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, MMA_64))[None, :]
    behind = o_q - o_k
    beside = start_k - start_q - (k_len - q_len)
    seen = o_k < k_len - start_k
    if CAUSAL:
        seen &= behind >= beside
    if WINDOW:
        seen &= behind < beside + window
    return seen


@gluon.jit
def _add_owned(p, b_dq):
    """Adds (64, 64) to 4096 floats of memory, four at a time of those that a thread holds."""
    # (warp, half of 16 rows, row, 8 columns, column pair, column)
    b_dq = b_dq.reshape([4, 2, 8, 8, 4, 2]).permute((0, 2, 4, 3, 1, 5)).reshape([128, 8, 4])
    b_dq = gl.convert_layout(b_dq, OWNED, assert_trivial=True)
    thread = gl.arange(0, 128, layout=gl.SliceLayout(1, gl.SliceLayout(2, OWNED)))[:, None, None]
    columns = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, OWNED)))[None, :, None]
    one = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, OWNED)))[None, None, :]
    gl.atomic_add(p + (columns * 512 + thread * 4 + one), b_dq, sem="relaxed")


# fmt: off
@gluon.jit
def _walk(
    b_dk, b_dv, step, begin, end, p_dq, dq_tile, tiles, bars, start_k, masks,
    WHICH: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """Query tiles ``begin`` to ``end`` of one head, for 64 of the keys. Returns (b_dk, b_dv, step)."""
    m_q, m_k, m_v, m_dout, m_lse, m_delta, m_ds = tiles
    bar_kv, bar_full, bar_empty, bar_ds = bars
    q_len, k_len, window, to_base2 = masks
    b_zero = gl.zeros([HALF, BLOCK_Q], gl.float32, layout=MMA_64)
    own_k, own_v = m_k.slice(WHICH * HALF, HALF), m_v.slice(WHICH * HALF, HALF)
    for i in range(begin, end):
        stage = step % STAGES
        m_q_now, m_dout_now = m_q.index(stage), m_dout.index(stage)
        mbarrier.wait(bar_full.index(stage), step // STAGES & 1)
        b_s = warpgroup_mma(own_k, m_q_now.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_dp = warpgroup_mma(own_v, m_dout_now.permute((1, 0)), b_zero, use_acc=False, is_async=True)
        lse = m_lse.index(stage).load(gl.SliceLayout(0, MMA_64))
        b_s = warpgroup_mma_wait(1, deps=[b_s])
        b_p = gl.exp2(b_s * to_base2 - lse[None, :])
        if MASKED:
            b_p = gl.where(_seen(i * BLOCK_Q, start_k, q_len, k_len, window, CAUSAL, WINDOW), b_p, 0.0)
        delta = m_delta.index(stage).load(gl.SliceLayout(0, MMA_64))
        b_dp = warpgroup_mma_wait(0, deps=[b_dp])
        b_ds = (b_p * (b_dp - delta[None, :])).to(m_q.dtype)
        b_p = gl.convert_layout(b_p.to(m_q.dtype), LEFT)
        b_dv = warpgroup_mma(b_p, m_dout_now, b_dv, is_async=True)

        # two buffers: whoever writes this one has seen both warpgroups done with the other, and so with this
        m_ds_now = m_ds.index(step % 2)
        m_ds_now.slice(WHICH * HALF, HALF).store(b_ds)
        fence_async_shared()
        mbarrier.arrive(bar_ds, count=1)
        b_ds = gl.convert_layout(b_ds, LEFT)
        mbarrier.wait(bar_ds, step & 1)
        half_k = m_k.slice(WHICH * HALF, HALF, dim=1)
        b_dq = warpgroup_mma(m_ds_now.permute((1, 0)), half_k, b_zero, use_acc=False, is_async=True)
        b_dk = warpgroup_mma(b_ds, m_q_now, b_dk, is_async=True)
        # left operands are waited for too: they must outlive the products that read them
        b_dv, b_p, b_dq = warpgroup_mma_wait(1, deps=[b_dv, b_p, b_dq])
        part = (dq_tile + i) * 2 + WHICH
        _add_owned(p_dq + part.to(gl.int64) * (BLOCK_Q * HALF), b_dq)
        b_dk, b_ds = warpgroup_mma_wait(0, deps=[b_dk, b_ds])
        mbarrier.arrive(bar_empty.index(stage), count=1)
        step += 1
    return b_dk, b_dv, step


# fmt: off
@gluon.jit
def _consume(
    dq, tiles, bars, kv_head, start_k, bounds, masks, outs,
    GROUP: gl.constexpr, WHICH: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    """One warpgroup: dk and dv of its 64 keys, and its 64 dimensions of every dq."""
    p_dq, dq_first, dq_tiles = dq
    bar_kv, bar_full, bar_empty, bar_ds = bars
    begin, whole_begin, whole_end, end = bounds
    q_len, k_len, window, scale = masks
    p_dk, p_dv, seq_stride = outs
    start_k += WHICH * HALF
    work = (tiles, bars, start_k, (q_len, k_len, window, scale * LOG2E))
    b_dk = gl.zeros([HALF, DIM], gl.float32, layout=MMA_128)
    b_dv = gl.zeros([HALF, DIM], gl.float32, layout=MMA_128)
    mbarrier.wait(bar_kv, 0)
    step = gl.to_tensor(0)
    for shared in range(0, GROUP):
        dq_tile = dq_first + (kv_head * GROUP + shared) * dq_tiles
        b_dk, b_dv, step = _walk(
            b_dk, b_dv, step, begin, whole_begin, p_dq, dq_tile, *work, WHICH, True, CAUSAL, WINDOW, STAGES
        )
        b_dk, b_dv, step = _walk(
            b_dk, b_dv, step, whole_begin, whole_end, p_dq, dq_tile, *work, WHICH, False, CAUSAL, WINDOW, STAGES
        )
        if WINDOW:
            b_dk, b_dv, step = _walk(
                b_dk, b_dv, step, whole_end, end, p_dq, dq_tile, *work, WHICH, True, CAUSAL, WINDOW, STAGES
            )
    o_k = start_k + gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA_128))
    o_dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA_128))
    o_out = o_k.to(gl.int64)[:, None] * seq_stride + o_dim[None, :]
    mask = (o_k < k_len)[:, None] & (o_dim < DIM)[None, :]
    gl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), mask=mask)
    gl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=mask)


# fmt: off
@gluon.jit(do_not_specialize=SIZES)
def attention_bwd_hopper_kernel(
    p_lse, p_delta, p_dk, p_dv, p_dq, p_cu_q, p_cu_k, d_q, d_k, d_v, d_dout, lse_batch_stride, lse_head_stride,
    dk_batch_stride, dk_head_stride, dk_seq_stride, seq_q, seq_k, kv_heads, pairs, together, dq_tiles, scale, window,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr,
):
    # fmt: on
    # ``together`` pairs of (sequence, kv head) at a time share the cache; in them the first keys, seen by most, first
    n_tiles = gl.cdiv(seq_k, BLOCK_K)
    chunk = gl.program_id(0) // (together * n_tiles)
    within = gl.program_id(0) % (together * n_tiles)
    in_chunk = gl.minimum(together, pairs - chunk * together)
    pair = chunk * together + within % in_chunk
    sequence, kv_head = pair // kv_heads, pair % kv_heads
    start_k = within // in_chunk * BLOCK_K
    q_first, q_len = _sequence(p_cu_q, sequence, seq_q, PACKED)
    k_first, k_len = _sequence(p_cu_k, sequence, seq_k, PACKED)
    # packed sequences are rows of one batch
    batch = gl.to_tensor(0) if PACKED else sequence

    # query tiles that see any of the keys, and those among them that see all
    begin, end = gl.to_tensor(0), gl.cdiv(q_len, BLOCK_Q)
    whole_begin, whole_end = begin, end
    beside = start_k - (k_len - q_len)
    if CAUSAL:
        begin = gl.maximum(0, beside) // BLOCK_Q
        whole_begin = gl.cdiv(gl.maximum(0, beside + BLOCK_K - 1), BLOCK_Q)
    if WINDOW:
        end = gl.minimum(end, gl.cdiv(gl.maximum(0, beside + BLOCK_K - 1 + window), BLOCK_Q))
        whole_end = gl.maximum(0, beside + window) // BLOCK_Q
    # a program past its sequence walks nothing and stores nothing
    end = gl.where(start_k < k_len, gl.maximum(begin, end), begin)
    whole_begin = gl.where(start_k + BLOCK_K > k_len, end, gl.minimum(whole_begin, end))
    whole_end = gl.minimum(gl.maximum(whole_end, whole_begin), end)

    m_q = gl.allocate_shared_memory(d_q.dtype, [STAGES, BLOCK_Q, DIM], TILE)
    m_dout = gl.allocate_shared_memory(d_q.dtype, [STAGES, BLOCK_Q, DIM], TILE)
    m_k = gl.allocate_shared_memory(d_q.dtype, [BLOCK_K, DIM], TILE)
    m_v = gl.allocate_shared_memory(d_q.dtype, [BLOCK_K, DIM], TILE)
    m_ds = gl.allocate_shared_memory(d_q.dtype, [2, BLOCK_K, BLOCK_Q], TILE)
    m_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], FLAT)
    m_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_Q], FLAT)
    bar_kv = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_ds = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar_kv, count=1)
    mbarrier.init(bar_ds, count=2)
    for i in gl.static_range(STAGES):
        # the copies' bytes and the producer's own stores; two warpgroups
        mbarrier.init(bar_full.index(i), count=2)
        mbarrier.init(bar_empty.index(i), count=2)

    at = batch.to(gl.int64) * dk_batch_stride + kv_head.to(gl.int64) * dk_head_stride
    at += k_first.to(gl.int64) * dk_seq_stride
    stats_at = batch.to(gl.int64) * lse_batch_stride + q_first
    # whole tiles for every sequence: a packed one may begin anywhere
    dq_first = batch * kv_heads * GROUP * dq_tiles
    if PACKED:
        dq_first += q_first // BLOCK_Q + sequence
    tiles = (m_q, m_k, m_v, m_dout, m_lse, m_delta, m_ds)
    bars = (bar_kv, bar_full, bar_empty, bar_ds)
    bounds = (begin, whole_begin, whole_end, end)
    masks = (q_len, k_len, window, scale)
    outs = (p_dk + at, p_dv + at, dk_seq_stride)
    dq = (p_dq, dq_first, dq_tiles)
    stats = (p_lse + stats_at, p_delta + stats_at, lse_head_stride)
    to_load = (batch, kv_head, q_first, q_len, k_first + start_k, begin, end)
    gl.warp_specialize(
        [
            (_consume, (dq, tiles, bars, kv_head, start_k, bounds, masks, outs, GROUP, 0, CAUSAL, WINDOW, STAGES)),
            (_consume, (dq, tiles, bars, kv_head, start_k, bounds, masks, outs, GROUP, 1, CAUSAL, WINDOW, STAGES)),
            (_produce, ((d_q, d_k, d_v, d_dout), tiles, bars, stats, to_load, GROUP, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


# fmt: off
@triton.jit
def attention_dq_kernel(
    p_sum, p_dq, p_cu_q, dq_batch_stride, dq_head_stride, dq_seq_stride, seq_q, dq_tiles, scale, PACKED: tl.constexpr,
):
    # fmt: on
    """One tile of dq's fp32 sum, put into rows, scaled and rounded."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    q_first, q_len = sequence_rows(p_cu_q, sequence, seq_q, PACKED)
    if tile * 64 < q_len:
        batch = sequence.to(tl.int64)
        at = (batch * tl.num_programs(1) + head) * dq_tiles + tile
        if PACKED:
            batch = tl.cast(0, tl.int64)
            at = head * dq_tiles + q_first // 64 + sequence + tile
        b_sum = tl.load(p_sum + at * 8192 + tl.arange(0, 8192))
        # (half of the dimensions, 8 columns, warp, row, column pair, half of 16 rows, column)
        b_sum = tl.permute(tl.reshape(b_sum, (2, 8, 4, 8, 4, 2, 2)), (2, 5, 3, 0, 1, 4, 6))
        b_dq = tl.reshape(b_sum, (64, 128)) * tl.cast(scale, tl.float32)
        o_q, o_dim = tile * 64 + tl.arange(0, 64), tl.arange(0, 128)
        p_dq += batch * dq_batch_stride + head * dq_head_stride + q_first * dq_seq_stride
        o_dq = o_q.to(tl.int64)[:, None] * dq_seq_stride + o_dim[None, :]
        tl.store(p_dq + o_dq, b_dq.to(p_dq.dtype.element_ty), mask=(o_q < q_len)[:, None])


# tiles of queries under way: 195 of the 227 KB that a program may have
STAGES = 3
# (sequence, kv head) pairs side by side: 8 gave 480 TFLOP/s where 4 gave 504 (B4 S4096, causal, 32/8 heads, H100)
TOGETHER = 4


def _rows(x: Tensor, rows: gl.constexpr) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows.value, DIM.value], ROWS.value)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each (B, H, S, D) over (B, S, H, D) memory."""
    dq, dk, dv = like(q), like(k), like(k)
    packed, sequences, window = problem.packed, problem.sequences(q), problem.window
    longest_q, longest_k = problem.longest_q, problem.longest_k
    q, k, v, dout, lse = *map(addressable, (q, k, v, dout)), lse.contiguous()
    (batch, heads, seq, dim), kv_heads = q.shape, k.shape[1]
    delta = torch.empty_like(lse)
    launch(
        "attention backward (delta)",
        attention_delta_kernel,
        (cdiv(seq, 64), heads, batch),
        *(out, dout, delta, *out.stride()[:3], *dout.stride()[:3], *delta.stride()[:2], seq),
        **{"DIM": dim, "BLOCK_DIM": dim, "BLOCK": 64},
    )
    dq_tiles = seq // BLOCK_Q.value + sequences if packed else cdiv(seq, BLOCK_Q.value)
    added = q.new_zeros(batch * heads * dq_tiles * BLOCK_Q.value * dim, dtype=torch.float32)
    pairs = kv_heads * sequences
    launch(
        "attention backward",
        attention_bwd_hopper_kernel,
        (cdiv(longest_k, BLOCK_K.value) * pairs,),
        *(lse, delta, dk, dv, added, *((problem.cu_q, problem.cu_k) if packed else (lse, lse))),
        *(_rows(q, BLOCK_Q), _rows(k, BLOCK_K), _rows(v, BLOCK_K), _rows(dout, BLOCK_Q)),
        *(*lse.stride()[:2], *dk.stride()[:3], longest_q, longest_k, kv_heads, pairs, min(TOGETHER, pairs), dq_tiles),
        *(problem.scale, window),
        **{"GROUP": heads // kv_heads, "CAUSAL": problem.causal, "WINDOW": window > 0, "PACKED": packed, "STAGES": STAGES},
        # three warpgroups share 64K registers, and give theirs to the two that compute
        **{"num_warps": 4, "maxnreg": 168},
    )
    launch(
        "attention backward (dq)",
        attention_dq_kernel,
        (cdiv(longest_q, BLOCK_Q.value), heads, sequences),
        *(added, dq, problem.cu_q if packed else lse, *dq.stride()[:3], longest_q, dq_tiles, problem.scale),
        PACKED=packed,
    )
    return dq, dk, dv
