"""The skinny products of low-rank adapters: each reads its large operand once.

    parts   a matrix as 16-bit parts, scaled                    (R, K) or (N, R)
    shrink  t  = drop(x) A^T                                    (M, K) -> (M, R)
    grads   du = dy B and db = dy^T t in one pass over dy       (M, N) -> (M, R), (N, R)
            with x and du for dy and t: dA^T = drop(x)^T du
    sum     adds their partial results (fp32) in a fixed order
    expand  dx = drop'(du A)                                    (M, R) -> (M, K)

fp32 adapters beside 16-bit activations stand as two 16-bit numbers, hi + lo (SPLIT), which is exact to 2^-16: a product of two
such matrices is hi hi + lo hi + hi lo. One side is laid out [hi | lo | hi], the other [hi | hi | lo], so that one product of
three times the rank gives the sum.

Dropout's mask is made anew wherever it is needed, from a counter: (seed; row, column).
"""

from m3kernels.ops._triton import tl, triton

# Philox with 7 rounds passes BigCrush (Salmon et al. 2011); torch's has 10
ROUNDS = tl.constexpr(7)


@triton.jit
def _keep(b_x, p_seed, o_row, o_col, dropout):
    """``b_x`` / (1 - dropout) where the counter's number is at least ``dropout``, else 0."""
    zero = tl.zeros(b_x.shape, tl.uint32)
    row, col = zero + o_row[:, None].to(tl.uint32), zero + o_col[None, :].to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.load(p_seed), col, row, zero, zero, ROUNDS)
    kept = tl.uint_to_uniform_float(bits) >= dropout
    return tl.where(kept, b_x / (1.0 - dropout), 0.0)


@triton.jit
def _store_parts(p_out, b_x, part_stride, mask, FIRST: tl.constexpr, SPLIT: tl.constexpr):
    """Stores hi, and where SPLIT hi or lo (``FIRST``: which) in the second place and the other one in the third."""
    hi = b_x.to(p_out.dtype.element_ty)
    tl.store(p_out, hi, mask=mask)
    if SPLIT:
        lo = (b_x - hi.to(tl.float32)).to(p_out.dtype.element_ty)
        tl.store(p_out + part_stride, hi if FIRST == "hi" else lo, mask=mask)
        tl.store(p_out + 2 * part_stride, lo if FIRST == "hi" else hi, mask=mask)


