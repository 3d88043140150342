"""DoRA (arXiv 2402.09353): a LoRA layer whose output rows of the weight are rescaled to a trained magnitude.

    y = k * (x W^T + s x A^T B^T) + bias        k = m / norm        norm_n = |W_n + s B_n A|, without a gradient, as in PEFT

W + s B A never reaches memory: one pass over W forms it a tile at a time in registers and adds up its squares, so that nothing
is kept that a load, a merge or an edit of W could leave stale (:mod:`m3kernels.ops._dora_scale`). |W|^2 cached beside two skinny
products would read W as well, and cancel where B A points against W.

k is applied where the product is written; forward and backward are those of :mod:`m3kernels.ops.lora_linear`.
"""

import torch
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._common import use_triton
from m3kernels.ops._dora_scale import scales_of
from m3kernels.ops.lora_linear import Adapted, dora_linear_reference, dora_norm_reference, lora_linears

__all__ = ["dora_linear", "dora_linear_reference", "dora_norm", "dora_norm_reference"]


@torch.no_grad()
def dora_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, backend: str = "auto") -> Tensor:
    """(N,) in fp32 at least, without a gradient: the norm of each row of ``weight + scaling B A``.

    Args:
        weight: (N, K) in fp32, bf16 or fp16.
        A, B: (R, K) and (N, R) of weight's dtype or fp32.
    """
    if not use_triton("dora_linear", backend, weight, A, B, inductor_fuses=True):
        return dora_norm_reference(weight, A, B, scaling)
    norm = torch.ops.m3kernels.dora_norm if torch.compiler.is_compiling() else _norm
    return norm(weight.detach(), A.detach(), B.detach(), float(scaling))


def _norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    layout = skinny.Layout.of(weight, A, 1)
    ones = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
    return scales_of([weight], [A], [B], [scaling], [ones], layout)[0]


torch.library.custom_op("m3kernels::dora_norm", _norm, mutates_args=()).register_fake(
    lambda weight, A, B, scaling: weight.new_empty(weight.shape[0], dtype=torch.float32)
)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``magnitude / |weight + scaling B A| * (x W^T + scaling x A^T B^T) + bias``.

    Args:
        x: (..., K) in fp32, bf16 or fp16.
        weight, A, B, scaling: as in :func:`m3kernels.ops.lora_linear`.
        magnitude: (N,) of any floating-point dtype.
        bias: (N,), outside the scale, as in PEFT.
        backend: "auto", "triton" or "reference".

    Returns:
        (..., N). Differentiable once in x, weight, A, B and magnitude; the norm is a constant, as in the paper and PEFT.

    Raises:
        ValueError, TypeError: as :func:`m3kernels.ops.lora_linear`; a magnitude that is not (N,).
    """
    (y,) = lora_linears(x, [Adapted(weight, A, B, scaling, magnitude)], backend=backend)
    return y if bias is None else y + bias
