"""The skinny products of low-rank adapters: each reads its large operand once.

    parts   a matrix as 16-bit parts, scaled                    (R, K) or (N, R)
    shrink  t  = drop(x) A^T                                    (M, K) -> (M, R)
    grads   du = dy B and db = dy^T t in one pass over dy       (M, N) -> (M, R), (N, R)
            with x and du for dy and t: dA^T = drop(x)^T du
    sum     adds their partial results (fp32) in a fixed order
    expand  dx = drop'(du A)                                    (M, R) -> (M, K)

fp32 adapters beside 16-bit activations stand as two 16-bit numbers, hi + lo (SPLIT), which is exact to 2^-16 (in fp16 as far
as its smallest number, 6e-8, goes): a product of two such matrices is hi hi + lo hi + hi lo. One side is laid out
[hi | lo | hi], the other [hi | hi | lo], so that one product of three times the rank gives the sum.

Dropout's mask is made anew wherever it is needed, from a counter: (seed; row, column).
"""

from m3kernels.ops._products import add_product
from m3kernels.ops._triton import tl, triton

# Philox with 7 rounds passes BigCrush (Salmon et al. 2011); torch's has 10
ROUNDS = tl.constexpr(7)


@triton.jit
def _keep(b_x, p_seed, o_row, o_col, dropout):
    """``b_x`` where the counter's number is at least ``dropout``, else 0; sums of it are to be scaled by 1 / (1 - dropout)."""
    zero = tl.zeros(b_x.shape, tl.uint32)
    row, col = zero + o_row[:, None].to(tl.uint32), zero + o_col[None, :].to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.load(p_seed), col, row, zero, zero, ROUNDS)
    kept = tl.uint_to_uniform_float(bits) >= dropout
    return tl.where(kept, b_x, tl.zeros(b_x.shape, b_x.dtype))


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
def _one_of(which, first, second, third):
    """A number of projection ``which``."""
    return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit
def _pointer_of(which, p_first, p_second, p_third):
    if which == 1:
        p_first = p_second
    elif which == 2:
        p_first = p_third
    return p_first


