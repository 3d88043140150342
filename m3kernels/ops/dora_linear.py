"""DoRA (arXiv 2402.09353): a LoRA layer whose output rows of the weight are rescaled to a trained magnitude.

    y = k * (x W^T + s x A^T B^T) + bias        k = m / norm        norm_n = |W_n + s B_n A|, without a gradient, as in PEFT

W + s B A is never formed. One pass over W gives its rows' squares and W A^T together, so that nothing is kept that a load, a
merge or an edit of W could leave stale:

    norm_n^2 = |W_n|^2 + 2 s (W A^T)_n B_n^T + s^2 B_n (A A^T) B_n^T

k is applied where the product of :mod:`m3kernels.ops.lora_linear` is written.
"""

import torch
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._common import cdiv, launch, use_triton
from m3kernels.ops._triton import tl, triton
from m3kernels.ops.lora_linear import Adapted, lora_linears

# a magnitude of 0 gets this scale: its gradient is taken from y / scale
SMALLEST = 1e-20


@triton.jit
def dora_norm_kernel(
    p_w,
    p_a,
    p_b,
    p_gram,
    p_norm,
    w_stride,
    a_stride,
    lo_offset,
    b_stride,
    rows,
    width,
    rank,
    scaling,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_n, o_k, o_r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    m_n = o_n < rows
    s = tl.cast(scaling, tl.float32)
    p_w += o_n.to(tl.int64)[:, None] * w_stride + o_k[None, :]
    p_b += o_n.to(tl.int64)[:, None] * b_stride
    square = tl.zeros([BLOCK_N], tl.float32)
    for r in range(0, rank, BLOCK_R):
        m_r = r + o_r < rank
        wa = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        p_column = p_a + (r + o_r).to(tl.int64)[None, :] * a_stride + o_k[:, None]
        for k in range(0, width, BLOCK_K):
            m_k = k + o_k < width
            b_w = tl.load(p_w + k, mask=m_n[:, None] & m_k[None, :], other=0.0)
            b_a = tl.load(p_column + k, mask=m_k[:, None] & m_r[None, :], other=0.0)
            wa += tl.dot(b_w, b_a, input_precision=PRECISION)
            if SPLIT:
                b_a = tl.load(p_column + lo_offset + k, mask=m_k[:, None] & m_r[None, :], other=0.0)
                wa += tl.dot(b_w, b_a, input_precision=PRECISION)
            if r == 0:
                square += tl.sum(b_w.to(tl.float32) * b_w.to(tl.float32), axis=1)
        ba = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for i in range(0, rank, BLOCK_R):
            m_i = i + o_r < rank
            b_b = tl.load(p_b + (i + o_r)[None, :], mask=m_n[:, None] & m_i[None, :], other=0.0).to(tl.float32)
            p_part = p_gram + (i + o_r)[:, None] * rank + (r + o_r)[None, :]
            b_gram = tl.load(p_part, mask=m_i[:, None] & m_r[None, :], other=0.0)
            ba += tl.dot(b_b, b_gram, input_precision="ieee")
        b_b = tl.load(p_b + (r + o_r)[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        square += tl.sum(b_b * (2.0 * s * wa + s * s * ba), axis=1)
    tl.store(p_norm + o_n, tl.sqrt(tl.maximum(square, 0.0)), mask=m_n)


def dora_norm_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """(N,): the norm of each row of W + scaling B A, as PEFT computes it."""
    return torch.linalg.norm(weight.to(A.dtype) + scaling * (B @ A), dim=1)


@torch.no_grad()
def dora_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, backend: str = "auto") -> Tensor:
    """(N,) in fp32 at least, without a gradient: the norm of each row of ``weight + scaling B A``.

    Args:
        weight: (N, K) in fp32, bf16 or fp16.
        A, B: (R, K) and (N, R) of weight's dtype or fp32.
    """
    if not use_triton("dora_linear", backend, weight, A, B, inductor_fuses=True):
        return dora_norm_reference(weight, A, B, scaling)
    norm = torch.ops.m3kernels.dora_norm if torch.compiler.is_compiling() else _norm
    return norm(weight.detach(), A.detach(), B.detach(), float(scaling))


def _norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    split, (rank, width) = A.dtype == torch.float32 and weight.dtype != torch.float32, A.shape
    a = torch.empty((3 * rank if split else rank, width), dtype=weight.dtype, device=weight.device)
    skinny.as_parts(A, a, rank * width, 1.0, split)
    gram = A.float() @ A.float().T
    norm = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    weight, B = (t if t.stride(1) == 1 else t.contiguous() for t in (weight, B))
    launch(
        "dora_linear (norm)",
        dora_norm_kernel,
        (cdiv(weight.shape[0], 64),),
        *(weight, a, B, gram, norm, weight.stride(0), a.stride(0), 2 * rank * width, B.stride(0)),
        *(*weight.shape, rank, scaling),
        **{"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": min(64, skinny.columns_of(rank)), "SPLIT": split},
        **{"PRECISION": skinny.precision(weight), "num_warps": 8, "num_stages": 3},
    )
    return norm


torch.library.custom_op("m3kernels::dora_norm", _norm, mutates_args=()).register_fake(
    lambda weight, A, B, scaling: weight.new_empty(weight.shape[0], dtype=torch.float32)
)


def dora_scale(
    weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float, *, backend: str = "auto"
) -> Tensor:
    """(N,) magnitude / norm, differentiable in the magnitude alone; never exactly 0."""
    scale = magnitude / dora_norm(weight, A, B, scaling, backend=backend).to(
        torch.promote_types(magnitude.dtype, torch.float32)
    )
    return torch.where(scale == 0, scale + SMALLEST, scale)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``magnitude / |weight + scaling B A| * (x W^T + scaling x A^T B^T) + bias``.

    Args:
        x: (..., K) in fp32, bf16 or fp16.
        weight, A, B, scaling: as in :func:`m3kernels.ops.lora_linear`.
        magnitude: (N,) of any floating-point dtype.
        bias: (N,), outside the scale, as in PEFT.
        backend: "auto", "triton" or "reference".

    Returns:
        (..., N). Differentiable once in x, weight, A, B and magnitude; the norm is a constant, as in the paper and PEFT.

    Raises:
        ValueError, TypeError: as :func:`m3kernels.ops.lora_linear`; a magnitude that is not (N,).
    """
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(
            f"dora_linear: magnitude must be (N,), got {tuple(magnitude.shape)}, weight {tuple(weight.shape)}"
        )
    scale = dora_scale(weight, A, B, magnitude, scaling, backend=backend)
    (y,) = lora_linears(x, [Adapted(weight, A, B, scaling, scale)], backend=backend)
    return y if bias is None else y + bias


def dora_linear_reference(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scaling: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Plain PyTorch with PEFT's casts and order."""
    base = torch.nn.functional.linear(x, weight)
    norm = dora_norm_reference(weight.detach(), A.detach(), B.detach(), scaling)
    k = magnitude / norm
    low = torch.nn.functional.linear(torch.nn.functional.linear(x.to(A.dtype), A), B)
    y = (base + ((k - 1) * base + k * low * scaling)).to(base.dtype)
    return y if bias is None else y + bias
