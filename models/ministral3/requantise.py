"""Weights back to E4M3 with the scales that the checkpoint came with."""

import torch
from torch import Tensor

from m3kernels.models.ministral3._files import CheckpointError
from m3kernels.models.ministral3.weights import FP8, block_of, spread

LARGEST = 448.0  # E4M3
# an untouched weight at the end of E4M3's range may stand this far beyond it: it was rounded to bf16
ROUNDED = LARGEST * (1 + 2**-8)


def requantise(name: str, weight: Tensor, scale: Tensor, config: dict) -> tuple[Tensor, Tensor, bool]:
    """(E4M3 weight, scales, whether any scale was recomputed) of ``weight`` [rows, columns] in a floating dtype.

    ``scale``: the kept ones, one for all or one a block; those that their weights outgrew become the largest weight / 448.
    An untouched dequantised weight gives its E4M3 values again, bit for bit. Raises CheckpointError for scales of another
    shape and for infinite weights.
    """
    block = block_of(name, tuple(weight.shape), tuple(scale.shape), config)
    index = tuple(slice(0, size) for size in weight.shape)
    wide = weight.float()
    if wide.isinf().any():
        raise CheckpointError(
            f"{name} has infinite values, which E4M3 cannot hold: train again from an earlier checkpoint"
        )
    ratio = _ratio(wide, spread(scale, block, index))
    outgrown = ratio.abs() > ROUNDED
    if outgrown.any():
        largest = _largest(wide.abs(), block).reshape(scale.shape) / LARGEST
        if scale.dtype == torch.float8_e8m0fnu:
            largest = largest.log2().ceil().exp2()  # a power of two rounded down would clip
        grown = _largest(outgrown.float(), block).reshape(scale.shape) > 0
        scale = torch.where(grown, largest, scale.float()).to(scale.dtype)
        ratio = _ratio(wide, spread(scale, block, index))
    # a scale near zero is rounded coarsely: what is then beyond the range saturates, and is not NaN
    return ratio.clamp(-LARGEST, LARGEST).to(FP8), scale, bool(outgrown.any())


def _ratio(weight: Tensor, scale: Tensor) -> Tensor:
    """Zero weights stay zero also under a zero scale."""
    return torch.where(weight == 0, weight, weight / scale)


def _largest(values: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The largest value of each block."""
    if block is None:
        return values.max()
    (rows, columns), (high, wide) = values.shape, block
    padded = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % high))
    return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).amax((1, 3))