@triton.jit
def lora_parts_kernel(
    p_x, p_out, x_stride, out_stride, part_stride, rows, cols, scale, BLOCK: tl.constexpr, SPLIT: tl.constexpr
):
    """scale * x (rows, cols) as [hi | hi | lo] along whichever dimension ``part_stride`` says."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = o_x // cols, o_x % cols
    mask = row < rows
    b_x = tl.load(p_x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32) * tl.cast(scale, tl.float32)
    _store_parts(p_out + row * out_stride + col, b_x, part_stride, mask, "hi", SPLIT)


@triton.jit(do_not_specialize=["rows"])
def lora_shrink_kernel(
    p_x,
    p_a,
    p_t,
    p_seed,
    x_stride,
    a_stride,
    t_stride,
    rows,
    width,
    rank,
    each,
    padded,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``rank`` columns of t: those of all projections, or of one where each has a mask of its own.

    Projection j has ``each`` of them; its rows of A and columns of t begin at j * ``padded``.
    """
    group = tl.program_id(0)
    o_m, o_k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    o_r = tl.arange(0, RANK)
    place = (group + o_r // each) * padded + o_r % each
    m_m, m_r = o_m < rows, o_r < rank
    p_x += o_m.to(tl.int64)[:, None] * x_stride + o_k[None, :]
    p_a += place.to(tl.int64)[None, :] * a_stride + o_k[:, None]
    b_t = tl.zeros([BLOCK_M, RANK], tl.float32)
    for k in range(0, width, BLOCK_K):
        m_k = k + o_k < width
        b_x = tl.load(p_x + k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if DROPS:
            b_x = _keep(b_x.to(tl.float32), p_seed + group, o_m, k + o_k, dropout).to(b_x.dtype)
        b_a = tl.load(p_a + k, mask=m_k[:, None] & m_r[None, :], other=0.0)
        b_t += tl.dot(b_x, b_a, input_precision=PRECISION)
        if SPLIT:
            b_lo = tl.load(p_a + 2 * each * a_stride + k, mask=m_k[:, None] & m_r[None, :], other=0.0)
            b_t += tl.dot(b_x, b_lo, input_precision=PRECISION)
    p_t += o_m.to(tl.int64)[:, None] * t_stride + place[None, :]
    _store_parts(p_t, b_t, each, m_m[:, None] & m_r[None, :], "lo", SPLIT)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def lora_grads_kernel(
    p_y,
    p_b,
    p_t,
    p_du,
    p_db,
    p_seed,
    y_stride,
    b_stride,
    t_stride,
    rows,
    cols,
    rank,
    part,
    rows_each,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    WITH_DU: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns of one block, rows of one share: partial du (column blocks, M, RANK) and db (shares, N, RANK), fp32.

    ``part``: columns from hi to lo in t; in b lo is the third part.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    o_n, o_r, o_b = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RANK), tl.arange(0, BLOCK_M)
    m_n, m_r = o_n < cols, o_r < rank
    if WITH_DU:
        p_b += o_n.to(tl.int64)[:, None] * b_stride + o_r[None, :]
        b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)
        if SPLIT:
            b_lo = tl.load(p_b + 2 * part, mask=m_n[:, None] & m_r[None, :], other=0.0)
    b_db = tl.zeros([BLOCK_N, RANK], tl.float32)
    first = share * rows_each
    end = tl.minimum(first + rows_each, rows)
    for m in range(first, end, BLOCK_M):
        o_m = m + o_b
        m_m = o_m < end
        p_row = p_y + o_m.to(tl.int64)[:, None] * y_stride + o_n[None, :]
        b_y = tl.load(p_row, mask=m_m[:, None] & m_n[None, :], other=0.0)
        p_row = p_t + o_m.to(tl.int64)[:, None] * t_stride + o_r[None, :]
        b_t = tl.load(p_row, mask=m_m[:, None] & m_r[None, :], other=0.0)
        if DROPS:
            b_y = _keep(b_y.to(tl.float32), p_seed, o_m, o_n, dropout).to(b_y.dtype)
        b_db += tl.dot(tl.trans(b_y), b_t, input_precision=PRECISION)
        if SPLIT:
            b_t = tl.load(p_row + part, mask=m_m[:, None] & m_r[None, :], other=0.0)
            b_db += tl.dot(tl.trans(b_y), b_t, input_precision=PRECISION)
        if WITH_DU:
            b_du = tl.dot(b_y, b_b, input_precision=PRECISION)
            if SPLIT:
                b_du += tl.dot(b_y, b_lo, input_precision=PRECISION)
            o_du = (block.to(tl.int64) * rows + o_m[:, None]) * RANK + o_r[None, :]
            tl.store(p_du + o_du, b_du, mask=m_m[:, None])
    o_db = (share.to(tl.int64) * cols + o_n[:, None]) * RANK + o_r[None, :]
    tl.store(p_db + o_db, b_db, mask=m_n[:, None])


@triton.jit(do_not_specialize=["rows", "parts"])
def lora_sum_kernel(
    p_parts,
    p_out,
    out_row_stride,
    out_col_stride,
    rows,
    parts,
    rank,
    part,
    scale,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out (rows, rank) = scale * the sum of ``parts`` (parts, rows, RANK), in their order; [hi | lo | hi] where SPLIT."""
    o_m, o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANK)
    m_m = o_m < rows
    o_part = o_m.to(tl.int64)[:, None] * RANK + o_r[None, :]
    total = tl.zeros([BLOCK, RANK], tl.float32)
    for _ in range(0, parts):
        total += tl.load(p_parts + o_part, mask=m_m[:, None], other=0.0)
        p_parts += rows.to(tl.int64) * RANK
    total *= tl.cast(scale, tl.float32)
    p_out += o_m.to(tl.int64)[:, None] * out_row_stride + o_r.to(tl.int64)[None, :] * out_col_stride
    _store_parts(p_out, total, part * out_col_stride, m_m[:, None] & (o_r < rank)[None, :], "lo", SPLIT)


@triton.jit(do_not_specialize=["rows"])
def lora_expand_kernel(
    p_du,
    p_a,
    p_dx,
    p_seed,
    du_stride,
    a_stride,
    dx_stride,
    rows,
    width,
    rank,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx (+)= drop'(du A), with the mask that the forward had; all parts of du and A at once."""
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k, o_r = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_m, m_k = o_m < rows, o_k < width
    b_dx = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for r in range(0, rank, BLOCK_R):
        m_r = r + o_r < rank
        p_left = p_du + o_m.to(tl.int64)[:, None] * du_stride + (r + o_r)[None, :]
        p_right = p_a + (r + o_r).to(tl.int64)[:, None] * a_stride + o_k[None, :]
        b_du = tl.load(p_left, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_a = tl.load(p_right, mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_dx += tl.dot(b_du, b_a, input_precision=PRECISION)
    b_dx = _keep(b_dx, p_seed, o_m, o_k, dropout)
    p_dx += o_m.to(tl.int64)[:, None] * dx_stride + o_k[None, :]
    mask = m_m[:, None] & m_k[None, :]
    if ADDS:
        b_dx += tl.load(p_dx, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_dx, b_dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def dora_grad_kernel(
    p_dy, p_y, p_scale, p_dz, p_sum, dy_stride, y_stride, rows, cols, rows_each, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dz = scale * dy, and for each share of rows sum(dy * y)."""
    block, share = tl.program_id(0), tl.program_id(1)
    o_n, o_b = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_n = o_n < cols
    scale = tl.load(p_scale + o_n, mask=m_n, other=1.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    first = share * rows_each
    end = tl.minimum(first + rows_each, rows)
    for m in range(first, end, BLOCK_M):
        o_m = (m + o_b).to(tl.int64)[:, None]
        mask = (m + o_b < end)[:, None] & m_n[None, :]
        dy = tl.load(p_dy + o_m * dy_stride + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y + o_m * y_stride + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dy * y, axis=0)
        tl.store(p_dz + o_m * cols + o_n[None, :], (dy * scale[None, :]).to(p_dz.dtype.element_ty), mask=mask)
    tl.store(p_sum + share.to(tl.int64) * cols + o_n, total, mask=m_n)
