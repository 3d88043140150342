"""Rotary embedding of queries and keys with the Llama-4 query scale, in one launch; and Pixtral's two-dimensional form.

Half-rotated layout, as ``apply_rotary_pos_emb`` of transformers: for a head ``x = [x1 | x2]``

    rotate(x) = [x1 * cos - x2 * sin | x2 * cos + x1 * sin]
    q' = rotate(q) * (1 + beta * ln(1 + floor(position / original_max)))        k' = rotate(k)

The scale (``get_llama_4_attn_scale``) multiplies rotated queries only. The table holds fp32 [cos | sin] built once a
forward from the model's own ``inv_freq`` and ``attention_scaling``, so YaRN is whatever the model made of it; transformers
rounds cos and sin to the activations' dtype instead. The rotation is orthogonal: the backward is the same kernel with the
sine negated. Inputs are never written.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops._common import check_dtensors, fused_op, is_dtensor, launch, next_power_of_2, use_triton
from m3kernels.ops._triton import tl, triton

MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class RotaryConfig:
    """Heads in one tile, and warps: a program rotates all heads of one token. The best of 16 at 8,192 tokens (H200)."""

    heads: int = 32
    warps: int = 4


CONFIG = RotaryConfig()


@triton.jit
def _rotate_heads(
    p_in,
    p_out,
    in_head_stride,
    out_head_stride,
    cos,
    sin,
    scale,
    N_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    o_dim = tl.arange(0, BLOCK_HALF)[None, :]
    for start in tl.static_range(0, N_HEADS, BLOCK_HEADS):
        o_head = start + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (o_head < N_HEADS) & (o_dim < HALF)
        o_in = o_head * in_head_stride + o_dim
        o_out = o_head * out_head_stride + o_dim
        x1 = tl.load(p_in + o_in, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(p_in + o_in + HALF, mask=mask, other=0.0).to(tl.float32)
        y1 = (x1 * cos - x2 * sin) * scale
        y2 = (x2 * cos + x1 * sin) * scale
        tl.store(p_out + o_out, y1.to(p_out.dtype.element_ty), mask=mask)
        tl.store(p_out + o_out + HALF, y2.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    p_q,
    p_k,
    p_q_out,
    p_k_out,
    p_cos,
    p_sin,
    p_position,
    q_batch_stride,
    q_head_stride,
    q_seq_stride,
    k_batch_stride,
    k_head_stride,
    k_seq_stride,
    table_batch_stride,
    table_row_stride,
    position_batch_stride,
    position_seq_stride,
    seq_len,
    beta,
    original_max,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_K_HEADS: tl.constexpr,
    TABLE_BY_POSITION: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = token // seq_len
    seq = token % seq_len
    o_dim = tl.arange(0, BLOCK_HALF)[None, :]

    row = seq
    scale = 1.0
    if TABLE_BY_POSITION or HAS_SCALE:
        position = tl.load(p_position + batch * position_batch_stride + seq * position_seq_stride).to(tl.int64)
        if TABLE_BY_POSITION:
            row = position
        if HAS_SCALE:
            periods = (position // original_max).to(tl.float32)
            scale = 1.0 + tl.cast(beta, tl.float32) * tl.log(1.0 + periods)

    o_table = batch * table_batch_stride + row * table_row_stride + o_dim
    cos = tl.load(p_cos + o_table, mask=o_dim < HALF, other=0.0).to(tl.float32)
    sin = tl.load(p_sin + o_table, mask=o_dim < HALF, other=0.0).to(tl.float32)
    if BACKWARD:
        sin = -sin

    p_q += batch * q_batch_stride + seq * q_seq_stride
    p_k += batch * k_batch_stride + seq * k_seq_stride
    # outputs are (batch, seq, heads, dim) in memory
    p_q_out += token * (Q_HEADS * HALF * 2)
    p_k_out += token * (K_HEADS * HALF * 2)
    _rotate_heads(p_q, p_q_out, q_head_stride, HALF * 2, cos, sin, scale, Q_HEADS, HALF, BLOCK_HALF, BLOCK_Q_HEADS)
    _rotate_heads(p_k, p_k_out, k_head_stride, HALF * 2, cos, sin, 1.0, K_HEADS, HALF, BLOCK_HALF, BLOCK_K_HEADS)


def _empty_like_heads(x: Tensor) -> Tensor:
    """(batch, heads, seq, dim) seen through (batch, seq, heads, dim) memory, as projections give it and attention likes it."""
    batch, heads, seq, dim = x.shape
    return x.new_empty((batch, seq, heads, dim)).transpose(1, 2)


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    beta: float,
    original_max: int,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """One launch over all tokens. ``original_max`` 0 means no query scale; ``positions`` None a table aligned to tokens."""
    q_out, k_out = _empty_like_heads(q), _empty_like_heads(k)
    batch, q_heads, seq, dim = q.shape
    k_heads = k.shape[1]
    if batch * seq == 0:
        return q_out, k_out
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    table_batch_stride = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    at = cos if positions is None else positions
    position_strides = (0, 0) if positions is None else (at.stride(0) if at.shape[0] > 1 else 0, at.stride(1))
    launch(
        "rotary backward" if backward else "rotary",
        rotary_kernel,
        (batch * seq,),
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        at,
        *q.stride()[:3],
        *k.stride()[:3],
        table_batch_stride,
        cos.stride(-2),
        *position_strides,
        seq,
        beta,
        max(original_max, 1),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        HALF=dim // 2,
        BLOCK_HALF=next_power_of_2(dim // 2),
        BLOCK_Q_HEADS=min(CONFIG.heads, next_power_of_2(q_heads)),
        BLOCK_K_HEADS=min(CONFIG.heads, next_power_of_2(k_heads)),
        TABLE_BY_POSITION=cos.dim() == 2 and positions is not None,
        HAS_SCALE=original_max > 0,
        BACKWARD=backward,
        num_warps=CONFIG.warps,
    )
    return q_out, k_out


def _forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, beta: float, original_max: int
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos, sin, positions, beta, original_max, backward=False)


def _backward(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, beta: float, original_max: int
) -> tuple[Tensor, Tensor]:
    return _rotate(dq, dk, cos, sin, positions, beta, original_max, backward=True)


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, beta: float, original_max: int
) -> tuple[Tensor, Tensor]:
    return _empty_like_heads(q), _empty_like_heads(k)


def _setup_context(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.beta, ctx.original_max = inputs
    ctx.save_for_backward(cos, sin, positions)


def _gradients(ctx, run_backward, dq, dk):
    dq, dk = run_backward(dq, dk, *ctx.saved_tensors, ctx.beta, ctx.original_max)
    return dq, dk, None, None, None, None, None


_rotary = fused_op(
    "rotary",
    forward=_forward,
    forward_fake=_fake,
    backward=_backward,
    backward_fake=_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def rotary_table(inv_freq: Tensor, positions: Tensor, attention_scaling: float = 1.0) -> Tensor:
    """fp32 ``[cos | sin]`` of ``positions * inv_freq``, times ``attention_scaling``: one row a token.

    Args:
        inv_freq: (head_dim / 2,), the model's own buffer (YaRN or any other scheme).
        positions: integers of any shape, (batch or 1, seq) for :func:`rotary`.
        attention_scaling: the factor that YaRN puts on cos and sin; 1.0 for Ministral 3.

    Returns:
        (*positions.shape, head_dim) fp32 on the device of ``positions``.
    """
    with torch.no_grad():
        angles = positions[..., None].float() * inv_freq.to(device=positions.device, dtype=torch.float32)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_scaling


def rotary_2d_table(inv_freq: Tensor, positions: Tensor, attention_scaling: float = 1.0) -> Tensor:
    """fp32 ``[cos | sin]`` of Pixtral's axial rotation: even-indexed frequencies turn with the row, odd ones with the column.

    Args:
        inv_freq: (head_dim / 2,) with the row frequencies in the first half and the column frequencies in the second,
            as ``PixtralVisionRotaryEmbedding.inv_freq`` holds them.
        positions: (tokens, 2) integers, row and column of each patch.

    Returns:
        (tokens, head_dim) fp32.
    """
    row, column = positions.unbind(-1)
    row_freq, column_freq = inv_freq.chunk(2)
    with torch.no_grad():
        angles = torch.cat(
            [
                row[:, None].float() * row_freq.to(device=row.device, dtype=torch.float32),
                column[:, None].float() * column_freq.to(device=row.device, dtype=torch.float32),
            ],
            dim=-1,
        )
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_scaling


def llama4_scale(positions: Tensor, beta: float, original_max: int) -> Tensor:
    """``1 + beta * ln(1 + floor(position / original_max))`` in fp32, exactly 1 below ``original_max``."""
    return 1 + beta * torch.log1p((positions // original_max).float())


def halves(cos_sin_table: Tensor | tuple[Tensor, Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (..., dim / 2), of a [cos | sin] table or of transformers' pair with its duplicated halves."""
    if isinstance(cos_sin_table, Tensor):
        return cos_sin_table[..., : dim // 2], cos_sin_table[..., dim // 2 :]
    cos, sin = cos_sin_table
    return cos[..., : dim // 2], sin[..., : dim // 2]


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, heads, seq, dim) over (batch, seq, heads, dim) memory, as the kernel leaves it; cos, sin (..., seq, dim / 2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    x1, x2 = x.transpose(1, 2).to(wide).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).transpose(1, 2)


def rotary_reference(
    q: Tensor,
    k: Tensor,
    cos_sin_table: Tensor | tuple[Tensor, Tensor],
    positions: Tensor,
    llama4: tuple[float, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch with fp32 (fp64 for fp64 inputs) arithmetic and one final rounding."""
    cos, sin = halves(cos_sin_table, q.shape[-1])
    positions = positions.long()
    if cos.dim() == 2:
        cos, sin = cos[positions], sin[positions]
    q_out, k_out = _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)
    if llama4 is not None:
        q_out = q_out * llama4_scale(positions, *llama4)[:, None, :, None]
    return q_out.to(q.dtype), k_out.to(k.dtype)


def rotary_2d_reference(q: Tensor, k: Tensor, cos_sin_table: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: every batch row and head is rotated by the table's row of its token."""
    cos, sin = halves(cos_sin_table, q.shape[-1])
    return _rotate_reference(q, cos, sin).to(q.dtype), _rotate_reference(k, cos, sin).to(k.dtype)


def _check_heads(op: str, q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"{op}: q and k must be (batch, heads, seq, head_dim) and agree in all but heads, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype:
        raise ValueError(f"{op}: q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if q.shape[-1] % 2 or q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be even and at most {MAX_HEAD_DIM}, got {q.shape[-1]}")


def rotary(
    q: Tensor,
    k: Tensor,
    cos_sin_table: Tensor | tuple[Tensor, Tensor],
    positions: Tensor,
    llama4: tuple[float, int] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, and scale queries by position, in one launch.

    Args:
        q: (batch, heads, seq, head_dim), any strides: views of (batch, seq, heads, head_dim) memory cost no copy.
        k: (batch, kv_heads, seq, head_dim).
        cos_sin_table: [cos | sin], fp32 for best accuracy. Either (batch or 1, seq, head_dim) from :func:`rotary_table`,
            one row a token; or (positions, head_dim), looked up by ``positions``. A pair (cos, sin) of such shapes, as
            transformers passes it around, is taken too.
        positions: (batch or 1, seq) non-negative integers: padded, packed, or offset by a cache.
        llama4: ``(beta, original_max_position_embeddings)`` of the query scale; None for no scale.
        backend: "auto", "triton" or "reference".

    Returns:
        (q, k) rotated, new tensors of q's and k's shapes and dtypes over (batch, seq, heads, head_dim) memory.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        TypeError: positions that are not integers; q or k not floating point; DTensors without
            :mod:`m3kernels.parallel.sharding_rules`.
        IndexError: a position beyond a table that is looked up (on CUDA a device-side assertion, as in indexing).
    """
    _check_heads("rotary", q, k)
    batch, _, seq, dim = q.shape
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"rotary: positions must be integers, got {positions.dtype}")
    if positions.shape not in ((batch, seq), (1, seq)):
        raise ValueError(f"rotary: positions must be ({batch} or 1, {seq}), got {tuple(positions.shape)}")
    cos, sin = halves(cos_sin_table, dim)
    by_position = cos.dim() == 2
    rows = ((batch, seq), (1, seq))
    if cos.shape != sin.shape or cos.shape[-1] != dim // 2 or not (by_position or cos.shape[:-1] in rows):
        raise ValueError(
            f"rotary: cos_sin_table must be ({batch} or 1, {seq}, {dim}) or (positions, {dim}), or a pair of such; "
            f"got halves {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if llama4 is not None and (llama4[1] != int(llama4[1]) or llama4[1] < 1):
        raise ValueError(f"rotary: llama4 is (beta, original_max >= 1), got {llama4}")
    runs = use_triton("rotary", backend, q, k, cos, sin, inductor_fuses=True)
    if positions.device != q.device:
        raise ValueError(f"rotary: positions are on {positions.device}, q on {q.device}; move them together")
    if is_dtensor(q) or is_dtensor(positions):
        check_dtensors("rotary", q, positions)
    if by_position:
        _check_positions(positions, cos.shape[0])
    if not runs:
        return rotary_reference(q, k, (cos, sin), positions, llama4)
    beta, original_max = (0.0, 0) if llama4 is None else (float(llama4[0]), int(llama4[1]))
    return _rotary(q, k, cos, sin, positions, beta, original_max)


def _check_positions(positions: Tensor, rows: int) -> None:
    """On CUDA an asynchronous assertion: no synchronisation for a check that usually passes."""
    positions = positions.to_local() if is_dtensor(positions) else positions
    inside = ((positions >= 0) & (positions < rows)).all()
    message = f"rotary: a position lies outside the table of {rows} rows"
    if positions.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(inside, message)
    elif not inside:
        raise IndexError(f"{message}: found {int(positions.min())} to {int(positions.max())}; build a longer table")


def rotary_2d(
    q: Tensor, k: Tensor, cos_sin_table: Tensor | tuple[Tensor, Tensor], *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Pixtral's two-dimensional rotation of queries and keys.

    Args:
        q, k: (batch, heads, tokens, head_dim), any strides; all images of a batch form one row of tokens.
        cos_sin_table: (tokens, head_dim) [cos | sin] from :func:`rotary_2d_table`, or transformers' pair (cos, sin).
        backend: "auto", "triton" or "reference".

    Returns:
        (q, k) rotated, new tensors over (batch, tokens, heads, head_dim) memory.

    Raises:
        ValueError, TypeError: as :func:`rotary`.
    """
    _check_heads("rotary_2d", q, k)
    cos, sin = halves(cos_sin_table, q.shape[-1])
    if cos.shape != sin.shape or cos.shape != (q.shape[2], q.shape[3] // 2):
        raise ValueError(
            f"rotary_2d: cos_sin_table must be {tuple(q.shape[2:])} or a pair of such, "
            f"got halves {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not use_triton("rotary_2d", backend, q, k, cos, sin, inductor_fuses=True):
        return rotary_2d_reference(q, k, (cos, sin))
    return _rotary(q, k, cos, sin, None, 0.0, 0)
