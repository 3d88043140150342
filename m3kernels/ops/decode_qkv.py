"""Norm, q, k and v, rotary embedding and query scale for a few rows, in one launch of a decode step, written to the cache.

    q, k, v = n(x) Wq^T, n(x) Wk^T, n(x) Wv^T        n(x) = norm_weight * x / sqrt(mean(x^2) + eps)
    q' = rotate(q) * (1 + beta * ln(1 + floor(position / original_max)))        k' = rotate(k)

One program takes a few dimensions of one head together with those half a head away, which rotate with them; q, k and v stay in
fp32 from the product to the end (see :mod:`m3kernels.ops.decode_linear`, :mod:`m3kernels.ops.rotary`).
"""

from collections.abc import Callable

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
from m3kernels.ops.rotary import halves, rotary, rotary_reference

# H100, graphs of dependent launches over cold weights: 91 % of a copy's rate for 3B (docs/generation.md)
TILES = Tiles(
    WeightTile(2, 1024, warps=2), WeightTile(64, 256, warps=4, stages=3), WeightTile(64, 128, warps=4, stages=3)
)
FP8_TILES = Tiles(
    WeightTile(4, 1024, warps=4), WeightTile(32, 128, warps=2, stages=3), WeightTile(16, 128, warps=4, stages=3)
)


