"""Grouped-query attention, forward and backward: fixed length, packed, padded, windowed, with a cache before the queries.

    p = softmax(scale * q k^T over the keys that a query sees)        out = p v        lse = logsumexp(scale * q k^T)

H query heads share G key/value heads inside the kernels: query head h uses head h // (H / G), nothing is expanded. Under a
causal mask the last query stands beside the last key, so that a cache longer than the queries is one case with none; a
sliding window of w lets a query see the w newest of its keys, itself included (transformers' meaning). A query that sees
nothing gets 0, with a log-sum-exp of -inf and no gradient.

The backward recomputes p from the log-sum-exp, with delta = rowsum(out * dout):

    dv = p^T dout        ds = p * (dout v^T - delta)        dq = scale * ds k        dk = scale * ds^T q

Forward and backward meet in (out, lse) only, so that each is computed by whichever backend is fastest at it
(:mod:`m3kernels.ops._attention_backends`): our Triton kernels or another library's.
"""

import torch
from torch import Tensor

from m3kernels.ops._attention_backends import BACKENDS, choose
from m3kernels.ops._attention_triton import MAX_HEAD_DIM, Problem, like
from m3kernels.ops._common import fused_op, use_triton
from m3kernels.ops._recompute import kept_or


def _problem(cu_q, cu_k, ranges, longest_q, longest_k, causal, window, scale, deterministic) -> Problem:
    """``cu_k`` None where packed: the keys' sequences are the queries', which is told by their being one tensor."""
    cu_k = cu_q if cu_k is None else cu_k
    return Problem(cu_q, cu_k, ranges, longest_q, longest_k, causal, window, scale, deterministic)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    ranges: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    window: int,
    scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out like q, log-sum-exp (B, H, S) in fp32)."""
    if q.numel() == 0 or k.shape[2] == 0 or longest_q == 0:
        out, lse = _forward_fake(q, k, v)
        return out.zero_(), lse.fill_(-float("inf"))
    problem = _problem(cu_q, cu_k, ranges, longest_q, longest_k, causal, window, scale, deterministic)
    return kept_or(lambda: choose("forward", backend, q, k, problem).forward(q, k, v, problem))


def _forward_fake(q, k, v, *_):
    return like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    ranges: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    window: int,
    scale: float,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each like its tensor."""
    if q.numel() == 0 or k.numel() == 0 or longest_q == 0 or longest_k == 0:
        return tuple(g.zero_() for g in _backward_fake(dout, q, k, v))
    problem = _problem(cu_q, cu_k, ranges, longest_q, longest_k, causal, window, scale, deterministic)
    return choose("backward", backend, q, k, problem).backward(dout, q, k, v, out, lse, problem)


def _backward_fake(dout, q, k, v, *_):
    return like(q), like(k), like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_q, cu_k, ranges, *ctx.options = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, ranges)


def _gradients(ctx, run_backward, dout, _):
    if dout is None:
        return (None,) * 13
    return *run_backward(dout, *ctx.saved_tensors, *ctx.options), *(None,) * 10


