"""What a benchmarked op is, as data: the types behind :mod:`m3kernels.bench.cases`, and how references are made."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BOTH = "forward+backward"
Shape = dict[str, object]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """The least a GPU must do: bytes of device memory (inputs read once, outputs written once) or matrix FLOPs."""

    bytes: int = 0
    flops: int = 0

    def limit_ms(self, copy_bytes_s: float, gemm_flops_s: float) -> float:
        """Milliseconds at a measured copy rate (bytes read + written per second) and a measured GEMM rate (FLOP/s)."""
        return 1e3 * max(self.bytes / copy_bytes_s, self.flops / gemm_flops_s)


@dataclass(frozen=True)
class Op:
    """One op: how to make its inputs, what is right, and what it costs.

    ``outputs`` maps an output's name to the input whose shape, dtype and layout its gradient gets, or to the names of its
    dimensions in the shape (bf16 then; None: a scalar loss, whose gradient is 1). ``wrt`` names the inputs that are
    differentiated; gradients are called ``d<input>``. ``no_graph`` names peers that synchronise inside a call, which no CUDA
    graph can hold.
    """

    inputs: Callable[[Shape, torch.device, torch.Generator], Tensors]
    outputs: dict[str, str | tuple[str, ...] | None]
    wrt: Callable[[Shape], tuple[str, ...]]
    reference: Callable[[Shape, Tensors, Tensors], Tensors]
    cost: Callable[[Shape, str], Cost]
    directions: tuple[str, ...] = ("forward", "backward", BOTH)
    no_graph: tuple[str, ...] = ()
    report_memory: bool = False


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    shape: Shape = field(hash=False)
    quick: bool = False


def randn(shape: tuple[int, ...], device: torch.device, g: torch.Generator, std: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=g).mul_(std)


def by_autograd(
    function: Callable[[Shape, Tensors], tuple[Tensor, ...]], wrt: tuple[str, ...], outputs: tuple[str, ...]
):
    """An fp64 reference out of a plain fp64 forward: outputs, and gradients named ``d<input>``."""

    def reference(shape: Shape, inputs: Tensors, grads: Tensors) -> Tensors:
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        leaves = {n: wide[n].requires_grad_() for n in wrt}
        outs = function(shape, wide | leaves)
        found = torch.autograd.grad(outs, [leaves[n] for n in wrt], [grads[n].double() for n in outputs])
        return dict(zip(outputs, (o.detach() for o in outs))) | {f"d{n}": d for n, d in zip(wrt, found)}

    return reference
