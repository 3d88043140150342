"""A linear layer for a few rows, with the norm before and the residual add after it: one launch of a decode step.

    y = n(x) W^T + residual        n(x) = norm_weight * x / sqrt(mean(x^2) + eps), or x

Decoding reads every weight once a token: what counts is that nothing else is read or waited for. One program takes a few rows
of W over its whole width; the norm's factor multiplies the sums. An E4M3 weight is multiplied as it is and scaled at the end
(W8A16, fp32 sums).
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

# H100, graphs of dependent launches over cold weights: 92 % of a copy's rate for 3B's o, 97 % for its down (docs/generation.md)
TILES = Tiles(
    WeightTile(4, 1024, warps=2), WeightTile(16, 256, warps=2, stages=5), WeightTile(64, 128, warps=4, stages=5)
)
FP8_TILES = Tiles(
    WeightTile(8, 1024, warps=4), WeightTile(16, 128, warps=2, stages=5), WeightTile(32, 128, warps=4, stages=3)
)
# a vocabulary has rows enough for larger tiles
WIDE_TILES = Tiles(WeightTile(2, 1024, warps=4), WeightTile(64, 256, warps=4, stages=5), TILES.many)
WIDE_FROM = 32_768


@triton.jit(do_not_specialize=["rows"])
def decode_linear_kernel(
    p_x,
    p_w,
    p_gain,
    p_scale,
    p_residual,
    p_out,
    x_stride,
    w_stride,
    residual_stride,
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
    RESIDUAL: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    p_rows = p_w + o_n[:, None] * w_stride
    y, _ = weights_times_x(
        *(p_rows, p_rows, m_n, p_x, x_stride, rows, p_gain, eps, K, ROWS, BLOCK_N, BLOCK_K, STAGES, NORM),
        *(False, X_SCALE, MOVED, OVERLAP),
    )
    if SCALED:
        y *= load_scales(p_scale, o_n, m_n, SCALED)
    o_m = tl.arange(0, ROWS).to(tl.int64)
    mask = m_n[:, None] & (o_m < rows)[None, :]
    if RESIDUAL:
        y += tl.load(p_residual + o_m[None, :] * residual_stride + o_n[:, None], mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o_m[None, :] * width + o_n[:, None], y.to(p_out.dtype.element_ty), mask=mask)


def decode_linear_reference(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain PyTorch: norm, matrix product, add, each rounded as transformers does."""
    (y,) = products(x, (weight,), (scale,), norm_weight, eps)
    return _added(y, residual, out_dtype)


def _added(y: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    y = y if residual is None else residual + y
    return y if out_dtype is None else y.to(out_dtype)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """``rms_norm(x) weight^T + residual`` for the rows of a decode step.

    Args:
        x: (M, K) in fp32, bf16 or fp16. Up to 64 rows run as one kernel, more as :func:`m3kernels.ops.rms_norm` and a
            matrix product.
        weight: (N, K) in x's dtype, or E4M3 with ``scale``.
        norm_weight: (K,) of the RMSNorm before; None: no norm.
        eps: of that norm.
        residual: (M, N) in x's dtype, added in fp32.
        scale: fp32, of the whole weight (one element) or of each of its rows (N,).
        out_dtype: x's by default; fp32 keeps logits unrounded.
        backend: "auto", "triton" or "reference".

    Returns:
        (M, N), without a gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; tensors that require a gradient.
    """
    check_products("decode_linear", x, {"weight": weight}, (scale,), norm_weight)
    if residual is not None and (residual.shape != (x.shape[0], weight.shape[0]) or residual.dtype != x.dtype):
        raise ValueError(
            f"decode_linear: residual must be {(x.shape[0], weight.shape[0])} in {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    out_dtype = out_dtype or x.dtype
    if not use_triton("decode_linear", backend, x, *(t for t in (norm_weight, residual) if t is not None)):
        options = {"norm_weight": norm_weight, "eps": eps, "residual": residual, "scale": scale}
        return decode_linear_reference(x, weight, **options, out_dtype=out_dtype)
    if torch.compiler.is_compiling():
        return torch.ops.m3kernels.decode_linear(x, weight, norm_weight, eps, residual, scale, out_dtype)
    return _launch(x, weight, norm_weight, eps, residual, scale, out_dtype)


def _launch(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if not fused_rows(x):
        (y,) = products(x, (weight,), (scale,), norm_weight, eps, reference=False)
        return _added(y, residual, out_dtype)
    x, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x, weight))
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    (rows, _), width = x.shape, weight.shape[0]
    out = torch.empty((rows, width), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = (FP8_TILES if scale is not None else WIDE_TILES if width >= WIDE_FROM else TILES).choose(rows)
    launch(
        "decode_linear",
        decode_linear_kernel,
        (cdiv(width, tile.rows),),
        *(
            x,
            weight,
            *(x if t is None else t.contiguous() for t in (norm_weight, scale)),
            x if residual is None else residual,
            out,
        ),
        *(x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), rows, width, eps),
        **rows_meta(x, weight, tile, norm_weight),
        SCALED=scale_kind(scale),
        RESIDUAL=residual is not None,
    )
    return out


def _fake(x, weight, norm_weight, eps, residual, scale, out_dtype):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


torch.library.custom_op("m3kernels::decode_linear", _launch, mutates_args=()).register_fake(_fake)