_attention = fused_op(
    "attention",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def visible(q_len: int, k_len: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(S, T) bool: which keys each query of one sequence sees."""
    query = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    key = torch.arange(k_len, device=device)[None, :]
    seen = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= key > query - window
    return seen


def within(key_ranges: Tensor, keys: int) -> Tensor:
    """(B, 1, S, T) bool out of (B, S, 2) ranges."""
    key = torch.arange(keys, device=key_ranges.device)
    return ((key >= key_ranges[..., :1]) & (key < key_ranges[..., 1:]))[:, None]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch with all scores of a sequence at once, as transformers' eager attention rounds (softmax in fp32 at least).

    Returns:
        (out, lse), as :func:`attention` with ``return_lse``.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens_q is not None:
        of_q, of_k = cu_seqlens_q.tolist(), (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        bounds = zip(of_q, of_q[1:], of_k, of_k[1:])
        options = {"causal": causal, "window": window, "scale": scale}
        parts = [attention_reference(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], **options) for a, b, c, d in bounds]
        return torch.cat([o for o, _ in parts], dim=2), torch.cat([s for _, s in parts], dim=2)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if key_ranges is None:
        seen = visible(q.shape[2], k.shape[2], causal, window, q.device)
    else:
        seen = within(key_ranges, k.shape[2])
        # keys that nobody sees may hold anything, NaN included
        v = torch.where(seen.any(dim=2).unsqueeze(-1), v, 0)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~seen, -float("inf"))
    lse = torch.logsumexp(wide, dim=-1)
    p = torch.where(seen, torch.exp(wide - torch.where(lse == -float("inf"), 0.0, lse)[..., None]), 0.0)
    return p.to(q.dtype) @ v, lse.detach()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_ranges: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads.

    Args:
        q: (B, H, S, D) in fp32, bf16 or fp16, any strides; D at most 256.
        k, v: (B, G, T, D), H a multiple of G.
        causal: the last query stands beside the last key.
        window: with ``causal``, how many keys a query sees, itself included; None: all.
        scale: of the scores, positive; None: D ** -0.5.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 on the tensors' device: B is 1 then, and sequence i has rows
            ``cu[i]`` to ``cu[i + 1]``. ``cu_seqlens_k`` defaults to the queries'.
        max_seqlen_q, max_seqlen_k: the longest packed sequence; None: all rows, which is right and launches more programs.
        key_ranges: (B, S, 2) int32 on the tensors' device: query s of row b sees keys lo to hi - 1, and nothing where
            hi <= lo. It says everything that ``causal``, ``window`` and packing would, which are not looked at then:
            padding, or a static cache that is filled in part. Never read by the host.
        return_lse: also return the log-sum-exp of the scaled scores, (B, H, S) in fp32, without a gradient.
        deterministic: whether gradients are the same bits on every run; None: as torch.use_deterministic_algorithms says.
        backend: "auto" takes the fastest that computes this case exactly; "reference" is plain PyTorch; "triton",
            "hopper", "fa4", "flash" (PyTorch's own FlashAttention-2) and "cudnn" are that one or an error.

    Returns:
        (B, H, S, D), a view of (B, S, H, D) memory. Differentiable once in q, k and v.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, or a backend that cannot do what is asked.
        TypeError: not floating point, or DTensors.
    """
    _check(q, k, v, causal, window, scale, cu_seqlens_q, cu_seqlens_k, key_ranges)
    if backend not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"attention: backend {backend!r} is unknown; allowed: auto, reference, {', '.join(BACKENDS)}")
    kernels = use_triton("attention", backend if backend in ("auto", "triton", "reference") else "auto", q, k, v)
    if not kernels:
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"attention: backend={backend!r} needs a GPU and fp32, bf16 or fp16, got {q.device} {q.dtype}"
            )
        masks = {"causal": causal, "window": window, "scale": scale, "key_ranges": key_ranges}
        out, lse = attention_reference(q, k, v, **masks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        return (out, lse) if return_lse else out
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None
    if key_ranges is not None:
        causal, window = False, None
    out, lse = _attention(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, key_ranges),
        q.shape[2] if max_seqlen_q is None else max_seqlen_q,
        k.shape[2] if max_seqlen_k is None else max_seqlen_k,
        causal,
        0 if window is None else window,
        q.shape[-1] ** -0.5 if scale is None else scale,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        backend,
    )
    return (out, lse) if return_lse else out


def _check(q, k, v, causal, window, scale, cu_q, cu_k, ranges) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)) or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"attention: needs q (B, H, S, D) and k, v (B, G, T, D), {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: query heads must be a multiple of key/value heads, {shapes}")
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim is {q.shape[3]}, at most {MAX_HEAD_DIM}; use backend='reference'")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and (not causal or window < 1):
        raise ValueError(
            f"attention: a window needs causal=True and at least 1 key, got window={window}, causal={causal}"
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"attention: scale must be positive, got {scale}")
    if cu_q is None and cu_k is not None:
        raise ValueError("attention: cu_seqlens_k was given without cu_seqlens_q")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu is not None and (cu.dim() != 1 or cu.numel() < 2 or cu.dtype != torch.int32 or cu.device != q.device):
            raise ValueError(
                f"attention: {name} must be (sequences + 1,) int32 on {q.device}, got {cu.dtype} {cu.shape}"
            )
        if cu is not None and q.shape[0] != 1:
            raise ValueError(f"attention: packed sequences are one row (B = 1), {shapes}")
    if cu_q is not None and cu_k is not None and cu_q.numel() != cu_k.numel():
        raise ValueError(f"attention: {cu_q.numel() - 1} query and {cu_k.numel() - 1} key sequences were given")
    if ranges is None:
        return
    if cu_q is not None:
        raise ValueError("attention: key_ranges and cu_seqlens_q exclude each other")
    if ranges.shape != (q.shape[0], q.shape[2], 2) or ranges.dtype != torch.int32 or ranges.device != q.device:
        raise ValueError(
            f"attention: key_ranges must be (B, S, 2) int32 on {q.device}, got {tuple(ranges.shape)} {ranges.dtype} on "
            f"{ranges.device}; {shapes}"
        )