@triton.jit
def lora_parts_kernel(
    p_a1,
    p_a2,
    p_a3,
    p_b1,
    p_b2,
    p_b3,
    p_scale,
    p_a,
    p_low,
    s1,
    s2,
    s3,
    n1,
    n2,
    n3,
    width,
    rank,
    padded,
    a_blocks,
    count,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A of all projections as [hi ; hi ; lo], rows from j * ``padded`` on, and s B (times a scale of each row) as [hi | hi | lo].

    The first ``a_blocks`` blocks of each projection are A's; B's rows follow each other.
    """
    index = tl.program_id(0)
    if index < a_blocks * count:
        of = index // a_blocks
        o_a = (index % a_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_a = o_a < rank * width
        b_a = tl.load(_pointer_of(of, p_a1, p_a2, p_a3) + o_a, mask=m_a, other=0.0).to(tl.float32)
        _store_parts(p_a + of.to(tl.int64) * padded * width + o_a, b_a, rank * width, m_a, "hi", SPLIT)
    else:
        o_b = (index - a_blocks * count).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        row, col = o_b // rank, o_b % rank
        m_b = row < n1 + n2 + n3
        which = (row >= n1).to(tl.int32) + (row >= n1 + n2)
        inside = (row - _one_of(which, 0, n1, n1 + n2)) * rank + col
        b_b = tl.load(p_b1 + inside, mask=m_b & (which == 0), other=0.0).to(tl.float32)
        b_b += tl.load(p_b2 + inside, mask=m_b & (which == 1), other=0.0).to(tl.float32)
        b_b += tl.load(p_b3 + inside, mask=m_b & (which == 2), other=0.0).to(tl.float32)
        b_b *= _one_of(which, tl.cast(s1, tl.float32), tl.cast(s2, tl.float32), tl.cast(s3, tl.float32))
        if SCALED:
            b_b *= tl.load(p_scale + row, mask=m_b, other=0.0)
        _store_parts(p_low + row * padded + col, b_b, rank, m_b, "hi", SPLIT)


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
            b_x = _keep(b_x, p_seed + group, o_m, k + o_k, dropout)
        b_a = tl.load(p_a + k, mask=m_k[:, None] & m_r[None, :], other=0.0)
        b_t = add_product(b_t, b_x, b_a, PRECISION)
        if SPLIT:
            b_lo = tl.load(p_a + 2 * each * a_stride + k, mask=m_k[:, None] & m_r[None, :], other=0.0)
            b_t = add_product(b_t, b_x, b_lo, PRECISION)
    if DROPS:
        b_t /= 1.0 - dropout
    p_t += o_m.to(tl.int64)[:, None] * t_stride + place[None, :]
    _store_parts(p_t, b_t, each, m_m[:, None] & m_r[None, :], "lo", SPLIT)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def lora_grads_kernel(
    p_y1,
    p_y2,
    p_y3,
    p_low,
    p_t,
    p_du,
    p_db,
    p_seed,
    n1,
    n2,
    n3,
    rows,
    low_stride,
    t_stride,
    padded,
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
    """Columns of one block of one projection, rows of one share: partial du (blocks, M, RANK), db (shares, N of all, RANK).

    ``part``: columns from hi to lo in t; in low, lo is the third part.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    first1, first2 = tl.cdiv(n1, BLOCK_N), tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N)
    which = (block >= first1).to(tl.int32) + (block >= first2)
    cols, before = _one_of(which, n1, n2, n3), _one_of(which, 0, n1, n1 + n2)
    p_y, inside = _pointer_of(which, p_y1, p_y2, p_y3), block - _one_of(which, 0, first1, first2)
    o_n, o_r, o_b = inside * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RANK), tl.arange(0, BLOCK_M)
    m_n, m_r = o_n < cols, o_r < rank
    p_t += which * padded
    if WITH_DU:
        p_low += (before + o_n).to(tl.int64)[:, None] * low_stride + o_r[None, :]
        b_b = tl.load(p_low, mask=m_n[:, None] & m_r[None, :], other=0.0)
        if SPLIT:
            b_lo = tl.load(p_low + 2 * part, mask=m_n[:, None] & m_r[None, :], other=0.0)
    o_tile = o_b[:, None] * cols + o_n[None, :]
    b_db = tl.zeros([BLOCK_N, RANK], tl.float32)
    first = share * rows_each
    end = tl.minimum(first + rows_each, rows)
    for m in range(first, end, BLOCK_M):
        o_m = m + o_b
        m_m = o_m < end
        o_y, mask = tl.cast(m, tl.int64) * cols, m_m[:, None] & m_n[None, :]
        b_y = tl.load(p_y + o_y + o_tile, mask=mask, other=0.0)
        p_row = p_t + o_m.to(tl.int64)[:, None] * t_stride + o_r[None, :]
        b_t = tl.load(p_row, mask=m_m[:, None] & m_r[None, :], other=0.0)
        if DROPS:
            b_y = _keep(b_y, p_seed, o_m, o_n, dropout)
        b_db = add_product(b_db, tl.trans(b_y), b_t, PRECISION)
        if SPLIT:
            b_t = tl.load(p_row + part, mask=m_m[:, None] & m_r[None, :], other=0.0)
            b_db = add_product(b_db, tl.trans(b_y), b_t, PRECISION)
        if WITH_DU:
            b_du = tl.dot(b_y, b_b, input_precision=PRECISION)
            if SPLIT:
                b_du += tl.dot(b_y, b_lo, input_precision=PRECISION)
            o_du = (block.to(tl.int64) * rows + o_m[:, None]) * RANK + o_r[None, :]
            tl.store(p_du + o_du, b_du, mask=m_m[:, None])
    o_db = (share.to(tl.int64) * (n1 + n2 + n3) + before + o_n[:, None]) * RANK + o_r[None, :]
    tl.store(p_db + o_db, b_db, mask=m_n[:, None])


@triton.jit
def _add_up(p_parts, o_m, o_r, rows, first, end, BLOCK: tl.constexpr, RANK: tl.constexpr):
    """The sum over parts ``first`` to ``end`` of (parts, rows, RANK), in their order."""
    total = tl.zeros([BLOCK, RANK], tl.float32)
    p_parts += (first * rows).to(tl.int64) * RANK + o_m.to(tl.int64)[:, None] * RANK + o_r[None, :]
    for _ in range(first, end):
        total += tl.load(p_parts, mask=(o_m < rows)[:, None], other=0.0)
        p_parts += rows.to(tl.int64) * RANK
    return total


