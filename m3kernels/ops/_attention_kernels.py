"""Kernels of :mod:`m3kernels.ops.attention`: the forward, and what all attention kernels share.

Each query sees one stretch of its sequence's keys, [lo, hi): causal masks, windows and cache offsets give lo and hi by
formula, ``key_ranges`` gives them by value. Tiles that all their queries see completely are walked without a mask.
"""

from m3kernels.ops._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence(p_cu, batch, length, PACKED: tl.constexpr):
    """(first row, rows) of one sequence: from cu_seqlens where packed, all rows otherwise. An empty one begins at row 0."""
    first = tl.cast(0, tl.int64)
    if PACKED:
        first = tl.load(p_cu + batch).to(tl.int64)
        length = (tl.load(p_cu + batch + 1).to(tl.int64) - first).to(tl.int32)
        # the last one may be empty: its first row would lie past the tensor
        first = tl.where(length > 0, first, 0)
    return first, length


@triton.jit
def load_rows(p, rows, end, stride, o_dim, DIM: tl.constexpr, CHECKED: tl.constexpr):
    """(rows, dim); with ``CHECKED`` rows from ``end`` on are zeros, and never read."""
    at = p + rows.to(tl.int64)[:, None] * stride + o_dim[None, :]
    if CHECKED:
        return tl.load(at, mask=(rows < end)[:, None] & (o_dim < DIM)[None, :], other=0.0)
    if o_dim.shape[0] != DIM:
        return tl.load(at, mask=(o_dim < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def key_range(o_q, p_ranges, q_len, k_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr):
    """(lo, hi) of each query. The last query stands beside the last key; a window of w holds the w newest keys."""
    if RANGES:
        # rows past the end copy the last one, so that they do not widen or narrow what the tile walks
        row = tl.minimum(o_q, q_len - 1).to(tl.int64) * 2
        lo = tl.maximum(tl.load(p_ranges + row), 0)
        return lo, tl.minimum(tl.load(p_ranges + row + 1), k_len)
    position = o_q + (k_len - q_len)
    lo, hi = tl.zeros_like(o_q), tl.zeros_like(o_q) + k_len
    if CAUSAL:
        hi = tl.minimum(hi, position + 1)
    if WINDOW:
        lo = tl.maximum(position + 1 - window, 0)
    return lo, hi


@triton.jit
def key_tiles(
    lo,
    hi,
    start_q,
    q_len,
    k_len,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
):
    """(begin, full, end_full, end): keys that any query of the tile sees, and those tiles among them that all see."""
    if RANGES:
        begin, end = tl.min(lo, axis=0), tl.max(hi, axis=0)
        full, end_full = tl.max(lo, axis=0), tl.min(hi, axis=0)
    else:
        first = start_q + (k_len - q_len)
        last = tl.minimum(start_q + BLOCK_Q, q_len) - 1 + (k_len - q_len)
        begin, full, end, end_full = 0, 0, k_len, k_len
        if CAUSAL:
            end, end_full = tl.minimum(last + 1, k_len), tl.minimum(first + 1, k_len)
        if WINDOW:
            begin, full = tl.maximum(first + 1 - window, 0), tl.maximum(last + 1 - window, 0)
    begin = begin // BLOCK_K * BLOCK_K
    full = tl.maximum(tl.cdiv(full, BLOCK_K) * BLOCK_K, begin)
    return begin, full, tl.maximum(end_full // BLOCK_K * BLOCK_K, full), end


@triton.jit
def softmax_step(b_top, b_sum, b_out, scores, to_base2, b_v, PRECISION: tl.constexpr, v_scale=None):
    """Takes one tile of scores (rows, keys) into the running maximum (base 2), sum and weighted values of the rows.

    ``v_scale`` (keys,) multiplies the values, by way of their weights.
    """
    new_top = tl.maximum(b_top, tl.max(scores, axis=1) * to_base2)
    # a row that has seen nothing yet has no maximum to subtract
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.math.exp2(scores * to_base2 - safe[:, None])
    shrink = tl.math.exp2(b_top - safe)
    b_sum = b_sum * shrink + tl.sum(p, axis=1)
    if v_scale is not None:
        p *= v_scale[None, :]
    b_out = b_out * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return new_top, b_sum, b_out


@triton.jit
def softmax_end(b_top, b_sum, b_out):
    """(out, log-sum-exp); a row that has seen nothing gets 0 and -inf."""
    empty = b_sum == 0.0
    lse = tl.where(empty, -float("inf"), (b_top + tl.math.log2(tl.where(empty, 1.0, b_sum))) * LN2)
    return b_out / tl.where(empty, 1.0, b_sum)[:, None], lse


@triton.jit
def _attend(
    b_top,
    b_sum,
    b_out,
    b_q,
    p_k,
    p_v,
    k_seq_stride,
    v_seq_stride,
    o_dim,
    lo,
    hi,
    begin,
    end,
    last,
    to_base2,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys ``begin`` to ``end`` of one query tile; masked, no key from ``last`` on is read."""
    for start_k in range(begin, end, BLOCK_K):
        o_k = start_k + tl.arange(0, BLOCK_K)
        b_k = load_rows(p_k, o_k, last, k_seq_stride, o_dim, DIM, MASKED)
        b_v = load_rows(p_v, o_k, last, v_seq_stride, o_dim, DIM, MASKED)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if MASKED:
            seen = (o_k[None, :] >= lo[:, None]) & (o_k[None, :] < hi[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        b_top, b_sum, b_out = softmax_step(b_top, b_sum, b_out, scores, to_base2, b_v, PRECISION)
    return b_top, b_sum, b_out


@triton.jit(do_not_specialize=["seq_q", "seq_k", "window"])
def attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_cu_q,
    p_cu_k,
    p_ranges,
    q_batch_stride,
    q_head_stride,
    q_seq_stride,
    k_batch_stride,
    k_head_stride,
    k_seq_stride,
    v_batch_stride,
    v_head_stride,
    v_seq_stride,
    out_batch_stride,
    out_head_stride,
    out_seq_stride,
    lse_batch_stride,
    lse_head_stride,
    seq_q,
    seq_k,
    scale,
    window,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    RANGES: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head; walks the keys that it sees."""
    batch, head = tl.program_id(2), tl.program_id(1)
    q_first, q_len = sequence(p_cu_q, batch, seq_q, PACKED)
    k_first, k_len = sequence(p_cu_k, batch, seq_k, PACKED)
    # under a causal mask later tiles take longer: they start first
    start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if start_q < q_len:
        o_q, o_dim = start_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_DIM)
        at, kv_head = batch.to(tl.int64), (head // GROUP).to(tl.int64)
        p_q += at * q_batch_stride + head.to(tl.int64) * q_head_stride + q_first * q_seq_stride
        p_k += at * k_batch_stride + kv_head * k_head_stride + k_first * k_seq_stride
        p_v += at * v_batch_stride + kv_head * v_head_stride + k_first * v_seq_stride
        b_q = load_rows(p_q, o_q, q_len, q_seq_stride, o_dim, DIM, True)
        to_base2 = tl.cast(scale, tl.float32) * LOG2E
        lo, hi = key_range(o_q, p_ranges + at * seq_q * 2, q_len, k_len, window, CAUSAL, WINDOW, RANGES)
        begin, full, end_full, end = key_tiles(
            lo, hi, start_q, q_len, k_len, window, BLOCK_Q, BLOCK_K, CAUSAL, WINDOW, RANGES
        )

        b_top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_Q], tl.float32)
        b_out = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
        for part in tl.static_range(3):
            # the window's edge, what all queries of the tile see, the diagonal or the last keys
            if part != 0 or WINDOW or RANGES:
                first_k = begin if part == 0 else (full if part == 1 else end_full)
                last_k = tl.minimum(full, end) if part == 0 else (end_full if part == 1 else end)
                b_top, b_sum, b_out = _attend(
                    *(b_top, b_sum, b_out, b_q, p_k, p_v, k_seq_stride, v_seq_stride, o_dim, lo, hi),
                    *(first_k, last_k, end, to_base2),
                    *(DIM, BLOCK_K, part != 1, PRECISION),
                )

        b_out, lse = softmax_end(b_top, b_sum, b_out)
        p_out += at * out_batch_stride + head.to(tl.int64) * out_head_stride + q_first * out_seq_stride
        mask = (o_q < q_len)[:, None] & (o_dim < DIM)[None, :]
        rows = o_q.to(tl.int64)[:, None] * out_seq_stride
        tl.store(p_out + rows + o_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=mask)
        p_lse += at * lse_batch_stride + head.to(tl.int64) * lse_head_stride + q_first
        tl.store(p_lse + o_q, lse, mask=o_q < q_len)
