"""Linear layers on an FP8 weight in the op benchmark, alone and under LoRA.

    y = x W^T, with LoRA + s (x A^T) B^T          W = weight * scale of its block, 128 x 128, in x's dtype

``eager`` dequantises in plain PyTorch and multiplies; ``bf16 weight`` is the same layer on a weight that is dequantised before
the clock starts, in twice the memory: what is left to gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.bench import adapters
from m3kernels.bench.spec import BOTH, Case, Cost, Op, Shape, Tensors, by_autograd, randn

BLOCK = (128, 128)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A block's scale for each of its numbers."""
    by_row = scale.repeat_interleave(BLOCK[0], 0)[: shape[0]]
    return by_row.repeat_interleave(BLOCK[1], 1)[:, : shape[1]]


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3, fp32 scales) with the largest number of each block at 448."""
    (rows, cols), (high, wide) = weight.shape, BLOCK
    padded = F.pad(weight.float(), (0, -cols % wide, 0, -rows % high))
    scale = padded.unflatten(0, (-1, high)).unflatten(2, (-1, wide)).abs().amax((1, 3)) / 448
    return (weight.float() / _spread(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def inputs(shape: Shape, device, g) -> Tensors:
    """With LoRA as in :mod:`m3kernels.bench.adapters`, A and B included."""
    rows, width, out = shape["rows"], shape["width"], shape["out"]
    if shape["rank"]:
        found = adapters.inputs(shape, device, g)
    else:
        found = {"x": randn((rows, width), device, g), "weight": randn((out, width), device, g, width**-0.5)}
    weight, scale = _quantised(found["weight"])
    return found | {"weight": weight, "scale": scale}


def _wrt(shape: Shape) -> tuple[str, ...]:
    return ("x", "A", "B") if shape["rank"] else ("x",)


def _layer(shape: Shape, t: Tensors, weight: Tensor) -> Tensor:
    return adapters.lora(t | {"weight": weight}) if shape["rank"] else F.linear(t["x"], weight)


def _wide(shape: Shape, t: Tensors) -> tuple[Tensor]:
    return (_layer(shape, t, t["weight"] * _spread(t["scale"], t["weight"].shape)),)


def reference(shape: Shape, given: Tensors, grads: Tensors) -> Tensors:
    return by_autograd(_wide, _wrt(shape), ("y",))(shape, given, grads)


def cost(shape: Shape, direction: str) -> Cost:
    """The products; what dequantising costs is on top of it, and for the peers to keep small."""
    if shape["rank"]:
        return adapters.cost(shape, direction)
    flops = 2 * shape["rows"] * shape["width"] * shape["out"]
    return Cost(flops=flops * (2 if direction == BOTH else 1))


def _dense(t: Tensors) -> Tensor:
    weight = t["weight"].float() * _spread(t["scale"], t["weight"].shape)
    return weight.to(t["x"].dtype)


def eager(shape: Shape, given: Tensors):
    return lambda t: (_layer(shape, t, _dense(t)),)


def bf16_weight(shape: Shape, given: Tensors):
    from m3kernels import ops

    dense = _dense(given)
    if shape["rank"]:
        return lambda t: (ops.lora_linear(t["x"], dense, t["A"], t["B"], adapters.SCALING),)
    return lambda t: (F.linear(t["x"], dense),)


def ours(shape: Shape, given: Tensors):
    from m3kernels import ops

    def function(t: Tensors) -> tuple[Tensor]:
        if not shape["rank"]:
            return (ops.fp8_linear(t["x"], t["weight"], t["scale"], block_size=BLOCK),)
        layer = ops.Adapted(t["weight"], t["A"], t["B"], adapters.SCALING, None, t["scale"], BLOCK)
        return tuple(ops.lora_linears(t["x"], [layer]))

    return function


def _case(op: str, width: int, out: int, quick: bool = False) -> Case:
    rank = 16 if op == "fp8_lora_linear" else 0
    shape = {"rows": 8192, "width": width, "out": out, "rank": rank, "dora": False}
    return Case(op, f"8192 {width}->{out}{f' r{rank}' if rank else ''}", shape, quick)


OP = Op(inputs=inputs, outputs={"y": ("rows", "out")}, wrt=_wrt, reference=reference, cost=cost, report_memory=True)
OPS = {"fp8_linear": OP, "fp8_lora_linear": OP}
CASES = tuple(
    _case(op, width, out, quick) for op in OPS for width, out, quick in ((4096, 14336, True), (3072, 9216, False))
)
PEERS = {op: {"eager": eager, "bf16 weight": bf16_weight, "m3kernels": ours} for op in OPS}
