"""The norms and scales of DoRA's rows, of several layers of one input at once: the formula is in dora_linear.py."""

from functools import lru_cache

import torch
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._common import cdiv, sm_count
from m3kernels.ops._lora_kernels import SMALLEST, _arrive_last, _one_of, _pointer_of
from m3kernels.ops._lora_sum_kernels import _sum_of_shares
from m3kernels.ops._prepared import KEPT, Prepared
from m3kernels.ops._products import add_product
from m3kernels.ops._triton import tl, triton

BLOCK_N, BLOCK_K = 32, 128
STAGES = 3
PROGRAMS = 4  # for each multiprocessor


@triton.jit
def _add_low(merged, p_w, p_a, p_b, m_n, m_k, m_r, scaling, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``merged`` + s B A, some columns of B."""
    b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32) * scaling
    b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
    hi_b, hi_a = b_b.to(p_w.dtype.element_ty), b_a.to(p_w.dtype.element_ty)
    merged = add_product(merged, hi_b, hi_a, PRECISION)
    if SPLIT:
        lo_b, lo_a = (b_b - hi_b.to(tl.float32)).to(hi_b.dtype), (b_a - hi_a.to(tl.float32)).to(hi_a.dtype)
        merged = add_product(merged, hi_b, lo_a, PRECISION)
        merged = add_product(merged, lo_b, hi_a, PRECISION)
    return merged


@triton.jit
def dora_norm_kernel(
    p_w1, p_w2, p_w3, p_a1, p_a2, p_a3, p_b1, p_b2, p_b3, p_m1, p_m2, p_m3, p_squares, p_norm, p_scale, p_arrived,
    s1, s2, s3, n1, n2, n3, width, rank, width_each, shares,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, AT_ONCE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows of one block, one share of the columns: a tile of W + s B A at a time, in registers, squared and added up.

    The last share to come makes the norms and the scales. ``p_arrived``: a zero for each block.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    first1, first2 = tl.cdiv(n1, BLOCK_N), tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N)
    which = (block >= first1).to(tl.int32) + (block >= first2)
    o_n = (block - _one_of(which, 0, first1, first2)) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, before = _one_of(which, n1, n2, n3), _one_of(which, 0, n1, n1 + n2)
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_n = o_n < rows
    p_w = _pointer_of(which, p_w1, p_w2, p_w3) + o_n.to(tl.int64)[:, None] * width + o_k[None, :]
    p_a = _pointer_of(which, p_a1, p_a2, p_a3) + (o_r.to(tl.int64)[:, None] * width + o_k[None, :])
    p_b = _pointer_of(which, p_b1, p_b2, p_b3) + (o_n.to(tl.int64)[:, None] * rank + o_r[None, :])
    scaling = _one_of(which, tl.cast(s1, tl.float32), tl.cast(s2, tl.float32), tl.cast(s3, tl.float32))
    # by elements: a sum in every step would make the warps wait for each other
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first = tl.program_id(1) * width_each
    end = tl.minimum(first + width_each, width)
    # all loads run ahead, not the products' alone
    for k in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        m_k = k + o_k < end
        merged = tl.load(p_w + k, mask=m_n[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        # loads run ahead of an innermost loop alone
        if AT_ONCE:
            merged = _add_low(merged, p_w, p_a + k, p_b, m_n, m_k, o_r < rank, scaling, SPLIT, PRECISION)
        else:
            for r in range(0, rank, BLOCK_R):
                merged = _add_low(
                    merged, p_w, p_a + r * width + k, p_b + r, m_n, m_k, r + o_r < rank, scaling, SPLIT, PRECISION
                )
        squares += merged * merged
    if OVERLAP:
        # the kernel before this one cleared the counters; what it reads may be this one's memory
        tl.extra.cuda.gdc_wait()
    o_all, n_all = before + o_n, n1 + n2 + n3
    tl.store(p_squares + tl.program_id(1).to(tl.int64) * n_all + o_all, tl.sum(squares, axis=1), mask=m_n)
    if _arrive_last(p_arrived + block, shares):
        m = tl.load(_pointer_of(which, p_m1, p_m2, p_m3) + o_n, mask=m_n, other=0.0)
        # rounded as PEFT's, whose magnitude began as this norm: a fresh DoRA layer is the frozen one
        of_row = tl.where(m_n, _sum_of_shares(p_squares, o_all, m_n, n_all, shares), 1.0)
        norm = tl.sqrt_rn(of_row).to(m.dtype).to(tl.float32)
        scale = tl.div_rn(m.to(tl.float32), norm)
        tl.store(p_norm + o_all, norm, mask=m_n)
        tl.store(p_scale + o_all, tl.where(scale == 0.0, SMALLEST, scale), mask=m_n)


@lru_cache(KEPT)
def _norms(
    layout: skinny.Layout,
    ns: tuple[int, ...],
    width: int,
    scalings: tuple[float, ...],
    overlaps: bool,
    device,
    dtype,
    *_,
) -> Prepared:
    blocks = sum(cdiv(n, BLOCK_N) for n in ns)
    shares = max(1, min(cdiv(width, BLOCK_K), PROGRAMS * sm_count(device) // blocks))
    each = cdiv(cdiv(width, shares), BLOCK_K) * BLOCK_K
    block_r, shares = min(16 if layout.split else 32, skinny.columns_of(layout.rank)), cdiv(width, each)
    return Prepared(
        "dora_linear (norm)",
        dora_norm_kernel,
        device,
        (blocks, shares),
        (*skinny.fill(scalings, 0.0), *skinny.fill(ns, 0), width, layout.rank, each, shares),
        {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "BLOCK_R": block_r, "AT_ONCE": layout.rank <= block_r}
        | {"SPLIT": layout.split, "PRECISION": skinny.precision(dtype), "STAGES": STAGES, "num_warps": 4}
        | {"OVERLAP": overlaps}
        | ({"launch_pdl": True} if overlaps else {}),
    )


def arrivals(ns: list[int]) -> int:
    """Counters of :func:`scales_of`."""
    return sum(cdiv(n, BLOCK_N) for n in ns)


def scales_of(
    weights: list[Tensor], many_a: list[Tensor], many_b: list[Tensor], scalings: list[float], magnitudes: list[Tensor],
    layout: skinny.Layout, arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(Norms of the rows of W + s B A, scales): (N of all,) in fp32.

    ``arrived``: counters that the kernel right before this one clears, which lets this one begin, as this one does the next.
    """
    ns, like = tuple([w.shape[0] for w in weights]), weights[0]
    groups = [[t.contiguous() for t in group] for group in (weights, many_a, many_b, magnitudes)]
    run = _norms(
        layout, ns, like.shape[1], tuple(scalings), arrived is not None, like.device, like.dtype, many_a[0].dtype,
        magnitudes[0].dtype,
    )  # fmt: skip
    squares, norms = (like.new_empty(size, dtype=torch.float32) for size in ((run.grid[1], sum(ns)), sum(ns)))
    scales = torch.empty_like(norms)
    if arrived is None:
        arrived = like.new_zeros(arrivals(ns), dtype=torch.int32)
    run(*(t for group in groups for t in skinny.three(group)), squares, norms, scales, arrived)
    return norms, scales


def scales_from(norms: Tensor, magnitudes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The (norms, scales) of :func:`scales_of`, of norms (N of all,) in fp32 that were computed elsewhere."""
    norms = norms.to(magnitudes[0].dtype).float()
    scales = torch.cat([magnitude.float() for magnitude in magnitudes]) / norms
    # the op may not return what it was given
    return norms.clone(), torch.where(scales == 0, SMALLEST.value, scales)
