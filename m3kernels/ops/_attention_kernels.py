"""The kernels behind :mod:`m3kernels.ops.attention`: forward, and a backward in two passes without atomics.

Shapes: B sequences, H query heads, G key/value heads (H a multiple of G), S queries, T keys, D head_dim. Tensors are
(B, H, S, D) views of any strides with a dense last dimension; packed ones are (1, H, sum of S, D) with ``cu_seqlens``.

Scores are kept in base 2: ``exp2`` is one instruction, and the softmax scale takes the factor log2(e) with it, in fp32. So is
the log-sum-exp that the backward reads: in base e it would be rounded once more, at its magnitude.
Nowhere is a matrix product's result transposed and multiplied again: Triton 3.4 to 3.7.0 miscompiles that for Hopper. dK and dV
are accumulated transposed instead, (D, keys), and stored so.
"""

from m3kernels.ops._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence(p_cu, batch, length, PACKED: tl.constexpr):
    """(first row, rows) of one sequence: from cu_seqlens where packed, all rows otherwise. An empty one begins at row 0."""
    first = tl.cast(0, tl.int64)
    if PACKED:
        first = tl.load(p_cu + batch).to(tl.int64)
        length = (tl.load(p_cu + batch + 1).to(tl.int64) - first).to(tl.int32)
        # the last one may be empty: its first row would lie past the tensor
        first = tl.where(length > 0, first, 0)
    return first, length


@triton.jit
def _load_rows(p, rows, n_rows, stride, o_dim, DIM: tl.constexpr):
    mask = (rows < n_rows)[:, None] & (o_dim < DIM)[None, :]
    return tl.load(p + rows.to(tl.int64)[:, None] * stride + o_dim[None, :], mask=mask, other=0.0)


