"""Norm, gate, up and SwiGLU for a few rows, in one launch of a decode step.

    h = silu(n(x) Wg^T) * (n(x) Wu^T)        n(x) = norm_weight * x / sqrt(mean(x^2) + eps)

One program takes the same few rows of both weights, which stay where they are (see :mod:`m3kernels.ops.decode_linear`).
"""

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, use_triton
from m3kernels.ops._decode_products import (
    Tiles,
    WeightTile,
    check_products,
    fused_rows,
    load_scales,
    products,
    rows_meta,
    scale_kind,
    weights_times_x,
)
from m3kernels.ops._triton import tl, triton
from m3kernels.ops.swiglu import swiglu, swiglu_reference

# H100, graphs of dependent launches over cold weights: 102 % of a copy's rate for 3B (docs/generation.md)
TILES = Tiles(
    WeightTile(1, 1024, warps=8), WeightTile(32, 128, warps=2, stages=3), WeightTile(64, 128, warps=4, stages=3)
)
FP8_TILES = Tiles(
    WeightTile(2, 1024, warps=4), WeightTile(32, 128, warps=2, stages=3), WeightTile(16, 128, warps=4, stages=3)
)


@triton.jit(do_not_specialize=["rows"])
def decode_swiglu_kernel(
    p_x,
    p_gate,
    p_up,
    p_gain,
    p_gate_scale,
    p_up_scale,
    p_out,
    x_stride,
    gate_stride,
    up_stride,
    rows,
    width,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    X_SCALE: tl.constexpr,
    MOVED: tl.constexpr,
    OVERLAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    p_gates, p_ups = p_gate + o_n[:, None] * gate_stride, p_up + o_n[:, None] * up_stride
    gate, up = weights_times_x(
        *(p_gates, p_ups, m_n, p_x, x_stride, rows, p_gain, eps, K, ROWS, BLOCK_N, BLOCK_K, STAGES, NORM),
        *(True, X_SCALE, MOVED, OVERLAP),
    )
    if SCALED:
        gate *= load_scales(p_gate_scale, o_n, m_n, SCALED)
        up *= load_scales(p_up_scale, o_n, m_n, SCALED)
    h = gate * tl.sigmoid(gate) * up
    o_m = tl.arange(0, ROWS).to(tl.int64)
    mask = m_n[:, None] & (o_m < rows)[None, :]
    tl.store(p_out + o_m[None, :] * width + o_n[:, None], h.to(p_out.dtype.element_ty), mask=mask)


def decode_swiglu_reference(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch: norm, two matrix products, :func:`m3kernels.ops.swiglu_reference`."""
    return swiglu_reference(*products(x, (gate, up), (gate_scale, up_scale), norm_weight, eps))


def decode_swiglu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``silu(rms_norm(x) gate^T) * (rms_norm(x) up^T)`` for the rows of a decode step.

    Args:
        x: (M, K) in fp32, bf16 or fp16; up to 64 rows run as one kernel.
        gate, up: (F, K) in x's dtype, or both E4M3 with their scales.
        norm_weight, eps: of the RMSNorm before; None: no norm.
        gate_scale, up_scale: fp32, of the whole weight (one element) or of each of its rows (F,); both of one kind.
        backend: "auto", "triton" or "reference".

    Returns:
        (M, F) in x's dtype, without a gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; tensors that require a gradient.
    """
    check_products("decode_swiglu", x, {"gate": gate, "up": up}, (gate_scale, up_scale), norm_weight)
    if gate.shape != up.shape or scale_kind(gate_scale) != scale_kind(up_scale):
        raise ValueError(
            f"decode_swiglu: gate and up must have one shape and one kind of scale, got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    if not use_triton("decode_swiglu", backend, x, *(t for t in (norm_weight,) if t is not None)):
        scales = {"gate_scale": gate_scale, "up_scale": up_scale}
        return decode_swiglu_reference(x, gate, up, norm_weight=norm_weight, eps=eps, **scales)
    if torch.compiler.is_compiling():
        return torch.ops.m3kernels.decode_swiglu(x, gate, up, norm_weight, eps, gate_scale, up_scale)
    return _launch(x, gate, up, norm_weight, eps, gate_scale, up_scale)


def _launch(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
) -> Tensor:
    if not fused_rows(x):
        return swiglu(*products(x, (gate, up), (gate_scale, up_scale), norm_weight, eps, reference=False))
    x, gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (x, gate, up))
    (rows, _), width = x.shape, gate.shape[0]
    out = x.new_empty((rows, width))
    if out.numel() == 0:
        return out
    tile = (TILES if gate_scale is None else FP8_TILES).choose(rows)
    launch(
        "decode_swiglu",
        decode_swiglu_kernel,
        (cdiv(width, tile.rows),),
        *(x, gate, up, *(x if t is None else t.contiguous() for t in (norm_weight, gate_scale, up_scale)), out),
        *(x.stride(0), gate.stride(0), up.stride(0), rows, width, eps),
        **rows_meta(x, gate, tile, norm_weight),
        SCALED=scale_kind(gate_scale),
    )
    return out


def _fake(x, gate, up, norm_weight, eps, gate_scale, up_scale):
    return x.new_empty((x.shape[0], gate.shape[0]))


torch.library.custom_op("m3kernels::decode_swiglu", _launch, mutates_args=()).register_fake(_fake)
