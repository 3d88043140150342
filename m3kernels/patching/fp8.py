"""transformers' FP8Linear with our op: the layer with its weight dequantised, activations as they are.

What transformers computes with ``dequantize=True``, from the FP8 weight in memory: training flows through it to the input, and
no copy in another dtype lasts. PEFT takes the class for what it needs to know of a quantised layer.
"""

import torch
from torch import Tensor, nn

from m3kernels.ops import fp8_dequantize, fp8_linear
from m3kernels.ops.fp8_dequantize import FP8
from m3kernels.patching.classes import fused_forward, is_plain, note_fallback, original_forward

LAYER = ("transformers.integrations.finegrained_fp8", "FP8Linear")


def is_fp8_linear(module: nn.Module) -> bool:
    original = getattr(type(module), "_m3k_original", type(module))
    return (original.__module__, original.__name__) == LAYER


def block_size(module: nn.Module) -> tuple[int, int] | None:
    """(rows, columns) of a scale; None where one scale is for all, whatever the configuration calls a block."""
    if module.weight_scale_inv.numel() == 1 or module.block_size is None:
        return None
    return tuple(module.block_size)


def why_not(module: nn.Module) -> str:
    """Why the weight is not one that we dequantise, or an empty string."""
    weight, scale = module.weight, module.weight_scale_inv
    if weight.dtype != FP8:
        return f"the weight is {weight.dtype}, not {FP8}"
    if not is_plain(weight) or type(scale) not in (Tensor, nn.Parameter):
        return "the weight is sharded"
    if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
        return f"scales are {scale.dtype}"
    return ""


def _dequantize(self: nn.Module) -> Tensor:
    """The weight in fp32, which is what PEFT takes DoRA's norms of; without scales they would be another layer's."""
    return fp8_dequantize(self.weight, self.weight_scale_inv, block_size=block_size(self), dtype=torch.float32)


# PEFT asks for these: the dtype of a new adapter, which it would otherwise round to FP8, and (as HQQ's layers have them) a mark
# that the layer dequantises itself, and how
PEFT_FACTS = {
    "compute_dtype": torch.float32,
    "W_q": property(lambda self: self.weight),
    "dequantize": _dequantize,
}


@fused_forward("fp8_linear", lambda original: PEFT_FACTS)
def fp8_linear_forward(self: nn.Module, input: Tensor) -> Tensor:
    reason = why_not(self)
    if reason or not is_plain(input):
        note_fallback("fp8_linear", reason or f"the input is a {type(input).__name__}")
        return original_forward(self)(self, input)
    if torch.is_autocast_enabled(input.device.type):
        input = input.to(torch.get_autocast_dtype(input.device.type))
    return fp8_linear(input, self.weight, self.weight_scale_inv, self.bias, block_size=block_size(self))