@triton.jit
def _visible(o_q, o_k, q_len, k_len, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a query sees. The last query stands beside the last key; a window of w holds the w newest keys."""
    seen = (o_q < q_len) & (o_k < k_len)
    if CAUSAL:
        seen &= o_k <= o_q + (k_len - q_len)
    if WINDOW:
        seen &= o_k > o_q + (k_len - q_len) - window
    return seen


@triton.jit
def softmax_step(b_top, b_sum, b_out, scores, b_v, PRECISION: tl.constexpr):
    """Takes one tile of base-2 scores (rows, keys) into the running maximum, sum and weighted values of the rows."""
    new_top = tl.maximum(b_top, tl.max(scores, axis=1))
    # a row that has seen nothing yet has no maximum to subtract
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.math.exp2(scores - safe[:, None])
    shrink = tl.math.exp2(b_top - safe)
    b_sum = b_sum * shrink + tl.sum(p, axis=1)
    b_out = b_out * shrink[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return new_top, b_sum, b_out


@triton.jit
def softmax_end(b_top, b_sum, b_out):
    """(out, log-sum-exp in base 2); a row that has seen nothing gets 0 and -inf."""
    empty = b_sum == 0.0
    lse = tl.where(empty, -float("inf"), b_top + tl.math.log2(tl.where(empty, 1.0, b_sum)))
    return b_out / tl.where(empty, 1.0, b_sum)[:, None], lse


@triton.jit
def attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_cu_q,
    p_cu_k,
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    batch, head = tl.program_id(2), tl.program_id(1)
    q_first, q_len = _sequence(p_cu_q, batch, seq_q, PACKED)
    k_first, k_len = _sequence(p_cu_k, batch, seq_k, PACKED)
    # under a causal mask later tiles take longer: they start first
    start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    o_q, o_dim = start_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_DIM)
    at, kv_head = batch.to(tl.int64), (head // GROUP).to(tl.int64)
    p_q += at * q_batch_stride + head.to(tl.int64) * q_head_stride + q_first * q_seq_stride
    p_k += at * k_batch_stride + kv_head * k_head_stride + k_first * k_seq_stride
    p_v += at * v_batch_stride + kv_head * v_head_stride + k_first * v_seq_stride
    if TMA:
        # pointers to queries would end warp specialisation; a descriptor has at least one row
        q_rows = tl.make_tensor_descriptor(p_q, [tl.maximum(q_len, 1), DIM], [q_seq_stride, 1], [BLOCK_Q, BLOCK_DIM])
        b_q = q_rows.load([start_q, 0])
    else:
        b_q = _load_rows(p_q, o_q, q_len, q_seq_stride, o_dim, DIM)
    to_base2 = tl.cast(scale, tl.float32) * LOG2E

    b_top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_out = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
    begin, end = 0, k_len
    if CAUSAL:
        end = tl.minimum(k_len, start_q + BLOCK_Q + k_len - q_len)
    if WINDOW:
        begin = tl.maximum(0, start_q + k_len - q_len - window + 1) // BLOCK_K * BLOCK_K
    if PACKED:
        # a tile past its sequence walks nothing and stores nothing; a branch around it would end warp specialisation
        end = tl.where(start_q < q_len, end, 0)
    if TMA:
        # bounded by the sequence: rows after its end come as zeros
        k_rows = tl.make_tensor_descriptor(p_k, [tl.maximum(k_len, 1), DIM], [k_seq_stride, 1], [BLOCK_K, BLOCK_DIM])
        v_rows = tl.make_tensor_descriptor(p_v, [tl.maximum(k_len, 1), DIM], [v_seq_stride, 1], [BLOCK_K, BLOCK_DIM])
    for start_k in tl.range(begin, end, BLOCK_K, warp_specialize=TMA):
        o_k = start_k + tl.arange(0, BLOCK_K)
        if TMA:
            b_k = k_rows.load([start_k, 0])
            b_v = v_rows.load([start_k, 0])
        else:
            b_k = _load_rows(p_k, o_k, k_len, k_seq_stride, o_dim, DIM)
            b_v = _load_rows(p_v, o_k, k_len, v_seq_stride, o_dim, DIM)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * to_base2
        seen = _visible(o_q[:, None], o_k[None, :], q_len, k_len, window, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, -float("inf"))
        b_top, b_sum, b_out = softmax_step(b_top, b_sum, b_out, scores, b_v, PRECISION)

    b_out, lse = softmax_end(b_top, b_sum, b_out)
    p_out += at * out_batch_stride + head.to(tl.int64) * out_head_stride + q_first * out_seq_stride
    mask = (o_q < q_len)[:, None] & (o_dim < DIM)[None, :]
    rows = o_q.to(tl.int64)[:, None] * out_seq_stride
    tl.store(p_out + rows + o_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=mask)
    p_lse += at * lse_batch_stride + head.to(tl.int64) * lse_head_stride + q_first
    tl.store(p_lse + o_q, lse, mask=o_q < q_len)


@triton.jit
def attention_delta_kernel(
    p_out,
    p_dout,
    p_delta,
    out_batch_stride,
    out_head_stride,
    out_seq_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_seq_stride,
    delta_batch_stride,
    delta_head_stride,
    rows,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = rowsum(out * dout), what the softmax's backward subtracts."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_row, o_dim = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
    p_out += batch * out_batch_stride + head * out_head_stride
    p_dout += batch * dout_batch_stride + head * dout_head_stride
    out = _load_rows(p_out, o_row, rows, out_seq_stride, o_dim, DIM).to(tl.float32)
    dout = _load_rows(p_dout, o_row, rows, dout_seq_stride, o_dim, DIM).to(tl.float32)
    p_delta += batch * delta_batch_stride + head * delta_head_stride
    tl.store(p_delta + o_row, tl.sum(out * dout, axis=1), mask=o_row < rows)


@triton.jit
def _softmax_bwd(b_q, b_k, b_v, b_dout, lse, delta, seen, to_base2, PRECISION: tl.constexpr):
    """(p, ds) of one tile (queries, keys), from the saved log-sum-exp and delta."""
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * to_base2
    p = tl.where(seen, tl.math.exp2(scores - lse[:, None]), 0.0)
    dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
    return p, p * (dp - delta[:, None])


@triton.jit
def attention_bwd_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_dq,
    p_cu_q,
    p_cu_k,
    q_batch_stride,
    q_head_stride,
    q_seq_stride,
    k_batch_stride,
    k_head_stride,
    k_seq_stride,
    v_batch_stride,
    v_head_stride,
    v_seq_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_seq_stride,
    dk_batch_stride,
    dk_head_stride,
    dk_seq_stride,
    dq_batch_stride,
    dq_head_stride,
    dq_seq_stride,
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ADDS_DQ: tl.constexpr,
):
    """One tile of keys and values; all query heads that share them in turn, so that nothing is added across programs.

    With ``ADDS_DQ`` its part of dq, not yet scaled, is added to an fp32 buffer of zeros: five products, in no fixed order.
    """
    batch, kv_head = tl.program_id(2), tl.program_id(1)
    q_first, q_len = _sequence(p_cu_q, batch, seq_q, PACKED)
    k_first, k_len = _sequence(p_cu_k, batch, seq_k, PACKED)
    start_k = tl.program_id(0) * BLOCK_K
    if start_k < k_len:
        o_k, o_dim = start_k + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_DIM)
        at = batch.to(tl.int64)
        p_k += at * k_batch_stride + kv_head.to(tl.int64) * k_head_stride + k_first * k_seq_stride
        p_v += at * v_batch_stride + kv_head.to(tl.int64) * v_head_stride + k_first * v_seq_stride
        b_k = _load_rows(p_k, o_k, k_len, k_seq_stride, o_dim, DIM)
        b_v = _load_rows(p_v, o_k, k_len, v_seq_stride, o_dim, DIM)
        to_base2 = tl.cast(scale, tl.float32) * LOG2E

        b_dk = tl.zeros([BLOCK_DIM, BLOCK_K], tl.float32)
        b_dv = tl.zeros([BLOCK_DIM, BLOCK_K], tl.float32)
        begin, end = 0, q_len
        if CAUSAL:
            begin = tl.maximum(0, start_k - (k_len - q_len)) // BLOCK_Q * BLOCK_Q
        if WINDOW:
            end = tl.minimum(q_len, start_k + BLOCK_K - 1 + window - (k_len - q_len))
        for shared in range(0, GROUP):
            head = (kv_head * GROUP + shared).to(tl.int64)
            p_q_head = p_q + at * q_batch_stride + head * q_head_stride + q_first * q_seq_stride
            p_dq_head = p_dq + at * dq_batch_stride + head * dq_head_stride + q_first * dq_seq_stride
            p_dout_head = p_dout + at * dout_batch_stride + head * dout_head_stride + q_first * dout_seq_stride
            o_lse = at * lse_batch_stride + head * lse_head_stride + q_first
            for start_q in range(begin, end, BLOCK_Q):
                o_q = start_q + tl.arange(0, BLOCK_Q)
                b_q = _load_rows(p_q_head, o_q, q_len, q_seq_stride, o_dim, DIM)
                b_dout = _load_rows(p_dout_head, o_q, q_len, dout_seq_stride, o_dim, DIM)
                lse = tl.load(p_lse + o_lse + o_q, mask=o_q < q_len, other=0.0)
                delta = tl.load(p_delta + o_lse + o_q, mask=o_q < q_len, other=0.0)
                seen = _visible(o_q[:, None], o_k[None, :], q_len, k_len, window, CAUSAL, WINDOW)
                p, ds = _softmax_bwd(b_q, b_k, b_v, b_dout, lse, delta, seen, to_base2, PRECISION)
                b_dv += tl.dot(tl.trans(b_dout), p.to(b_dout.dtype), input_precision=PRECISION)
                b_dk += tl.dot(tl.trans(b_q), ds.to(b_q.dtype), input_precision=PRECISION)
                if ADDS_DQ:
                    part = tl.dot(ds.to(b_k.dtype), b_k, input_precision=PRECISION)
                    o_part = o_q.to(tl.int64)[:, None] * dq_seq_stride + o_dim[None, :]
                    mask_part = (o_q < q_len)[:, None] & (o_dim < DIM)[None, :]
                    tl.atomic_add(p_dq_head + o_part, part, mask=mask_part, sem="relaxed")

        b_dk *= tl.cast(scale, tl.float32)
        o_out = at * dk_batch_stride + kv_head.to(tl.int64) * dk_head_stride + k_first * dk_seq_stride
        o_out += o_k.to(tl.int64)[None, :] * dk_seq_stride + o_dim[:, None]
        mask = (o_k < k_len)[None, :] & (o_dim < DIM)[:, None]
        tl.store(p_dk + o_out, b_dk.to(p_dk.dtype.element_ty), mask=mask)
        tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=mask)


@triton.jit
def attention_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    p_cu_q,
    p_cu_k,
    q_batch_stride,
    q_head_stride,
    q_seq_stride,
    k_batch_stride,
    k_head_stride,
    k_seq_stride,
    v_batch_stride,
    v_head_stride,
    v_seq_stride,
    dout_batch_stride,
    dout_head_stride,
    dout_seq_stride,
    dq_batch_stride,
    dq_head_stride,
    dq_seq_stride,
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries; walks the keys that it sees, as the forward does."""
    batch, head = tl.program_id(2), tl.program_id(1)
    q_first, q_len = _sequence(p_cu_q, batch, seq_q, PACKED)
    k_first, k_len = _sequence(p_cu_k, batch, seq_k, PACKED)
    start_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    if start_q < q_len:
        o_q, o_dim = start_q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_DIM)
        at, kv_head = batch.to(tl.int64), (head // GROUP).to(tl.int64)
        p_q += at * q_batch_stride + head.to(tl.int64) * q_head_stride + q_first * q_seq_stride
        p_dout += at * dout_batch_stride + head.to(tl.int64) * dout_head_stride + q_first * dout_seq_stride
        p_k += at * k_batch_stride + kv_head * k_head_stride + k_first * k_seq_stride
        p_v += at * v_batch_stride + kv_head * v_head_stride + k_first * v_seq_stride
        o_lse = at * lse_batch_stride + head.to(tl.int64) * lse_head_stride + q_first
        b_q = _load_rows(p_q, o_q, q_len, q_seq_stride, o_dim, DIM)
        b_dout = _load_rows(p_dout, o_q, q_len, dout_seq_stride, o_dim, DIM)
        lse = tl.load(p_lse + o_lse + o_q, mask=o_q < q_len, other=0.0)
        delta = tl.load(p_delta + o_lse + o_q, mask=o_q < q_len, other=0.0)
        to_base2 = tl.cast(scale, tl.float32) * LOG2E

        b_dq = tl.zeros([BLOCK_Q, BLOCK_DIM], tl.float32)
        begin, end = 0, k_len
        if CAUSAL:
            end = tl.minimum(k_len, start_q + BLOCK_Q + k_len - q_len)
        if WINDOW:
            begin = tl.maximum(0, start_q + k_len - q_len - window + 1) // BLOCK_K * BLOCK_K
        for start_k in range(begin, end, BLOCK_K):
            o_k = start_k + tl.arange(0, BLOCK_K)
            b_k = _load_rows(p_k, o_k, k_len, k_seq_stride, o_dim, DIM)
            b_v = _load_rows(p_v, o_k, k_len, v_seq_stride, o_dim, DIM)
            seen = _visible(o_q[:, None], o_k[None, :], q_len, k_len, window, CAUSAL, WINDOW)
            p, ds = _softmax_bwd(b_q, b_k, b_v, b_dout, lse, delta, seen, to_base2, PRECISION)
            b_dq += tl.dot(ds.to(b_k.dtype), b_k, input_precision=PRECISION)

        p_dq += at * dq_batch_stride + head.to(tl.int64) * dq_head_stride + q_first * dq_seq_stride
        mask = (o_q < q_len)[:, None] & (o_dim < DIM)[None, :]
        b_dq = (b_dq * tl.cast(scale, tl.float32)).to(p_dq.dtype.element_ty)
        tl.store(p_dq + o_q.to(tl.int64)[:, None] * dq_seq_stride + o_dim[None, :], b_dq, mask=mask)
