"""New keys and values into their places in caches, quantised where the caches are E4M3.

    scale = max(|x|) / 448 over head_dim        cache = x / scale, rounded to E4M3

A scale for each token and head costs 4 bytes on 128, and keeps one large token from coarsening the others. Each number is
within 2^-4 of itself, or 2^-10 of the scale where it is smaller than 2^-6 scales. One program takes one token, all its heads.
"""

import torch
from torch import Tensor

from m3kernels.ops._common import launch, next_power_of_2, overlap_meta, use_triton
from m3kernels.ops._triton import INTERPRET, tl, triton
from m3kernels.ops.fp8_dequantize import FP8, SMALLEST_SCALE, quantize_rows


@triton.jit
def store_heads(
    p_x, p_cache, p_scale, o_x, o_cache, o_scale, mask, m_head, SCALED: tl.constexpr, SMALLEST: tl.constexpr
):
    """One token's heads (BLOCK_HEADS, BLOCK_DIM) into a cache."""
    x = tl.load(p_x + o_x, mask=mask, other=0.0)
    if SCALED:
        x = x.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=1), tl.full([x.shape[0]], 448.0, tl.float32)), SMALLEST)
        tl.store(p_scale + o_scale, scale, mask=m_head)
        # the largest is 448 up to a rounding, which the conversion rounds off
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(p_cache + o_cache, x.to(p_cache.dtype.element_ty), mask=mask)