@triton.jit(do_not_specialize=["rows", "original_max"])
def decode_qkv_kernel(
    p_x,
    p_q_weight,
    p_k_weight,
    p_v_weight,
    p_gain,
    p_q_scale,
    p_k_scale,
    p_v_scale,
    p_cos,
    p_sin,
    p_position,
    p_slot,
    p_q,
    p_k,
    p_v,
    x_stride,
    q_weight_stride,
    k_weight_stride,
    v_weight_stride,
    table_stride,
    position_stride,
    k_row_stride,
    k_head_stride,
    k_slot_stride,
    v_row_stride,
    v_head_stride,
    v_slot_stride,
    rows,
    eps,
    beta,
    original_max,
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
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CACHED: tl.constexpr,
):
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    o_half = part * BLOCK_N + tl.arange(0, BLOCK_N)
    m_half = o_half < HALF
    if head < Q_HEADS:
        group, p_weight, w_stride, p_scale = head, p_q_weight, q_weight_stride, p_q_scale
    elif head < Q_HEADS + K_HEADS:
        group, p_weight, w_stride, p_scale = head - Q_HEADS, p_k_weight, k_weight_stride, p_k_scale
    else:
        group, p_weight, w_stride, p_scale = head - Q_HEADS - K_HEADS, p_v_weight, v_weight_stride, p_v_scale
    o_n = group.to(tl.int64) * (2 * HALF) + o_half
    p_first, p_second = p_weight + o_n[:, None] * w_stride, p_weight + (o_n + HALF)[:, None] * w_stride
    y1, y2 = weights_times_x(
        *(p_first, p_second, m_half, p_x, x_stride, rows, p_gain, eps, K, ROWS, BLOCK_N, BLOCK_K, STAGES, NORM),
        *(True, X_SCALE, MOVED, OVERLAP),
    )
    if SCALED:
        y1 *= load_scales(p_scale, o_n, m_half, SCALED)
        y2 *= load_scales(p_scale, o_n + HALF, m_half, SCALED)

    o_m = tl.arange(0, ROWS).to(tl.int64)
    m_m = o_m < rows
    mask = m_half[:, None] & m_m[None, :]
    if head < Q_HEADS + K_HEADS:
        o_table = o_m[None, :] * table_stride + o_half[:, None]
        cos = tl.load(p_cos + o_table, mask=mask, other=0.0)
        sin = tl.load(p_sin + o_table, mask=mask, other=0.0)
        y1, y2 = y1 * cos - y2 * sin, y2 * cos + y1 * sin
    if head < Q_HEADS:
        if HAS_SCALE:
            periods = (tl.load(p_position + o_m * position_stride, mask=m_m, other=0) // original_max).to(tl.float32)
            scale = (1.0 + tl.cast(beta, tl.float32) * tl.log(1.0 + periods))[None, :]
            y1, y2 = y1 * scale, y2 * scale
        p_out, row_stride, head_stride, slot_stride = p_q, Q_HEADS * HALF * 2, HALF * 2, 0
    elif head < Q_HEADS + K_HEADS:
        p_out, row_stride, head_stride, slot_stride = p_k, k_row_stride, k_head_stride, k_slot_stride
    else:
        p_out, row_stride, head_stride, slot_stride = p_v, v_row_stride, v_head_stride, v_slot_stride
    o_out = o_m * row_stride + group.to(tl.int64) * head_stride
    if CACHED:
        o_out += tl.load(p_slot + o_m, mask=m_m, other=0).to(tl.int64) * slot_stride
    o_out = o_out[None, :] + o_half[:, None]
    tl.store(p_out + o_out, y1.to(p_q.dtype.element_ty), mask=mask)
    tl.store(p_out + o_out + HALF, y2.to(p_q.dtype.element_ty), mask=mask)


def _rotated(
    ys: list[Tensor],
    head_dim: int,
    table: tuple[Tensor, Tensor],
    positions: Tensor,
    llama4: tuple[float, int] | None,
    rotate: Callable,
) -> tuple[Tensor, Tensor, Tensor]:
    """Products (M, heads * K) to rotated heads (M, heads, K)."""
    q, k, v = (y.unflatten(1, (-1, head_dim)) for y in ys)
    q, k = rotate(q[:, :, None], k[:, :, None], tuple(half[:, None] for half in table), positions[:, None], llama4)
    return q[:, :, 0], k[:, :, 0], v


def _write(caches: tuple[Tensor, Tensor], slots: Tensor, k: Tensor, v: Tensor) -> None:
    rows = torch.arange(k.shape[0], device=k.device)
    for cache, new in zip(caches, (k, v)):
        cache[rows, :, slots.long()] = new


def decode_qkv_reference(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    *,
    head_dim: int,
    table: Tensor | tuple[Tensor, Tensor],
    positions: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    llama4: tuple[float, int] | None = None,
    caches: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    scales: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Plain PyTorch: norm, three matrix products, :func:`m3kernels.ops.rotary_reference`, the caches written by index."""
    ys = products(x, (q_weight, k_weight, v_weight), scales, norm_weight, eps)
    q, k, v = _rotated(ys, head_dim, halves(table, head_dim), positions, llama4, rotary_reference)
    if caches is None:
        return q, k, v
    _write(caches, slots, k, v)
    return q, None, None


def decode_qkv(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    *,
    head_dim: int,
    table: Tensor | tuple[Tensor, Tensor],
    positions: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    llama4: tuple[float, int] | None = None,
    caches: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    scales: tuple[Tensor | None, ...] = (None, None, None),
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rotated queries and keys, and values, of the rows of a decode step.

    With ``caches`` this op writes into its arguments, unlike the others: a copy of a cache is what decoding cannot afford.

    Args:
        x: (M, D) in fp32, bf16 or fp16, a token of each sequence; up to 64 rows run as one kernel.
        q_weight: (H * K, D) in x's dtype, or E4M3 with its scale.
        k_weight, v_weight: (G * K, D), the same.
        head_dim: K, even.
        table: (M, K) fp32 [cos | sin] of each row's position, from :func:`m3kernels.ops.rotary_table`; or transformers'
            pair (cos, sin), each (M, K) with its halves alike.
        positions: (M,) integers, for the query scale.
        norm_weight, eps: of the RMSNorm before; None: no norm.
        llama4: (beta, original_max) of the query scale; None: no scale.
        caches: keys and values (M or more, G, T, K) in x's dtype, dense along K; row m's go to ``caches[m, :, slots[m]]``.
        slots: (M,) integers on the device, from 0 to T - 1: nothing looks at that.
        scales: of the three weights: fp32, one element or one for each row, or None; all of one kind.
        backend: "auto", "triton" or "reference".

    Returns:
        q (M, H, K), and k, v (M, G, K), or None for both where they went to caches. No gradients.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; tensors that require a gradient.
    """
    weights = {"q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight}
    check_products("decode_qkv", x, weights, scales, norm_weight)
    cos, sin = table = halves(table, head_dim)
    _check(x, weights, head_dim, table, positions, caches, slots, scales)
    if not use_triton("decode_qkv", backend, x, cos, sin, *(t for t in (norm_weight,) if t is not None)):
        options = {"norm_weight": norm_weight, "eps": eps, "llama4": llama4, "caches": caches, "slots": slots}
        heads = {"head_dim": head_dim, "table": table, "positions": positions, "scales": scales}
        return decode_qkv_reference(x, *weights.values(), **heads, **options)
    beta, original_max = (0.0, 0) if llama4 is None else llama4
    arguments = (x, *weights.values(), head_dim, cos, sin, positions, norm_weight, eps, beta, original_max, *scales)
    if torch.compiler.is_compiling():
        q, k, v = torch.ops.m3kernels.decode_qkv(*arguments)
        if caches is None:
            return q, k, v
        _write(caches, slots, k, v)
        return q, None, None
    return _launch(*arguments, caches, slots)


def _check(x, weights, head_dim, table, positions, caches, slots, scales) -> None:
    rows, heads = x.shape[0], [w.shape[0] for w in weights.values()]
    if head_dim < 2 or head_dim % 2 or any(n % head_dim for n in heads) or heads[1] != heads[2]:
        raise ValueError(
            f"decode_qkv: weights must have whole heads of head_dim {head_dim} (even), k as v; got rows {heads}"
        )
    fits = all(half.shape == (rows, head_dim // 2) and half.dtype == torch.float32 for half in table)
    if not fits or positions.shape != (rows,):
        raise ValueError(
            f"decode_qkv: needs an fp32 table ({rows}, {head_dim}), or a pair of such, and positions ({rows},), got halves "
            f"{' and '.join(f'{tuple(half.shape)} {half.dtype}' for half in table)}, positions {tuple(positions.shape)}"
        )
    if len({scale_kind(scale) for scale in scales}) > 1:
        raise ValueError("decode_qkv: scales must be three of one kind: none, one element each, or one for each row")
    if caches is None:
        return
    wanted = (heads[1] // head_dim, head_dim)
    for cache in caches:
        if cache.dim() != 4 or cache.shape[0] < rows or cache.shape[1::2] != wanted or cache.dtype != x.dtype:
            raise ValueError(
                f"decode_qkv: caches must be ({rows} or more, {wanted[0]}, T, {wanted[1]}) in {x.dtype}, "
                f"got {tuple(cache.shape)} {cache.dtype}"
            )
        if cache.stride(3) != 1:
            raise ValueError(f"decode_qkv: caches must be dense along K, got strides {cache.stride()}")
    if slots is None or slots.shape != (rows,) or slots.is_floating_point():
        raise ValueError(f"decode_qkv: caches need slots ({rows},), integers")


def _launch(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    beta: float,
    original_max: int,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    caches: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    llama4, scales = (beta, original_max) if original_max else None, (q_scale, k_scale, v_scale)
    if not fused_rows(x):
        ys = products(x, (q_weight, k_weight, v_weight), scales, norm_weight, eps, reference=False)
        q, k, v = _rotated(ys, head_dim, (cos, sin), positions, llama4, rotary)
        if caches is None:
            return q.contiguous(), k.contiguous(), v.contiguous()
        _write(caches, slots, k, v)
        return q, None, None
    x, q_weight, k_weight, v_weight = (
        t if t.stride(1) == 1 else t.contiguous() for t in (x, q_weight, k_weight, v_weight)
    )
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    rows, half = x.shape[0], head_dim // 2
    q_heads, k_heads = q_weight.shape[0] // head_dim, k_weight.shape[0] // head_dim
    q = x.new_empty((rows, q_heads, head_dim))
    k, v = caches or (x.new_empty((rows, k_heads, head_dim)) for _ in range(2))
    # of what has no slots, the stride of one is not used
    strides = [s for t in (k, v) for s in ((t.stride(0), t.stride(1), t.stride(2) if caches else 0))]
    tile = (TILES if q_scale is None else FP8_TILES).choose(rows)
    parts = cdiv(half, tile.rows)
    launch(
        "decode_qkv",
        decode_qkv_kernel,
        ((q_heads + 2 * k_heads) * parts,),
        *(x, q_weight, k_weight, v_weight, *(x if t is None else t.contiguous() for t in (norm_weight, *scales))),
        *(cos, sin, positions, positions if slots is None else slots.contiguous(), q, k, v),
        *(x.stride(0), q_weight.stride(0), k_weight.stride(0), v_weight.stride(0), cos.stride(0), positions.stride(0)),
        *strides,
        *(rows, eps, beta, original_max),
        **rows_meta(x, q_weight, tile, norm_weight),
        SCALED=scale_kind(scales[0]),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        HALF=half,
        PARTS=parts,
        HAS_SCALE=llama4 is not None,
        CACHED=caches is not None,
    )
    return (q, k, v) if caches is None else (q, None, None)


def _compiled(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    beta: float,
    original_max: int,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights, norm = (x, q_weight, k_weight, v_weight), (norm_weight, eps, beta, original_max)
    return _launch(*weights, head_dim, cos, sin, positions, *norm, q_scale, k_scale, v_scale)


def _fake(x, q_weight, k_weight, v_weight, head_dim, *_):
    return tuple(x.new_empty((x.shape[0], w.shape[0] // head_dim, head_dim)) for w in (q_weight, k_weight, v_weight))


torch.library.custom_op("m3kernels::decode_qkv", _compiled, mutates_args=()).register_fake(_fake)
