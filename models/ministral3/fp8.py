"""FP8 weights of Hugging Face checkpoints: E4M3 with ``weight_scale_inv`` for the tensor or for blocks of it."""

import torch
from torch import Tensor

MAX = torch.finfo(torch.float8_e4m3fn).max
BLOCK = (128, 128)
# a weight that was dequantised to bf16 may lie half a bf16 step above the largest E4M3 value
ROUNDING = 1 + 2**-8


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the block scales of a weight: the last block of a row or column may be cut off."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def fits(scale_shape: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether scales of this shape belong to a weight ``shape``: one for all, or one a block."""
    return scale_shape in ((), (1,), (1, 1)) or (len(shape) == 2 and scale_shape == grid(shape, block))


def spread(scale: Tensor, block: tuple[int, int], rows: range, columns: range) -> Tensor:
    """Scales in fp32, broadcastable to ``weight[rows, columns]``."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    return scale.float()[torch.tensor(rows) // block[0]][:, torch.tensor(columns) // block[1]]


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` (E4M3) x ``scale`` (as from ``spread``): an fp32 product, then one cast, as transformers does it."""
    return weight.float().mul_(scale).to(dtype)


def quantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, bool]:
    """``weight`` in E4M3 against a kept ``scale``: (E4M3 weight, scale of the given shape and dtype, scale changed).

    A scale is kept wherever the weight still fits into it, so that what was dequantised comes back bit for bit.
    Where it has outgrown its scale, that scale (of the tensor or of the block) is made anew from the largest value.
    """
    weight = weight.float()
    if scale.numel() == 1:
        largest = weight.abs().amax().reshape(scale.shape)
    else:
        height, width = scale.shape
        padded = torch.nn.functional.pad(
            weight.abs(), (0, width * block[1] - weight.shape[1], 0, height * block[0] - weight.shape[0])
        )
        largest = padded.reshape(height, block[0], width, block[1]).amax(dim=(1, 3))
    outgrown = largest > scale.float() * MAX * ROUNDING
    new = torch.where(outgrown, largest / MAX, scale.float()).to(scale.dtype)
    rows, columns = (range(size) for size in weight.shape)
    divisor = spread(new, block, rows, columns)
    # a scale of 0 belongs to weights of 0
    quantized = (weight / divisor.masked_fill(divisor == 0, 1)).clamp_(-MAX, MAX)
    return quantized.to(torch.float8_e4m3fn), new, bool(outgrown.any())
