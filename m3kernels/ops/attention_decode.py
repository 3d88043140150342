"""Attention of a few new tokens over a key/value cache: split along the keys, combined in a second step.

    out = softmax(scale * q k^T over the first ``lengths[b]`` keys, causal among the new tokens) v

One program takes one key/value head of one sequence and one stretch of its keys; the H / G query heads that share the head and
the N new tokens are the rows of one small matrix product. Partial results and their log-sum-exps (fp32) go to memory
and are combined in a fixed order. How many stretches there are depends on shapes only, how long they are on the lengths,
which stay on the device: a CUDA graph may replay the call while the cache fills.

An E4M3 cache has a scale for each token and head: scores are multiplied by the keys', weights by the values', in fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._attention_kernels import LOG2E, load_rows, softmax_end, softmax_step
from m3kernels.ops._attention_triton import dense, like
from m3kernels.ops._common import launch, next_power_of_2, overlap_meta, sm_count, use_triton
from m3kernels.ops._decode_products import E4M3_HALF, as_number, moves_bits
from m3kernels.ops._triton import tl, triton
from m3kernels.ops.fp8_dequantize import FP8

MAX_NEW_TOKENS = 16
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class DecodeConfig:
    """Keys of one tile, warps, load stages, and programs wanted on each SM.

    Of 7 x 6, H100: 61.6 us for 32,768 keys at batch 1 (best 60.5), 105 for 16 x 4,096 (103), 369 for 64 x 4,096 (367).
    """

    keys: int = 64
    warps: int = 4
    stages: int = 4
    programs_per_sm: int = 1


CONFIG = DecodeConfig()
# at head_dim 256, or 128 in fp32, four stages would not fit
WIDE_STAGES = 2


@triton.jit(do_not_specialize=["seq_k", "window"])
def attention_decode_kernel(
    p_q,
    p_k,
    p_v,
    p_k_scale,
    p_v_scale,
    p_length,
    p_ranges,
    p_partial,
    p_lse,
    q_batch_stride,
    q_head_stride,
    q_seq_stride,
    k_batch_stride,
    k_head_stride,
    k_seq_stride,
    v_batch_stride,
    v_head_stride,
    v_seq_stride,
    k_scale_batch_stride,
    k_scale_head_stride,
    v_scale_batch_stride,
    v_scale_head_stride,
    seq_k,
    scale,
    window,
    NEW: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    LENGTHS: tl.constexpr,
    RANGES: tl.constexpr,
    SCALED: tl.constexpr,
    MOVED: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, at = tl.num_programs(0), tl.program_id(2).to(tl.int64)
    # row r is new token r % NEW of the group's head r // NEW
    o_row, o_dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    token, m_row = o_row % NEW, o_row < GROUP * NEW
    head = (kv_head * GROUP + o_row // NEW).to(tl.int64)
    o_q = at * q_batch_stride + head * q_head_stride + token.to(tl.int64) * q_seq_stride
    m_q = m_row[:, None] & (o_dim < DIM)[None, :]
    b_q = tl.load(p_q + o_q[:, None] + o_dim[None, :], mask=m_q, other=0.0)
    # keys and values that are 2^-120 of themselves (see as_number) get half of it back from q and from the weights
    HALF: tl.constexpr = E4M3_HALF if MOVED else 1.0
    if MOVED:
        b_q = (b_q.to(tl.float32) * HALF).to(b_q.dtype)
    if RANGES:
        lo = tl.maximum(tl.load(p_ranges + (at * NEW + token) * 2), 0)
        hi = tl.minimum(tl.load(p_ranges + (at * NEW + token) * 2 + 1), seq_k)
    else:
        length = seq_k
        if LENGTHS:
            length = tl.load(p_length + batch).to(tl.int32)
        # the last new token sees all keys, the one before all but the last
        hi = length - NEW + 1 + token
        lo = tl.zeros_like(hi)
        if WINDOW:
            lo = tl.maximum(hi - window, 0)
    first_key, last_key = tl.min(lo, axis=0) // BLOCK_K * BLOCK_K, tl.max(hi, axis=0)
    stretch = tl.cdiv(tl.cdiv(last_key - first_key, splits), BLOCK_K) * BLOCK_K
    begin = first_key + split * stretch
    end = tl.minimum(begin + stretch, last_key)

    p_k += at * k_batch_stride + kv_head.to(tl.int64) * k_head_stride
    p_v += at * v_batch_stride + kv_head.to(tl.int64) * v_head_stride
    if SCALED:
        p_k_scale += at * k_scale_batch_stride + kv_head.to(tl.int64) * k_scale_head_stride
        p_v_scale += at * v_scale_batch_stride + kv_head.to(tl.int64) * v_scale_head_stride
    to_base2 = tl.cast(scale, tl.float32) * LOG2E
    b_top = tl.full([ROWS], -float("inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for start in range(begin, end, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        # what lies behind the last key is anything, NaN included
        b_k = load_rows(p_k, o_k, end, k_seq_stride, o_dim, DIM, True)
        b_v = load_rows(p_v, o_k, end, v_seq_stride, o_dim, DIM, True)
        scores = tl.dot(b_q, tl.trans(as_number(b_k, b_q.dtype, MOVED)), input_precision=PRECISION)
        v_scale = None
        if SCALED:
            scores *= tl.load(p_k_scale + o_k, mask=o_k < end, other=0.0)[None, :] * HALF
            v_scale = tl.load(p_v_scale + o_k, mask=o_k < end, other=0.0) * HALF
            if b_q.dtype == tl.float16:  # weights times a small scale would be too small for it
                b_v = (b_v.to(tl.float32) * v_scale[:, None]).to(tl.float16)
                v_scale = None
            else:
                b_v = as_number(b_v, b_q.dtype, MOVED)
        seen = (o_k[None, :] >= lo[:, None]) & (o_k[None, :] < tl.minimum(hi, end)[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        b_top, b_sum, b_out = softmax_step(b_top, b_sum, b_out, scores, to_base2, b_v, PRECISION, v_scale)

    b_out, lse = softmax_end(b_top, b_sum, b_out)
    if MOVED:
        b_out *= HALF
    # partial results lie (batch, kv_head, row, split, dim): what one row combines is together
    o_out = ((at * tl.num_programs(1) + kv_head) * (GROUP * NEW) + o_row) * splits + split
    tl.store(p_partial + o_out[:, None] * DIM + o_dim[None, :], b_out, mask=m_q)
    tl.store(p_lse + o_out, lse, mask=m_row)


@triton.jit
def attention_combine_kernel(
    p_partial,
    p_lse,
    p_out,
    out_batch_stride,
    out_head_stride,
    out_seq_stride,
    splits,
    NEW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: the partial results weighted by exp(their lse - the largest)."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    batch, head, token = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
    row = (batch * tl.num_programs(1) + head) * NEW + token
    o_split, o_dim = tl.arange(0, BLOCK_SPLIT), tl.arange(0, BLOCK_DIM)
    lse = tl.load(p_lse + row * splits + o_split, mask=o_split < splits, other=-float("inf"))
    top = tl.max(lse, axis=0)
    weight = tl.math.exp2((lse - tl.where(top == -float("inf"), 0.0, top)) * LOG2E)
    total = tl.sum(weight, axis=0)
    mask = (o_split < splits)[:, None] & (o_dim < DIM)[None, :]
    partial = tl.load(p_partial + (row * splits + o_split)[:, None] * DIM + o_dim[None, :], mask=mask, other=0.0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    p_out += batch * out_batch_stride + head * out_head_stride + token.to(tl.int64) * out_seq_stride
    tl.store(p_out + o_dim, out.to(p_out.dtype.element_ty), mask=o_dim < DIM)


def splits_for(sequences: int, kv_heads: int, keys: int, multiprocessors: int, config: DecodeConfig = CONFIG) -> int:
    """Stretches a sequence's keys are cut into: enough programs for all SMs, none under two tiles, a power of two at most 64."""
    wanted = multiprocessors * config.programs_per_sm // max(1, sequences * kv_heads)
    most = max(1, keys // (2 * config.keys))
    n = max(1, min(wanted, most, 64))
    return 1 << (n.bit_length() - 1)


def warps_for(block_dim: int, scaled: bool) -> int:
    """A tile of E4M3 and its numbers need more registers than four warps have at head_dim 256."""
    return CONFIG.warps * 2 if scaled and block_dim > 128 else CONFIG.warps


def _ranges(q: Tensor, k_cache: Tensor, lengths: Tensor | None, window: int | None) -> Tensor:
    """(B, N, 2): the keys [lo, hi) that each new token sees."""
    batch, new = q.shape[0], q.shape[2]
    lengths = torch.full((batch,), k_cache.shape[2], device=q.device) if lengths is None else lengths.long()
    hi = lengths[:, None] - new + 1 + torch.arange(new, device=q.device)
    lo = torch.zeros_like(hi) if window is None else (hi - window).clamp(min=0)
    return torch.stack([lo, hi], dim=-1)


def attention_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    key_ranges: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch over the whole cache with a mask; softmax in fp32 at least, an E4M3 cache's products as well."""
    if k_scale is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (x.to(wide) * s[..., None].to(wide) for x, s in ((k_cache, k_scale), (v_cache, v_scale)))
        masks = {"key_ranges": key_ranges, "window": window, "scale": scale}
        return attention_decode_reference(q.to(wide), k, v, lengths, **masks).to(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k_cache.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k_cache, v_cache))
    ranges = _ranges(q, k_cache, lengths, window) if key_ranges is None else key_ranges
    key = torch.arange(k.shape[2], device=q.device)
    seen = (key >= ranges[..., :1]) & (key < ranges[..., 1:])
    # what nobody sees is anything, NaN included
    filled = seen.any(dim=1)[:, None, :, None]
    k, v = torch.where(filled, k, 0), torch.where(filled, v, 0)
    scores = ((q @ k.transpose(-1, -2)) * scale).to(torch.promote_types(q.dtype, torch.float32))
    p = torch.softmax(scores.masked_fill(~seen[:, None], -float("inf")), dim=-1).nan_to_num(0.0)
    return p.to(q.dtype) @ v


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    key_ranges: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the newest tokens of each sequence over its cache, which already holds their keys and values.

    Args:
        q: (B, H, N, D), 1 to 16 new tokens, in fp32, bf16 or fp16, any strides with a dense last dimension.
        k_cache, v_cache: (B, G, T, D) caches in q's dtype, or in E4M3 with scales; H a multiple of G; only the first
            ``lengths[b]`` keys are read.
        lengths: (B,) integers on the device: keys in the cache, the new tokens' included; None: all T. Never read by the
            host. A new token that no key is left for (``lengths[b]`` < N) gives 0.
        key_ranges: (B, N, 2) int32 on the device in place of ``lengths`` and ``window``: each new token sees keys lo to
            hi - 1 (caches with padding on the left).
        window: how many keys a token sees, itself included; None: all.
        scale: of the scores, positive; None: D ** -0.5.
        k_scale, v_scale: (B, G, T) fp32, dense along T, of E4M3 caches: what each token's head is multiplied with
            (:func:`m3kernels.ops.kv_write` makes them).
        backend: "auto", "triton" or "reference".

    Returns:
        (B, H, N, D), a view of (B, N, H, D) memory; no gradient.

    Raises:
        ValueError: shapes or dtypes that do not fit; tensors that require a gradient.
    """
    shapes = f"got q {tuple(q.shape)}, caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[::3] != k_cache.shape[::3]:
        raise ValueError(f"attention_decode: needs q (B, H, N, D) and caches (B, G, T, D), {shapes}")
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.is_floating_point()):
        raise ValueError(f"attention_decode: lengths must be integers (B,), got {tuple(lengths.shape)}, {shapes}")
    if key_ranges is not None and (key_ranges.shape != (q.shape[0], q.shape[2], 2) or key_ranges.dtype != torch.int32):
        raise ValueError(
            f"attention_decode: key_ranges must be (B, N, 2) int32, got {tuple(key_ranges.shape)} {key_ranges.dtype}, {shapes}"
        )
    if key_ranges is not None and lengths is not None:
        raise ValueError("attention_decode: key_ranges and lengths exclude each other")
    if k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1] or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"attention_decode: H must be a multiple of G and D at most {MAX_HEAD_DIM}, {shapes}")
    if not 1 <= q.shape[2] <= MAX_NEW_TOKENS:
        raise ValueError(f"attention_decode: takes 1 to {MAX_NEW_TOKENS} new tokens, {shapes}; longer: attention()")
    _check_dtypes(q, k_cache, v_cache, k_scale, v_scale)
    if window is not None and window < 1:
        raise ValueError(f"attention_decode: a window holds at least 1 key, got {window}")
    if scale is not None and not scale > 0:
        raise ValueError(f"attention_decode: scale must be positive, got {scale}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        raise ValueError("attention_decode has no backward: call it under torch.no_grad(), or use attention()")
    kept = (k_cache, v_cache) if k_scale is None else (k_scale, v_scale)
    if not use_triton("attention_decode", backend, q, *kept):
        options = {"key_ranges": key_ranges, "window": window, "scale": scale, "k_scale": k_scale, "v_scale": v_scale}
        return attention_decode_reference(q, k_cache, v_cache, lengths, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = torch.ops.m3kernels.attention_decode if torch.compiler.is_compiling() else _launch
    return run(q, k_cache, v_cache, lengths, key_ranges, window or 0, scale, k_scale, v_scale)


def _check_dtypes(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    kept = q.dtype if k_scale is None and v_scale is None else FP8
    if not kept == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"attention_decode: caches must have q's dtype, or be {FP8} with k_scale and v_scale; one dtype, "
            f"got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if kept == q.dtype:
        return
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (
            t is None
            or t.shape != k_cache.shape[:3]
            or t.dtype != torch.float32
            or (t.shape[2] > 1 and t.stride(2) != 1)
        ):
            found = "None" if t is None else f"{tuple(t.shape)} {t.dtype}, strides {t.stride()}"
            raise ValueError(
                f"attention_decode: {name} must be {tuple(k_cache.shape[:3])} fp32, dense along the last; got {found}"
            )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    ranges: Tensor | None,
    window: int,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    (batch, heads, new, dim), kv_heads = q.shape, k.shape[1]
    out = like(q)
    if out.numel() == 0:
        return out
    q, k, v = dense(q), dense(k), dense(v)
    group = heads // kv_heads
    splits = splits_for(batch, kv_heads, min(k.shape[2], window + new) if window else k.shape[2], sm_count(q.device))
    partial = torch.empty((batch, heads, new, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, new, splits), dtype=torch.float32, device=q.device)
    block_dim = max(16, next_power_of_2(dim))
    launch(
        "attention_decode",
        attention_decode_kernel,
        (splits, kv_heads, batch),
        *(q, k, v, *(lse if t is None else t for t in (k_scale, v_scale, lengths, ranges)), partial, lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *((0, 0, 0, 0) if k_scale is None else (*k_scale.stride()[:2], *v_scale.stride()[:2])),
        *(k.shape[2], scale, window),
        NEW=new,
        GROUP=group,
        ROWS=max(16, next_power_of_2(group * new)),
        DIM=dim,
        BLOCK_DIM=block_dim,
        BLOCK_K=CONFIG.keys,
        WINDOW=window > 0,
        LENGTHS=lengths is not None,
        RANGES=ranges is not None,
        SCALED=k_scale is not None,
        MOVED=k_scale is not None and moves_bits(q.dtype),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=warps_for(block_dim, k_scale is not None),
        num_stages=CONFIG.stages if block_dim * q.element_size() <= 256 else WIDE_STAGES,
        **overlap_meta(q.device),
    )
    meta = {"NEW": new, "DIM": dim, "BLOCK_DIM": block_dim, "BLOCK_SPLIT": next_power_of_2(splits)}
    grid = (new, heads, batch)
    launch(
        "attention_decode",
        attention_combine_kernel,
        grid,
        partial,
        lse,
        out,
        *out.stride()[:3],
        splits,
        **meta,
        **overlap_meta(q.device),
    )
    return out


torch.library.custom_op("m3kernels::attention_decode", _launch, mutates_args=()).register_fake(lambda q, *_: like(q))