@triton.jit
def kv_write_kernel(
    p_k,
    p_v,
    p_k_cache,
    p_v_cache,
    p_k_scale,
    p_v_scale,
    p_rows,
    p_at,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    k_cache_row_stride,
    k_cache_head_stride,
    k_cache_seq_stride,
    v_cache_row_stride,
    v_cache_head_stride,
    v_cache_seq_stride,
    k_scale_row_stride,
    k_scale_head_stride,
    k_scale_seq_stride,
    v_scale_row_stride,
    v_scale_head_stride,
    v_scale_seq_stride,
    batch,
    room,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    SMALLEST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    row, at = token, tl.load(p_at + token).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(p_rows + token).to(tl.int64)
    inside = (row < batch) & (at >= 0) & (at < room)
    tl.device_assert(inside | (row < 0), "kv_write: a token lies outside its cache")
    # nothing is written outside where assertions are compiled out, too
    if inside & (row >= 0):
        o_head, o_dim = tl.arange(0, BLOCK_HEADS).to(tl.int64), tl.arange(0, BLOCK_DIM)
        m_head = o_head < HEADS
        mask = m_head[:, None] & (o_dim < DIM)[None, :]
        store_heads(
            *(p_k, p_k_cache, p_k_scale, token * k_token_stride + o_head[:, None] * k_head_stride + o_dim[None, :]),
            row * k_cache_row_stride + o_head[:, None] * k_cache_head_stride + at * k_cache_seq_stride + o_dim[None, :],
            row * k_scale_row_stride + o_head * k_scale_head_stride + at * k_scale_seq_stride,
            *(mask, m_head, SCALED, SMALLEST),
        )
        store_heads(
            *(p_v, p_v_cache, p_v_scale, token * v_token_stride + o_head[:, None] * v_head_stride + o_dim[None, :]),
            row * v_cache_row_stride + o_head[:, None] * v_cache_head_stride + at * v_cache_seq_stride + o_dim[None, :],
            row * v_scale_row_stride + o_head * v_scale_head_stride + at * v_scale_seq_stride,
            *(mask, m_head, SCALED, SMALLEST),
        )


@torch.no_grad()
def kv_write_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor | None,
    at: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Plain PyTorch: by index."""
    rows = torch.arange(len(at), device=at.device) if rows is None else rows.long()
    kept = rows >= 0
    rows, at = rows[kept], at[kept].long()
    for new, cache, scales in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        new = new[kept]
        if scales is not None:
            new, scales[rows, :, at] = quantize_rows(new)
        cache[rows, :, at] = new.to(cache.dtype)


@torch.no_grad()
def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor | None,
    at: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes keys and values of new tokens into caches, in place: ``k_cache[rows[m], :, at[m]] = k[m]``, and so v.

    Unlike other ops it writes into its arguments: a copy of a cache is what decoding cannot afford. One launch, and the
    host waits for nothing.

    Args:
        k, v: (M, G, K) in fp32, bf16 or fp16.
        k_cache, v_cache: (B, G, T, K), dense along K: in the dtype of k and v, or E4M3 with scales.
        rows: (M,) integers on the device, which row of the caches each token belongs to; one below 0 is skipped. None: token
            m belongs to row m.
        at: (M,) integers on the device, the places along T; no two tokens may have one place.
        k_scale, v_scale: (B, G, T) fp32 of E4M3 caches, written as well: what the numbers of a token's head are to be
            multiplied with.
        backend: "auto", "triton" or "reference".

    Raises:
        ValueError: shapes or dtypes that do not fit, or caches that are not dense along K.
        IndexError: by the reference, a row or a place beyond the caches; the kernel asserts with TRITON_DEBUG=1, and
            writes nothing for it otherwise.
    """
    _check(k, v, k_cache, v_cache, rows, at, k_scale, v_scale)
    scaled = k_scale is not None
    kept = (k_scale, v_scale) if scaled else (k_cache, v_cache)
    kernel = use_triton("kv_write", backend, k, v, *kept)
    # the interpreter rounds to E4M3 wrongly
    if not kernel or (scaled and INTERPRET and backend == "auto"):
        return kv_write_reference(k, v, k_cache, v_cache, rows, at, k_scale=k_scale, v_scale=v_scale)
    run = torch.ops.m3kernels.kv_write if torch.compiler.is_compiling() else _launch
    run(k.detach(), v.detach(), k_cache, v_cache, rows, at, k_scale, v_scale)


def _check(k, v, k_cache, v_cache, rows, at, k_scale, v_scale) -> None:
    shapes = f"got k {tuple(k.shape)}, v {tuple(v.shape)}, caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    if k.dim() != 3 or k.shape != v.shape or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(f"kv_write: needs k and v (M, G, K) and caches (B, G, T, K), {shapes}")
    if k_cache.shape[1::2] != k.shape[1:]:
        raise ValueError(f"kv_write: heads and head_dim of the caches must be those of k and v, {shapes}")
    for name, t in (("rows", rows), ("at", at)):
        if t is None:
            continue
        if t.shape != k.shape[:1] or t.is_floating_point():
            raise ValueError(
                f"kv_write: {name} must be integers ({k.shape[0]},), got {tuple(t.shape)} {t.dtype}, {shapes}"
            )
    if rows is None and k.shape[0] > k_cache.shape[0]:
        raise ValueError(f"kv_write: {k.shape[0]} tokens without rows for a cache of {k_cache.shape[0]} rows, {shapes}")
    scaled = k_scale is not None or v_scale is not None
    wanted = FP8 if scaled else k.dtype
    if not (k.dtype == v.dtype and wanted == k_cache.dtype == v_cache.dtype):
        raise ValueError(
            f"kv_write: caches must have the dtype of k and v, or be {FP8} with k_scale and v_scale; "
            f"got {k.dtype}, {v.dtype} and caches {k_cache.dtype}, {v_cache.dtype}"
        )
    if any(cache.stride(3) != 1 and cache.shape[3] > 1 for cache in (k_cache, v_cache)):
        raise ValueError(
            f"kv_write: caches must be dense along K, got strides {k_cache.stride()} and {v_cache.stride()}"
        )
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)) if scaled else ():
        if t is None or t.shape != k_cache.shape[:3] or t.dtype != torch.float32:
            found = "None" if t is None else f"{tuple(t.shape)} {t.dtype}"
            raise ValueError(f"kv_write: {name} must be {tuple(k_cache.shape[:3])} fp32, got {found}")


def _launch(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor | None,
    at: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    tokens, heads, dim = k.shape
    if k.numel() == 0:
        return
    k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
    at = at.contiguous()
    scales = (at, at) if k_scale is None else (k_scale, v_scale)
    launch(
        "kv_write",
        kv_write_kernel,
        (tokens,),
        *(k, v, k_cache, v_cache, *scales, at if rows is None else rows.contiguous(), at),
        *(*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        *((0,) * 6 if k_scale is None else (*k_scale.stride(), *v_scale.stride())),
        *k_cache.shape[::2],
        HEADS=heads,
        DIM=dim,
        BLOCK_HEADS=next_power_of_2(heads),
        BLOCK_DIM=next_power_of_2(dim),
        HAS_ROWS=rows is not None,
        SCALED=k_scale is not None,
        SMALLEST=SMALLEST_SCALE,
        **overlap_meta(k.device),
        num_warps=4,
    )


_written = ("k_cache", "v_cache", "k_scale", "v_scale")
torch.library.custom_op("m3kernels::kv_write", _launch, mutates_args=_written).register_fake(lambda *_: None)
