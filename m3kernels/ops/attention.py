"""Grouped-query attention, forward and backward, fixed length or packed.

    p = softmax(scale * q k^T over the keys that a query sees)        out = p v        lse = logsumexp(scale * q k^T)

H query heads share G key/value heads inside the kernels: query head h uses head h // (H / G), nothing is expanded. Under a
causal mask the last query stands beside the last key, so that a cache longer than the queries is one case with none; a
sliding window of w lets a query see the w newest of its keys, itself included (transformers' meaning). A query that sees
nothing gets 0, with a log-sum-exp of -inf and no gradient.

The backward recomputes p from the log-sum-exp, with delta = rowsum(out * dout):

    dv = p^T dout        ds = p * (dout v^T - delta)        dq = scale * ds k        dk = scale * ds^T q

in two kernels, one over keys and one over queries: seven products instead of five, no atomics, the same bits on every run; or
in one that adds dq's parts by atomics.

Not exported and not patched into models yet: it compiles for sm_90a and is checked in Triton's interpreter, and has not run
on a GPU (docs/performance.md will say when it has).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._attention_kernels import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    attention_delta_kernel,
    attention_fwd_kernel,
)
from m3kernels.ops._common import cdiv, fused_op, launch, next_power_of_2, use_triton
from m3kernels.ops._triton import INTERPRET, triton

MAX_HEAD_DIM = 256
LN2 = 0.6931471805599453


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys of one tile, warps, and load stages.

    ``tma``: loads by device-side descriptors in a warp of their own (forward only). Triton specialises warps with 4 of them, in
    one loop, and where all its loads are descriptors.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False

    def meta(self) -> dict:
        return {"BLOCK_Q": self.queries, "BLOCK_K": self.keys, "num_warps": self.warps, "num_stages": self.stages}


# to be measured; these compile for sm_90a without serialised products, and without spills but at head_dim 80 (16 bytes)
FORWARD = {64: TileConfig(128, 64, 4, 3), 128: TileConfig(128, 128, 4, 2, tma=True), 256: TileConfig(64, 64, 8, 2)}
# where the tensors' strides or addresses are no multiples of 16 bytes
FORWARD_BY_POINTERS = FORWARD | {128: TileConfig(128, 64, 8, 3)}
DKDV = {64: TileConfig(64, 64, 4, 2), 128: TileConfig(64, 64, 8, 2), 256: TileConfig(32, 32, 8, 1)}
DQ = {64: TileConfig(64, 64, 4, 2), 128: TileConfig(128, 64, 8, 2), 256: TileConfig(32, 32, 8, 1)}
FUSED = {64: TileConfig(64, 64, 8, 2), 128: TileConfig(128, 64, 8, 1), 256: TileConfig(32, 32, 8, 1)}
# fp32 tiles are twice the bytes, and the interpreter wants few programs of any size
WIDE = TileConfig(32, 32, 4, 1)


def tile_config(table: dict[int, TileConfig], head_dim: int, dtype: torch.dtype) -> TileConfig:
    if dtype == torch.float32 or INTERPRET:
        return WIDE
    return table[max(64, next_power_of_2(head_dim))]


def _fits_descriptors(*tensors: Tensor) -> bool:
    """Whether the copy engine can address rows: 16-byte multiples everywhere, at least 16 bytes a row."""
    return all(
        t.data_ptr() % 16 == 0
        and t.shape[-1] * t.element_size() >= 16
        and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory that a launch keeps its descriptors in."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@dataclass(frozen=True)
class Layout:
    """What all kernels of one call take: grid dimensions, masks, and where sequences begin."""

    sequences: int
    longest_q: int
    longest_k: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    causal: bool
    window: int
    scale: float

    def meta(self, group: int, dim: int, dtype: torch.dtype) -> dict:
        return {
            "GROUP": group,
            "DIM": dim,
            "BLOCK_DIM": max(16, next_power_of_2(dim)),
            "CAUSAL": self.causal,
            "WINDOW": self.window > 0,
            "PACKED": self.cu_q is not None,
            # TF32 would round fp32 inputs to 10 bits
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }

    def strides(self, *tensors: Tensor) -> list[int]:
        """(batch, head, seq) strides of each; a packed batch is one row, whose sequences cu_seqlens finds."""
        found = []
        for t in tensors:
            found += [0 if self.cu_q is not None else t.stride(0), t.stride(1)] + (
                [t.stride(2)] if t.dim() == 4 else []
            )
        return found


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """(B, H, S, D) seen through (B, S, H, D) memory, as projections take it."""
    batch, heads, seq, dim = x.shape
    return x.new_empty((batch, seq, heads, dim)).transpose(1, 2)


def _layout(q, k, cu_q, cu_k, longest_q, longest_k, causal, window, scale) -> Layout:
    packed = cu_q is not None
    sequences = cu_q.numel() - 1 if packed else q.shape[0]
    longest = (longest_q, longest_k) if packed else (q.shape[2], k.shape[2])
    return Layout(sequences, *longest, cu_q, cu_k, causal, window, scale)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    window: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out like q, log-sum-exp in base 2, (B, H, S) in fp32)."""
    out, lse = _forward_fake(q, k, v)
    layout = _layout(q, k, cu_q, cu_k, longest_q, longest_k, causal, window, scale)
    if out.numel() == 0 or layout.longest_q == 0:
        return out, lse
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    q, k, v = _dense(q), _dense(k), _dense(v)
    heads, dim = q.shape[1], q.shape[3]
    config = tile_config(FORWARD if _fits_descriptors(q, k, v) else FORWARD_BY_POINTERS, dim, q.dtype)
    if config.tma and not INTERPRET:
        # a context variable: autograd's threads, where checkpointing runs forwards, do not have the main one's
        triton.set_allocator(_scratch)
    cu_q, cu_k = (lse, lse) if cu_q is None else (cu_q, cu_k)
    launch(
        "attention",
        attention_fwd_kernel,
        (cdiv(layout.longest_q, config.queries), heads, layout.sequences),
        *(q, k, v, out, lse, cu_q, cu_k),
        *layout.strides(q, k, v, out, lse),
        *(layout.longest_q, layout.longest_k, scale, window),
        TMA=config.tma,
        **layout.meta(heads // k.shape[1], dim, q.dtype),
        **config.meta(),
    )
    return out, lse


def _forward_fake(q, k, v, *_):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    window: int,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each like its tensor."""
    dq, dk, dv = _like(q), _like(k), _like(v)
    layout = _layout(q, k, cu_q, cu_k, longest_q, longest_k, causal, window, scale)
    if q.numel() == 0 or k.numel() == 0 or layout.longest_q == 0 or layout.longest_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, q, k, v = _dense(dout), _dense(q), _dense(k), _dense(v)
    (batch, heads, seq, dim), kv_heads = q.shape, k.shape[1]
    meta = layout.meta(heads // kv_heads, dim, q.dtype)
    delta = torch.empty_like(lse)
    launch(
        "attention backward (delta)",
        attention_delta_kernel,
        (cdiv(seq, 64), heads, batch),
        *(out, dout, delta),
        *(*out.stride()[:3], *dout.stride()[:3], *delta.stride()[:2], seq),
        DIM=dim,
        BLOCK_DIM=meta["BLOCK_DIM"],
        BLOCK=64,
    )
    pointers = (lse, lse) if cu_q is None else (cu_q, cu_k)
    lengths = (layout.longest_q, layout.longest_k, scale, window)
    added = dq if deterministic else torch.zeros_like(dq, dtype=torch.float32)
    config = tile_config(DKDV if deterministic else FUSED, dim, q.dtype)
    launch(
        "attention backward",
        attention_bwd_dkdv_kernel,
        (cdiv(layout.longest_k, config.keys), kv_heads, layout.sequences),
        *(q, k, v, dout, lse, delta, dk, dv, added, *pointers),
        *layout.strides(q, k, v, dout, dk, added, lse),
        *lengths,
        ADDS_DQ=not deterministic,
        **meta,
        **config.meta(),
    )
    if not deterministic:
        return added.mul_(scale).to(q.dtype), dk, dv
    config = tile_config(DQ, dim, q.dtype)
    launch(
        "attention backward (dq)",
        attention_bwd_dq_kernel,
        (cdiv(layout.longest_q, config.queries), heads, layout.sequences),
        *(q, k, v, dout, lse, delta, dq, *pointers),
        *layout.strides(q, k, v, dout, dq, lse),
        *lengths,
        **meta,
        **config.meta(),
    )
    return dq, dk, dv


def _backward_fake(dout, q, k, v, out, lse, *_):
    return _like(q), _like(k), _like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _gradients(ctx, run_backward, dout, _):
    if dout is None:
        return (None,) * 11
    return *run_backward(dout, *ctx.saved_tensors, *ctx.options), *(None,) * 8


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
    seen = visible(q.shape[2], k.shape[2], causal, window, q.device)
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
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with grouped heads.

    Args:
        q: (B, H, S, D) in fp32, bf16 or fp16, any strides; D at most 256.
        k, v: (B, G, T, D), H a multiple of G.
        causal: the last query stands beside the last key.
        window: with ``causal``, how many keys a query sees, itself included; None: all.
        scale: of the scores; None: D ** -0.5.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 on the tensors' device: B is 1 then, and sequence i has rows
            ``cu[i]`` to ``cu[i + 1]``. ``cu_seqlens_k`` defaults to the queries'.
        max_seqlen_q, max_seqlen_k: the longest packed sequence; None: all rows, which is right and launches more programs.
        return_lse: also return the log-sum-exp of the scaled scores, (B, H, S) in fp32, without a gradient.
        deterministic: of the gradients; False adds dq's parts by atomics, in one pass and in no fixed order.
        backend: "auto", "triton" or "reference".

    Returns:
        (B, H, S, D), a view of (B, S, H, D) memory. Differentiable once in q, k and v.

    Raises:
        ValueError: shapes, dtypes or options that do not fit. TypeError: not floating point, or DTensors.
    """
    _check(q, k, v, causal, window, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    options = {"causal": causal, "window": window, "scale": scale}
    if not use_triton("attention", backend, q, k, v):
        out, lse = attention_reference(q, k, v, **options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        return (out, lse) if return_lse else out
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    longest_q = q.shape[2] if max_seqlen_q is None else max_seqlen_q
    longest_k = k.shape[2] if max_seqlen_k is None else max_seqlen_k
    masks = (causal, 0 if window is None else window, scale)
    out, lse = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *masks, deterministic)
    return (out, lse * LN2) if return_lse else out


def _check(q, k, v, causal, window, cu_q, cu_k) -> None:
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