@triton.jit(do_not_specialize=["rows", "shares"])
def lora_sum_kernel(
    p_part_du,
    p_part_db,
    p_du,
    p_db,
    p_scale,
    s1,
    s2,
    s3,
    n1,
    n2,
    n3,
    rows,
    du_stride,
    db_row_stride,
    db_col_stride,
    padded,
    rank,
    part,
    shares,
    du_programs,
    count,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """du of each projection, as [hi | lo | hi] where SPLIT, and db = s * sum (times a scale of each row), one below another."""
    index, o_r = tl.program_id(0), tl.arange(0, RANK)
    m_r = (o_r < rank)[None, :]
    if index < du_programs * count:
        of = index // du_programs
        o_m = (index % du_programs) * BLOCK + tl.arange(0, BLOCK)
        first1, first2 = tl.cdiv(n1, BLOCK_N), tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N)
        last = first2 + tl.cdiv(n3, BLOCK_N)
        first, end = _one_of(of, 0, first1, first2), _one_of(of, first1, first2, last)
        b_du = _add_up(p_part_du, o_m, o_r, rows, first, end, BLOCK, RANK)
        p_out = p_du + o_m.to(tl.int64)[:, None] * du_stride + of * padded + o_r[None, :]
        _store_parts(p_out, b_du, part, (o_m < rows)[:, None] & m_r, "lo", SPLIT)
    else:
        o_n, n = (index - du_programs * count) * BLOCK + tl.arange(0, BLOCK), n1 + n2 + n3
        b_db = _add_up(p_part_db, o_n, o_r, n, n * 0, shares, BLOCK, RANK)
        which = (o_n >= n1).to(tl.int32) + (o_n >= n1 + n2)
        factor = _one_of(which, tl.cast(s1, tl.float32), tl.cast(s2, tl.float32), tl.cast(s3, tl.float32))
        if SCALED:
            factor *= tl.load(p_scale + o_n, mask=o_n < n, other=0.0)
        b_db *= factor[:, None]
        o_out = o_n.to(tl.int64)[:, None] * db_row_stride + o_r.to(tl.int64)[None, :] * db_col_stride
        tl.store(p_db + o_out, b_db.to(p_db.dtype.element_ty), mask=(o_n < n)[:, None] & m_r)


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
        b_dx = add_product(b_dx, b_du, b_a, PRECISION)
    b_dx = _keep(b_dx / (1.0 - dropout), p_seed, o_m, o_k, dropout)
    p_dx += o_m.to(tl.int64)[:, None] * dx_stride + o_k[None, :]
    mask = m_m[:, None] & m_k[None, :]
    if ADDS:
        b_dx += tl.load(p_dx, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_dx, b_dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def dora_grad_kernel(
    p_dy, p_y, p_scale, p_dz, p_sum, dy_stride, y_stride, rows, cols, rows_each, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """dz = scale * dy, and for each share of rows sum(dy * y).

    In the pass of lora_grads_kernel it was slower, 624 us for 507 (8192 x 18,432, H100): its loads can then not run ahead.
    """
    block, share = tl.program_id(0), tl.program_id(1)
    o_n, o_b = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_n = o_n < cols
    scale = tl.load(p_scale + o_n, mask=m_n, other=1.0)
    # by elements: a sum over rows in every step would make the warps wait for each other
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = share * rows_each
    end = tl.minimum(first + rows_each, rows)
    for m in range(first, end, BLOCK_M):
        o_m = (m + o_b).to(tl.int64)[:, None]
        mask = (m + o_b < end)[:, None] & m_n[None, :]
        dy = tl.load(p_dy + o_m * dy_stride + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y + o_m * y_stride + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
        total += dy * y
        tl.store(p_dz + o_m * cols + o_n[None, :], (dy * scale[None, :]).to(p_dz.dtype.element_ty), mask=mask)
    tl.store(p_sum + share.to(tl.int64) * cols + o_n, tl.sum(total, axis=0), mask=m_n)
