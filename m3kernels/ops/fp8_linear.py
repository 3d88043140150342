"""A frozen linear layer with an FP8 weight: ``y = x W^T + bias``, ``dx = dy W``, W being ``weight.float() * scale`` in x's dtype.

Activations are not quantised: results are those of the layer that transformers loads with ``dequantize=True``. W is made anew
for each of the two products (:mod:`m3kernels.ops.fp8_dequantize`) and let go: what stays between them is the FP8 weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.ops._common import fused_op, use_triton
from m3kernels.ops.fp8_dequantize import WHOLE, check_fp8, fp8_dequantize, fp8_dequantize_reference, fp32_scale


def dense(weight: Tensor, scale: Tensor, block_rows: int, block_columns: int, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``, by whatever runs on its device."""
    block_size = None if block_rows == WHOLE else (block_rows, block_columns)
    return fp8_dequantize(weight, scale, block_size=block_size, dtype=dtype)


def _forward(x: Tensor, weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return torch.mm(x, dense(weight, scale, block_rows, block_columns, x.dtype).T)


def _forward_fake(x, weight, scale, block_rows, block_columns):
    return x.new_empty((x.shape[0], weight.shape[0]))


def _backward(dy: Tensor, weight: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return torch.mm(dy, dense(weight, scale, block_rows, block_columns, dy.dtype))


def _backward_fake(dy, weight, scale, block_rows, block_columns):
    return dy.new_empty((dy.shape[0], weight.shape[1]))


def _setup_context(ctx, inputs, output):
    _, weight, scale, *ctx.block = inputs
    ctx.save_for_backward(weight, scale)


def _gradients(ctx, run_backward, dy):
    return run_backward(dy, *ctx.saved_tensors, *ctx.block), None, None, None, None


_fp8_linear = fused_op(
    "fp8_linear",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    gradients=_gradients,
)


def fp8_linear_reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, block_size: tuple[int, int] | None = None
) -> Tensor:
    """Plain PyTorch: a linear layer with the dequantised weight, which autograd keeps for the backward."""
    y = F.linear(x, fp8_dequantize_reference(weight.detach(), scale.detach(), block_size, x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """``x (weight * scale)^T + bias`` with a frozen FP8 weight.

    Args:
        x: (..., K) in fp32, bf16, fp16 or fp64.
        weight, scale, block_size: as in :func:`m3kernels.ops.fp8_dequantize`.
        bias: (N,) or None.
        backend: "auto", "triton" (both as above) or "reference", whose dequantised weight lasts until the backward.

    Returns:
        (..., N) in x's dtype. Differentiable once in x and bias; weight and scale get no gradient.

    Raises:
        ValueError, TypeError: as :func:`m3kernels.ops.fp8_dequantize`; an x that is not (..., K).
    """
    check_fp8("fp8_linear", weight, scale, block_size)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"fp8_linear: needs x (..., K), weight (N, K), got {tuple(x.shape)}, {tuple(weight.shape)}")
    scale = fp32_scale(scale)
    use_triton("fp8_linear", backend, x, scale)
    if backend == "reference" or (torch.compiler.is_compiling() and not torch.is_grad_enabled()):
        return fp8_linear_reference(x, weight, scale, bias, block_size=block_size)
    rows = x.reshape(-1, x.shape[-1])
    y = _fp8_linear(rows, weight.detach(), scale, *(block_size or (WHOLE, WHOLE)))
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)
