"""The skinny products of low-rank adapters: two passes over the large operands.

    shrink   t_j = drop_j(x) A_j^T, or du_j = s_j (k_j dy_j) B_j        a block of rows and all columns in a program
    outer    dB_j = s_j k_j dy_j^T t_j,  dA_j = du_j^T drop_j(x)        a block of columns and a share of rows in a program
    expand   dx (+)= drop_j'(du_j A_j)                                  where dropout keeps it out of the product

fp32 adapters beside 16-bit activations are taken as two 16-bit numbers, hi + lo (SPLIT), which is exact to 2^-16 (in fp16 as far
as its smallest number, 6e-8, goes): a product of two such matrices is hi hi + lo hi + hi lo. For the frozen product, which
adds t_j (s_j B_j)^T, one side is written [hi | lo | hi] and the other [hi | hi | lo]: three times the rank gives the sum.

Dropout's mask is made anew wherever it is needed, from a counter: (seed; row, column).
"""

from m3kernels.ops._products import add_product
from m3kernels.ops._triton import tl, triton

# Philox with 7 rounds passes BigCrush (Salmon et al. 2011); torch's has 10
ROUNDS = tl.constexpr(7)
PARTS_BLOCK = tl.constexpr(1024)
# a magnitude of 0 gets this scale: its gradient is taken from y / scale
SMALLEST = tl.constexpr(1e-20)


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
def _write_parts(
    program, p_1, p_2, p_3, p_parts, length1, length2, length3, base1, base2, base3, factor1, factor2, factor3, inner, outer,
    part, SPLIT: tl.constexpr,
):  # fmt: skip
    """Matrices of ``length`` elements, times a factor, to ``base`` of ``p_parts`` as [hi, hi, lo], ``part`` elements apart.

    ``inner`` elements of each ``outer`` are written.
    """
    blocks1, blocks2 = tl.cdiv(length1, PARTS_BLOCK), tl.cdiv(length1, PARTS_BLOCK) + tl.cdiv(length2, PARTS_BLOCK)
    which = (program >= blocks1).to(tl.int32) + (program >= blocks2)
    o = (program - _one_of(which, 0, blocks1, blocks2)) * PARTS_BLOCK + tl.arange(0, PARTS_BLOCK)
    mask = o < _one_of(which, length1, length2, length3)
    b_x = tl.load(_pointer_of(which, p_1, p_2, p_3) + o, mask=mask, other=0.0).to(tl.float32)
    b_x *= _one_of(which, tl.cast(factor1, tl.float32), tl.cast(factor2, tl.float32), tl.cast(factor3, tl.float32))
    o_parts = _one_of(which, base1, base2, base3) + (o // inner).to(tl.int64) * outer + o % inner
    _store_parts(p_parts + o_parts, b_x, part, mask, "hi", SPLIT)


@triton.jit
def _add_small(
    b_sum, b_x, p_small, p_scale, mask, m_k, SPLIT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr
):
    """``b_sum + b_x small``, a tile (columns of x, rank) of A^T or B; its rows times ``p_scale`` where SCALED."""
    b_small = tl.load(p_small, mask=mask, other=0.0)
    if SCALED:
        b_small = b_small.to(tl.float32) * tl.load(p_scale, mask=m_k, other=0.0)[:, None]
    hi = b_small.to(b_x.dtype)
    b_sum = add_product(b_sum, b_x, hi, PRECISION)
    if SPLIT:
        lo = (b_small - hi.to(tl.float32)).to(b_x.dtype)
        b_sum = add_product(b_sum, b_x, lo, PRECISION)
    return b_sum


@triton.jit
def _shrink_one(
    p_x, x_stride, p_small, small_row, small_col, p_scale, p_seed, width, rows, rank, row, first_rank, dropout,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of x times one small matrix."""
    o_m, o_k, o_r = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), first_rank + tl.arange(0, RANK)
    m_m, m_r = o_m < rows, o_r < rank
    p_x += o_m.to(tl.int64)[:, None] * x_stride + o_k[None, :]
    p_small += o_k.to(tl.int64)[:, None] * small_row + o_r.to(tl.int64)[None, :] * small_col
    b_sum = tl.zeros([BLOCK_M, RANK], tl.float32)
    for k in range(0, width, BLOCK_K):
        m_k = k + o_k < width
        b_x = tl.load(p_x + k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        if DROPS:
            b_x = _keep(b_x, p_seed, o_m, k + o_k, dropout)
        mask, p_tile = m_k[:, None] & m_r[None, :], p_small + tl.cast(k, tl.int64) * small_row
        b_sum = _add_small(b_sum, b_x, p_tile, p_scale + k + o_k, mask, m_k, SPLIT, SCALED, PRECISION)
    return b_sum


@triton.jit
def _shrink_shared(
    p_x, x_stride, p_1, p_2, p_3, small_row, small_col, width, rows, rank, row, first_rank,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of several small matrices: x is read once."""
    o_m, o_k, o_r = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), first_rank + tl.arange(0, RANK)
    m_m, m_r = o_m < rows, o_r < rank
    p_x += o_m.to(tl.int64)[:, None] * x_stride + o_k[None, :]
    o_small = o_k.to(tl.int64)[:, None] * small_row + o_r.to(tl.int64)[None, :] * small_col
    b_1, b_2 = tl.zeros([BLOCK_M, RANK], tl.float32), tl.zeros([BLOCK_M, RANK], tl.float32)
    b_3 = tl.zeros([BLOCK_M, RANK], tl.float32)
    for k in range(0, width, BLOCK_K):
        m_k = k + o_k < width
        mask, o_tile = m_k[:, None] & m_r[None, :], tl.cast(k, tl.int64) * small_row + o_small
        b_x = tl.load(p_x + k, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_1 = _add_small(b_1, b_x, p_1 + o_tile, p_1, mask, m_k, SPLIT, False, PRECISION)
        b_2 = _add_small(b_2, b_x, p_2 + o_tile, p_2, mask, m_k, SPLIT, False, PRECISION)
        if COUNT > 2:
            b_3 = _add_small(b_3, b_x, p_3 + o_tile, p_3, mask, m_k, SPLIT, False, PRECISION)
    return b_1, b_2, b_3


@triton.jit
def _clear(p_arrived, arrivals):
    for first in range(0, arrivals, PARTS_BLOCK):
        o_arrived = first + tl.arange(0, PARTS_BLOCK)
        tl.store(p_arrived + o_arrived, tl.zeros([PARTS_BLOCK], tl.int32), mask=o_arrived < arrivals)


@triton.jit(do_not_specialize=["rows", "out_each"])
def lora_shrink_kernel(
    p_x1, p_x2, p_x3, p_small1, p_small2, p_small3, p_other1, p_other2, p_other3, p_scale, p_out, p_parts, p_seed, p_arrived,
    x_stride1, x_stride2, x_stride3, width1, width2, width3, factor1, factor2, factor3, rows, rank, small_row, small_col, dropout,
    out_stride, out_each, length1, length2, length3, base1, base2, base3, other1, other2, other3,
    inner, outer, part, parts_programs, row_blocks, arrivals,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, SHARED: tl.constexpr,
    SPLIT: tl.constexpr, SCALED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out_j = factor_j x_j small_j as [hi | lo | hi], and the other adapter matrices as the product takes them.

    ``small``: (columns of x, rank) by strides. ``SHARED``: all x are one. out_j begins at j * ``out_each``. The first
    ``parts_programs`` programs write the parts. ``p_arrived``: counters of the outer pass, set to zero.
    """
    if OVERLAP:
        # the product needs none of this before the end of its first tile
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program == 0:
        _clear(p_arrived, arrivals)
    if program < parts_programs:
        _write_parts(
            program, p_other1, p_other2, p_other3, p_parts, length1, length2, length3, base1, base2, base3, other1, other2,
            other3, inner, outer, part, SPLIT,
        )  # fmt: skip
    else:
        first_rank = tl.program_id(1) * RANK
        o_r = first_rank + tl.arange(0, RANK)
        for block in range(program - parts_programs, row_blocks, tl.num_programs(0) - parts_programs):
            row = block * BLOCK_M
            o_m = row + tl.arange(0, BLOCK_M)
            mask = (o_m < rows)[:, None] & (o_r < rank)[None, :]
            p_row = p_out + o_m.to(tl.int64)[:, None] * out_stride + o_r[None, :]
            if SHARED:
                b_1, b_2, b_3 = _shrink_shared(
                    p_x1, x_stride1, p_small1, p_small2, p_small3, small_row, small_col, width1, rows, rank, row, first_rank,
                    BLOCK_M, BLOCK_K, RANK, COUNT, SPLIT, PRECISION,
                )  # fmt: skip
                _store_parts(p_row, b_1 * factor1, rank, mask, "lo", SPLIT)
                _store_parts(p_row + out_each, b_2 * factor2, rank, mask, "lo", SPLIT)
                if COUNT > 2:
                    _store_parts(p_row + 2 * tl.cast(out_each, tl.int64), b_3 * factor3, rank, mask, "lo", SPLIT)
            else:
                b_1 = _shrink_one(
                    p_x1, x_stride1, p_small1, small_row, small_col, p_scale, p_seed, width1, rows, rank, row, first_rank,
                    dropout, BLOCK_M, BLOCK_K, RANK, SPLIT, SCALED, DROPS, PRECISION,
                )  # fmt: skip
                _store_parts(p_row, b_1 * factor1, rank, mask, "lo", SPLIT)
                if COUNT > 1:
                    b_2 = _shrink_one(
                        p_x2, x_stride2, p_small2, small_row, small_col, p_scale + width1, p_seed + 1, width2, rows, rank, row,
                        first_rank, dropout, BLOCK_M, BLOCK_K, RANK, SPLIT, SCALED, DROPS, PRECISION,
                    )  # fmt: skip
                    _store_parts(p_row + out_each, b_2 * factor2, rank, mask, "lo", SPLIT)
                if COUNT > 2:
                    b_3 = _shrink_one(
                        p_x3, x_stride3, p_small3, small_row, small_col, p_scale + width1 + width2, p_seed + 2, width3, rows,
                        rank, row, first_rank, dropout, BLOCK_M, BLOCK_K, RANK, SPLIT, SCALED, DROPS, PRECISION,
                    )  # fmt: skip
                    _store_parts(p_row + 2 * tl.cast(out_each, tl.int64), b_3 * factor3, rank, mask, "lo", SPLIT)


@triton.jit
def _outer_one(
    p_y, y_stride, p_t, t_stride, part, p_seed, dropout, first, end, cols, rank, o_n, first_rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(columns of y, rank): y^T t over rows ``first`` to ``end``."""
    o_b, o_r = tl.arange(0, BLOCK_M), first_rank + tl.arange(0, RANK)
    m_n, m_r = o_n < cols, o_r < rank
    o_y, o_t = o_b.to(tl.int64)[:, None] * y_stride, o_b.to(tl.int64)[:, None] * t_stride
    b_sum = tl.zeros([BLOCK_N, RANK], tl.float32)
    for m in range(first, end, BLOCK_M):
        m_m, at = m + o_b < end, tl.cast(m, tl.int64)
        m_t = m_m[:, None] & m_r[None, :]
        b_y = tl.load(p_y + at * y_stride + (o_y + o_n[None, :]), mask=m_m[:, None] & m_n[None, :], other=0.0)
        if DROPS:
            b_y = _keep(b_y, p_seed, m + o_b, o_n, dropout)
        p_row = p_t + at * t_stride + (o_t + o_r[None, :])
        b_sum = add_product(b_sum, tl.trans(b_y), tl.load(p_row, mask=m_t, other=0.0), PRECISION)
        if SPLIT:
            b_sum = add_product(b_sum, tl.trans(b_y), tl.load(p_row + part, mask=m_t, other=0.0), PRECISION)
    return b_sum


@triton.jit
def _outer_shared(
    p_x, x_stride, p_u, u_stride, u_each, part, first, end, cols, rank, o_n, first_rank,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with several t: x is read once."""
    o_b, o_r = tl.arange(0, BLOCK_M), first_rank + tl.arange(0, RANK)
    m_n, m_r = o_n < cols, o_r < rank
    o_x, o_u = o_b.to(tl.int64)[:, None] * x_stride, o_b.to(tl.int64)[:, None] * u_stride
    b_1, b_2 = tl.zeros([BLOCK_N, RANK], tl.float32), tl.zeros([BLOCK_N, RANK], tl.float32)
    b_3 = tl.zeros([BLOCK_N, RANK], tl.float32)
    for m in range(first, end, BLOCK_M):
        m_m, at = m + o_b < end, tl.cast(m, tl.int64)
        b_x = tl.load(p_x + at * x_stride + (o_x + o_n[None, :]), mask=m_m[:, None] & m_n[None, :], other=0.0)
        p_row, m_u = p_u + at * u_stride + (o_u + o_r[None, :]), m_m[:, None] & m_r[None, :]
        b_1 = add_product(b_1, tl.trans(b_x), tl.load(p_row, mask=m_u, other=0.0), PRECISION)
        b_2 = add_product(b_2, tl.trans(b_x), tl.load(p_row + u_each, mask=m_u, other=0.0), PRECISION)
        if COUNT > 2:
            b_3 = add_product(b_3, tl.trans(b_x), tl.load(p_row + 2 * u_each, mask=m_u, other=0.0), PRECISION)
        if SPLIT:
            p_row += part
            b_1 = add_product(b_1, tl.trans(b_x), tl.load(p_row, mask=m_u, other=0.0), PRECISION)
            b_2 = add_product(b_2, tl.trans(b_x), tl.load(p_row + u_each, mask=m_u, other=0.0), PRECISION)
            if COUNT > 2:
                b_3 = add_product(b_3, tl.trans(b_x), tl.load(p_row + 2 * u_each, mask=m_u, other=0.0), PRECISION)
    return b_1, b_2, b_3


@triton.jit
def _arrive_last(p_arrived, shares):
    """Whether all other shares of this sum have stored theirs."""
    tl.debug_barrier()
    return tl.atomic_add(p_arrived, 1, sem="acq_rel") == shares - 1


@triton.jit
def _add_up(p_slab, o_sum, slab_stride, shares):
    """The sum over shares, in their order."""
    total = tl.load(p_slab + o_sum, cache_modifier=".cg")
    for share in range(1, shares):
        total += tl.load(p_slab + share * slab_stride + o_sum, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["rows", "rows_each", "shares", "t_each", "done", "tiles"])
def lora_outer_kernel(
    p_y1, p_y2, p_y3, p_x, p_t, p_u, p_db, p_da, p_slabs, p_arrived, p_scale, p_seed, p_work,
    n1, n2, n3, width, x_stride, rows, rows_each, rank, t_stride, t_each, u_stride, u_each, part, s1, s2, s3, dropout, y_blocks,
    shares, done, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, SPLIT: tl.constexpr,
    SCALED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr, WITH_Y: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dB of all (N of all, rank), times a scale of each row where SCALED, and dA (count, rank, width).

    A program takes a block of columns, of a gradient y_j (rows n_j wide) in the first ``y_blocks``, else of x, and a share of the
    rows. The last of its shares to come adds them up. ``part``: columns from hi to lo in t and u.
    """
    block, share, first_rank = tl.program_id(0), tl.program_id(1), tl.program_id(2) * RANK
    first = share * rows_each
    end = tl.minimum(first + rows_each, rows)
    o_b, o_r = tl.arange(0, BLOCK_N), first_rank + tl.arange(0, RANK)
    o_sum = o_b[:, None] * RANK + tl.arange(0, RANK)[None, :]
    slab: tl.constexpr = BLOCK_N * RANK * COUNT
    place = tl.program_id(2) * tl.num_programs(0) + block
    p_slab = p_slabs + (place * shares).to(tl.int64) * slab
    p_own, p_arrived = p_slab + share * slab, p_arrived + place
    if OVERLAP:
        if done > 0:
            # the kernel before the product may still write u
            written = 0
            while written < done:
                written = 0
                for tile in range(0, tiles, PARTS_BLOCK):
                    o_tile = tile + tl.arange(0, PARTS_BLOCK)
                    written += tl.sum(tl.load(p_work + 1 + o_tile, mask=o_tile < tiles, other=0, volatile=True))
            tl.atomic_add(p_work, 0, sem="acquire")
            tl.debug_barrier()
    if WITH_Y and block < y_blocks:
        blocks1, blocks2 = tl.cdiv(n1, BLOCK_N), tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N)
        which = (block >= blocks1).to(tl.int32) + (block >= blocks2)
        o_n = (block - _one_of(which, 0, blocks1, blocks2)) * BLOCK_N + o_b
        cols, before = _one_of(which, n1, n2, n3), _one_of(which, 0, n1, n1 + n2)
        b_db = _outer_one(
            _pointer_of(which, p_y1, p_y2, p_y3), cols, p_t + which.to(tl.int64) * t_each, t_stride, part, p_seed, dropout,
            first, end, cols, rank, o_n, first_rank, BLOCK_M, BLOCK_N, RANK, SPLIT, False, PRECISION,
        )  # fmt: skip
        tl.store(p_own + o_sum, b_db)
        if _arrive_last(p_arrived, shares):
            db = _add_up(p_slab, o_sum, slab, shares)
            db *= _one_of(which, tl.cast(s1, tl.float32), tl.cast(s2, tl.float32), tl.cast(s3, tl.float32))
            if SCALED:
                db *= tl.load(p_scale + before + o_n, mask=o_n < cols, other=1.0)[:, None]
            o_db = (before + o_n).to(tl.int64)[:, None] * rank + o_r[None, :]
            tl.store(p_db + o_db, db.to(p_db.dtype.element_ty), mask=(o_n < cols)[:, None] & (o_r < rank)[None, :])
    else:
        o_n = (block - y_blocks) * BLOCK_N + o_b
        if COUNT > 1 and not DROPS:
            b_1, b_2, b_3 = _outer_shared(
                p_x, x_stride, p_u, u_stride, u_each, part, first, end, width, rank, o_n, first_rank,
                BLOCK_M, BLOCK_N, RANK, COUNT, SPLIT, PRECISION,
            )  # fmt: skip
            tl.store(p_own + o_sum, b_1)
            tl.store(p_own + BLOCK_N * RANK + o_sum, b_2)
            if COUNT > 2:
                tl.store(p_own + 2 * BLOCK_N * RANK + o_sum, b_3)
        else:
            for j in tl.static_range(COUNT):
                b_da = _outer_one(
                    p_x, x_stride, p_u + j * u_each, u_stride, part, p_seed + j, dropout, first, end, width, rank, o_n,
                    first_rank, BLOCK_M, BLOCK_N, RANK, SPLIT, DROPS, PRECISION,
                )  # fmt: skip
                tl.store(p_own + j * BLOCK_N * RANK + o_sum, b_da)
        if _arrive_last(p_arrived, shares):
            o_da = o_r.to(tl.int64)[None, :] * width + o_n[:, None]
            mask = (o_n < width)[:, None] & (o_r < rank)[None, :]
            for j in tl.static_range(COUNT):
                da = _add_up(p_slab, j * BLOCK_N * RANK + o_sum, slab, shares) / (1.0 - dropout)
                tl.store(p_da + tl.cast(j * rank, tl.int64) * width + o_da, da.to(p_da.dtype.element_ty), mask=mask)
    if OVERLAP:
        # what follows may not begin before the product has ended
        tl.extra.cuda.gdc_wait()


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
