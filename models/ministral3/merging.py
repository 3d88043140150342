"""Adapters by name, and what a weight is with its adapter in it."""

import torch
from torch import Tensor

# of an adapted layer, beside its weight and bias
LORA_A, LORA_B, MAGNITUDE = PARTS = ("lora_A", "lora_B", "lora_magnitude")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of a part of an adapter."""
    return name.rpartition(".")[2] in PARTS


@torch.no_grad()
def merged_weight(weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, scaling: float) -> Tensor:
    """(N, K) in the weight's dtype: W + s B A, with DoRA each row scaled to its magnitude; computed in fp32, fp64 for fp64.

    Args:
        weight: (N, K), all of it: a row's norm needs every column.
        A, B: (R, K) and (N, R) of any floating-point dtypes.
        magnitude: (N,), None for LoRA.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    total = torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scaling)
    if magnitude is not None:
        total *= (magnitude.to(wide) / torch.linalg.norm(total, dim=1))[:, None]
    return total.to(weight.dtype)
