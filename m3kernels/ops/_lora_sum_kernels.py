"""What goes with the passes over the large operands: parts of A and B, DoRA's k dy.

parts    A as rows [hi ; lo], s B as [hi | hi | lo]
dora     dz = k dy and dm, from sum(dy * y)
"""

from m3kernels.ops._lora_kernels import PARTS_BLOCK, _arrive_last, _clear, _one_of, _pointer_of, _write_parts
from m3kernels.ops._triton import tl, triton

SHARES_AT_ONCE = tl.constexpr(16)


@triton.jit(do_not_specialize=["high", "works"])
def lora_parts_kernel(
    p_a1, p_a2, p_a3, p_b1, p_b2, p_b3, p_a, p_low, p_work, s1, s2, s3, n1, n2, n3, width, rank, padded, high, a_programs, works,
    SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A of all as rows [hi ; lo] (lo from row ``high`` on), s B of all as [hi | hi | lo].

    ``p_work``: what the kernels after this one count by, set to zero.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    program, length = tl.program_id(0), rank * width
    if program == 0:
        _clear(p_work, works)
    if program < a_programs:
        each = tl.cdiv(length, PARTS_BLOCK)
        which = program // each
        o = program % each * PARTS_BLOCK + tl.arange(0, PARTS_BLOCK)
        b_a = tl.load(_pointer_of(which, p_a1, p_a2, p_a3) + o, mask=o < length, other=0.0).to(tl.float32)
        hi = b_a.to(p_a.dtype.element_ty)
        o_a = which.to(tl.int64) * length + o
        tl.store(p_a + o_a, hi, mask=o < length)
        if SPLIT:
            tl.store(p_a + high.to(tl.int64) * width + o_a, (b_a - hi.to(tl.float32)).to(hi.dtype), mask=o < length)
    else:
        _write_parts(
            program - a_programs, p_b1, p_b2, p_b3, p_low, n1 * rank, n2 * rank, n3 * rank, 0, n1 * padded, (n1 + n2) * padded,
            s1, s2, s3, rank, padded, rank, SPLIT,
        )  # fmt: skip


@triton.jit
def _sum_of_shares(p_sum, o_n, m_n, stride, shares):
    """Columns of a sum in shares, each ``stride`` numbers long, in their order."""
    total, o_s = tl.zeros([o_n.shape[0]], tl.float32), tl.arange(0, SHARES_AT_ONCE)
    for first in range(0, shares, SHARES_AT_ONCE):
        mask = (first + o_s < shares)[:, None] & m_n[None, :]
        o_sum = (first + o_s)[:, None].to(tl.int64) * stride + o_n[None, :]
        total += tl.sum(tl.load(p_sum + o_sum, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    return total


@triton.jit(do_not_specialize=["rows"])
def dora_grad_kernel(
    p_dy1, p_dy2, p_dy3, p_y1, p_y2, p_y3, p_norm, p_scale, p_dz1, p_dz2, p_dz3, p_sum, p_dm, p_arrived,
    n1, n2, n3, dy_stride1, dy_stride2, dy_stride3, y_stride1, y_stride2, y_stride3, second, third, rows, rows_each, shares,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_SCALE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """dz_j = scale_j * dy_j, and dm_j = the sum over rows of dy_j * y_j, / norm, and / scale where BY_SCALE.

    ``second``, ``third``: first blocks of those. The last share of the rows to come adds up all. ``p_arrived``: a zero for each
    block. By the product on its way to the tensor cores, dy took a quarter of the product's time (docs/adapters.md).
    """
    if OVERLAP:
        # the kernel before this one cleared the counters; what it reads may be this one's memory
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block, share = tl.program_id(0), tl.program_id(1)
    which = (block >= second).to(tl.int32) + (block >= third)
    cols, before = _one_of(which, n1, n2, n3), _one_of(which, 0, n1, n1 + n2)
    o_n = (block - _one_of(which, 0, second, third)) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_b, m_n = tl.arange(0, BLOCK_M), o_n < cols
    p_dy, p_y, p_dz = (
        _pointer_of(which, p_dy1, p_dy2, p_dy3),
        _pointer_of(which, p_y1, p_y2, p_y3),
        _pointer_of(which, p_dz1, p_dz2, p_dz3),
    )
    dy_stride, y_stride = (
        _one_of(which, dy_stride1, dy_stride2, dy_stride3),
        _one_of(which, y_stride1, y_stride2, y_stride3),
    )
    scale = tl.load(p_scale + before + o_n, mask=m_n, other=1.0)
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
    o_all, n_all = before + o_n, n1 + n2 + n3
    tl.store(p_sum + share.to(tl.int64) * n_all + o_all, tl.sum(total, axis=0), mask=m_n)
    if _arrive_last(p_arrived + block, shares):
        by = tl.load(p_norm + o_all, mask=m_n, other=1.0)
        if BY_SCALE:
            by *= scale
        dm = _sum_of_shares(p_sum, o_all, m_n, n_all, shares) / by
        tl.store(p_dm + o_all, dm.to(p_dm.dtype.element_ty), mask=m_n)
