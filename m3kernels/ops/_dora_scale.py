"""The norms and scales of DoRA's rows, of several layers of one input at once: the formula is in dora_linear.py."""

import torch
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._common import cdiv, launch
from m3kernels.ops._lora_kernels import _one_of, _pointer_of
from m3kernels.ops._products import add_product
from m3kernels.ops._triton import tl, triton

# a magnitude of 0 gets this scale: its gradient is taken from y / scale
SMALLEST = tl.constexpr(1e-20)
# up to here A A^T is formed beside W A^T, in the same pass
MOST_INSIDE = 64


@triton.jit
def dora_scale_kernel(
    p_w1,
    p_w2,
    p_w3,
    p_a,
    p_b1,
    p_b2,
    p_b3,
    p_m1,
    p_m2,
    p_m3,
    p_gram,
    p_norm,
    p_scale,
    n1,
    n2,
    n3,
    s1,
    s2,
    s3,
    width,
    rank,
    padded,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """norm_n^2 = |W_n|^2 + (2 s (W A^T)_n + s^2 (B A A^T)_n) B_n^T of a block of rows; scale = magnitude / norm."""
    block = tl.program_id(0)
    first1, first2 = tl.cdiv(n1, BLOCK_N), tl.cdiv(n1, BLOCK_N) + tl.cdiv(n2, BLOCK_N)
    which = (block >= first1).to(tl.int32) + (block >= first2)
    o_n = (block - _one_of(which, 0, first1, first2)) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, before = _one_of(which, n1, n2, n3), _one_of(which, 0, n1, n1 + n2)
    s = _one_of(which, tl.cast(s1, tl.float32), tl.cast(s2, tl.float32), tl.cast(s3, tl.float32))
    o_k, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_n = o_n < rows
    p_w = _pointer_of(which, p_w1, p_w2, p_w3) + o_n.to(tl.int64)[:, None] * width + o_k[None, :]
    p_b = _pointer_of(which, p_b1, p_b2, p_b3) + o_n.to(tl.int64)[:, None] * rank
    p_a += which.to(tl.int64) * padded * width
    p_gram += which * rank * rank
    # by elements: a sum in every step would make the warps wait for each other
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    low_rank = tl.zeros([BLOCK_N], tl.float32)
    for r in range(0, rank, BLOCK_R):
        m_r = r + o_r < rank
        wa = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        gram = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
        p_rows = p_a + (r + o_r).to(tl.int64)[:, None] * width + o_k[None, :]
        for k in range(0, width, BLOCK_K):
            m_k = k + o_k < width
            b_w = tl.load(p_w + k, mask=m_n[:, None] & m_k[None, :], other=0.0)
            b_a = tl.load(p_rows + k, mask=m_r[:, None] & m_k[None, :], other=0.0)
            wa = add_product(wa, b_w, tl.trans(b_a), PRECISION)
            if INSIDE:
                gram = add_product(gram, b_a, tl.trans(b_a), PRECISION)
            if SPLIT:
                b_lo = tl.load(p_rows + 2 * rank * width + k, mask=m_r[:, None] & m_k[None, :], other=0.0)
                wa = add_product(wa, b_w, tl.trans(b_lo), PRECISION)
                if INSIDE:
                    gram = add_product(gram, b_a, tl.trans(b_lo), PRECISION)
                    gram = add_product(gram, b_lo, tl.trans(b_a), PRECISION)
            if r == 0:
                squares += b_w.to(tl.float32) * b_w.to(tl.float32)
        b_b = tl.load(p_b + (r + o_r)[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        if INSIDE:
            ba = tl.dot(b_b, gram, input_precision="ieee")
        else:
            ba = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            for i in range(0, rank, BLOCK_R):
                m_i = i + o_r < rank
                b_other = tl.load(p_b + (i + o_r)[None, :], mask=m_n[:, None] & m_i[None, :], other=0.0)
                p_part = p_gram + (i + o_r)[:, None] * rank + (r + o_r)[None, :]
                b_gram = tl.load(p_part, mask=m_i[:, None] & m_r[None, :], other=0.0)
                ba += tl.dot(b_other.to(tl.float32), b_gram, input_precision="ieee")
        low_rank += tl.sum(b_b * (2.0 * s * wa + s * s * ba), axis=1)
    norm = tl.sqrt(tl.maximum(tl.sum(squares, axis=1) + low_rank, 0.0))
    magnitude = tl.load(_pointer_of(which, p_m1, p_m2, p_m3) + o_n, mask=m_n, other=0.0).to(tl.float32)
    scale = tl.div_rn(magnitude, norm)
    tl.store(p_norm + before + o_n, norm, mask=m_n)
    tl.store(p_scale + before + o_n, tl.where(scale == 0.0, SMALLEST, scale), mask=m_n)


def scales_of(
    weights: list[Tensor],
    many_a: list[Tensor],
    a: Tensor,
    many_b: list[Tensor],
    magnitudes: list[Tensor],
    scalings: list[float],
    layout: skinny.Layout,
) -> tuple[Tensor, Tensor]:
    """(norms, scales) of all rows (N of all,) in fp32; ``a``: A's parts, as :func:`as_parts` gives them."""
    rank, width = many_a[0].shape
    inside = rank <= MOST_INSIDE
    gram = a if inside else torch.stack([x.float() @ x.float().T for x in many_a])
    norms = torch.empty(sum(w.shape[0] for w in weights), dtype=torch.float32, device=a.device)
    scales = torch.empty_like(norms)
    groups = ([t.contiguous() for t in group] for group in (weights, many_b, magnitudes))
    weights, many_b, magnitudes = groups
    launch(
        "dora_linear (norm)",
        dora_scale_kernel,
        (sum(cdiv(w.shape[0], 16) for w in weights),),
        *(*skinny.three(weights), a, *skinny.three(many_b), *skinny.three(magnitudes), gram, norms, scales),
        *(*skinny.sizes(magnitudes), *scalings, *[0.0] * (skinny.MOST - len(scalings)), width, rank, layout.padded),
        **{"BLOCK_N": 16, "BLOCK_K": 64, "BLOCK_R": min(64, skinny.columns_of(rank)), "SPLIT": layout.split},
        **{"INSIDE": inside, "PRECISION": skinny.precision(weights[0]), "num_warps": 4, "num_stages": 3},
    )
    return norms, scales
