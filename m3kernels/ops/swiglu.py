"""SwiGLU activation: ``silu(gate) * up`` with ``silu(g) = g * sigmoid(g)``.

Matches ``act_fn(gate_proj(x)) * up_proj(x)`` of Ministral3MLP and PixtralMLP with ``hidden_act="silu"``. Only the inputs
are saved; the backward recomputes the activation in registers and writes neither input:

    s = sigmoid(gate)        dgate = dy * up * s * (1 + gate * (1 - s))        dup = dy * gate * s

Arithmetic is fp32 from the loads to the final rounding (eager also rounds silu(gate) in between).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops._common import cdiv, fused_op, launch, rows_of, use_triton
from m3kernels.ops._triton import tl, triton


@dataclass(frozen=True)
class TileConfig:
    """Columns one program handles, and its warps. These were the best of 12 at widths 9,216 and 14,336 (H200)."""

    block: int = 2048
    warps: int = 8


CONFIG = TileConfig()


@triton.jit
def _tile(width, BLOCK: tl.constexpr):
    tiles = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    return pid // tiles, (pid % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def swiglu_fwd_kernel(p_gate, p_up, p_y, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    # neighbouring programs work on neighbouring memory
    row, o_col = _tile(width, BLOCK)
    mask = o_col < width
    gate = tl.load(p_gate + row * gate_stride + o_col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_up + row * up_stride + o_col, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(p_y + row * width + o_col, y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    p_dy, p_gate, p_up, p_dgate, p_dup, gate_stride, up_stride, dgate_stride, dup_stride, width, BLOCK: tl.constexpr
):
    # neighbouring programs work on neighbouring memory
    row, o_col = _tile(width, BLOCK)
    mask = o_col < width
    dy = tl.load(p_dy + row * width + o_col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_gate + row * gate_stride + o_col, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_up + row * up_stride + o_col, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    dup = dy * gate * s
    tl.store(p_dgate + row * dgate_stride + o_col, dgate.to(p_dgate.dtype.element_ty), mask=mask)
    tl.store(p_dup + row * dup_stride + o_col, dup.to(p_dup.dtype.element_ty), mask=mask)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(rows, width) views of gate and up, whether they come apart or as one fused (..., 2 * width) tensor."""
    if up is not None:
        return rows_of(gate), rows_of(up)
    fused = rows_of(gate)
    return fused.chunk(2, dim=-1)


def _forward(gate: Tensor, up: Tensor | None) -> Tensor:
    y = _forward_fake(gate, up)
    if y.numel() == 0:
        return y
    g, u = _halves(gate, up)
    rows, width = g.shape
    grid = (rows * cdiv(width, CONFIG.block),)
    strides = (g.stride(0), u.stride(0))
    launch("swiglu", swiglu_fwd_kernel, grid, g, u, y, *strides, width, BLOCK=CONFIG.block, num_warps=CONFIG.warps)
    return y


def _forward_fake(gate: Tensor, up: Tensor | None) -> Tensor:
    width = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    return gate.new_empty((*gate.shape[:-1], width))


def _backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns (dgate, dup); for a fused input (dgate_up, an empty tensor)."""
    dgate, dup = _backward_fake(dy, gate, up)
    if dgate.numel() == 0:
        return dgate, dup
    g, u = _halves(gate, up)
    dg, du = _halves(dgate, dup if up is not None else None)
    rows, width = g.shape
    grid = (rows * cdiv(width, CONFIG.block),)
    strides = (g.stride(0), u.stride(0), dg.stride(0), du.stride(0))
    tensors = (dy.contiguous(), g, u, dg, du)
    meta = {"BLOCK": CONFIG.block, "num_warps": CONFIG.warps}
    launch("swiglu backward", swiglu_bwd_kernel, grid, *tensors, *strides, width, **meta)
    return dgate, dup


def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    dup = gate.new_empty((0,)) if up is None else up.new_empty(up.shape)
    return gate.new_empty(gate.shape), dup


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, run_backward, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = run_backward(dy, gate, up)
    return dgate, None if up is None else dup


_swiglu = fused_op(
    "swiglu",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def swiglu_reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Plain PyTorch, with the rounding order of transformers."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.silu(gate) * up).contiguous()


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up``.

    Args:
        gate: (..., width) in fp32, bf16 or fp16, any strides; or, with ``up=None``, the (..., 2 * width) output of one
            fused projection, gate first.
        up: of gate's shape and dtype.
        backend: "auto", "triton" or "reference".

    Returns:
        (..., width), contiguous. Differentiable once; keeps only its inputs for the backward.

    Raises:
        ValueError: shapes or dtypes of gate and up that differ, an odd last dimension of a fused tensor, mixed devices.
        TypeError: tensors that are not floating point; DTensors without :mod:`m3kernels.parallel.sharding_rules`.
    """
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"swiglu: a fused gate_up needs an even last dimension, got {tuple(gate.shape)}")
    elif gate.dim() == 0 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            "swiglu: gate and up must have one shape and dtype, "
            f"got {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        )
    tensors = (gate,) if up is None else (gate, up)
    if not use_triton("swiglu", backend, *tensors, inductor_fuses=True):
        return swiglu_reference(gate, up)
    return _swiglu(gate, up)
