"""How parity is measured: relative Frobenius error against fp64, ours at most a small factor of eager's."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# our error may be at most this many times eager's
FACTOR = 1.5


@dataclass(frozen=True)
class Row:
    """One line of a parity table: an output or gradient, our error, eager's, and the most that ours may be."""

    subject: str
    case: str
    output: str
    ours: float
    eager: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.ours <= self.allowed


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` (Frobenius, fp64); infinite for NaN, infinity or another shape."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return math.inf
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    difference = (actual - expected).norm().item()
    return difference / scale if scale > 0 else difference


def allowed_error(eager: float, dtype: torch.dtype, numel: int) -> float:
    """``FACTOR`` times eager's error, and for few values the luck of a draw: the rounding error of n values scatters by
    about 1 / sqrt(n) of itself, so eager's may happen to be near zero. A scalar (a mean loss) is a sum of many fp32 terms
    in one order or another: four fp32 ulps."""
    luck = torch.finfo(dtype).eps * min(1.0, 2.0 / math.sqrt(max(numel, 1)))
    return FACTOR * eager + luck + (4 * torch.finfo(torch.float32).eps if numel == 1 else 0.0)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fresh floating-point memory is NaN inside, so that an element nobody writes shows."""
    originals = {(owner, name): getattr(owner, name) for owner, name in _ALLOCATORS}

    def poisoning(allocate: Callable) -> Callable:
        def poisoned(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

        return poisoned

    try:
        for (owner, name), allocate in originals.items():
            setattr(owner, name, poisoning(allocate))
        yield
    finally:
        for (owner, name), allocate in originals.items():
            setattr(owner, name, allocate)


_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: dict, wrt: tuple[str, ...], seed: int = 0
) -> list[Tensor]:
    """Outputs of ``function(**inputs)`` and the gradients of a fixed random projection of them with respect to ``wrt``.

    The projection is the same for every dtype of the inputs.
    """
    leaves = {
        name: x.detach().requires_grad_(name in wrt) if isinstance(x, Tensor) else x for name, x in inputs.items()
    }
    outputs = function(**leaves)
    if not wrt:
        return [*outputs]
    differentiable = [o for o in outputs if o.requires_grad]
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, device=o.device) for o in differentiable]
    # a scalar is a loss: it is projected by 1, as backward() does
    weights = [w if w.dim() else torch.ones_like(w) for w in weights]
    # values of a bf16 grid: every dtype can hold them, so all see one and the same incoming gradient
    weights = [w.to(torch.bfloat16).to(o.dtype) for w, o in zip(weights, differentiable)]
    grads = torch.autograd.grad(differentiable, [leaves[name] for name in wrt], weights)
    return [*outputs, *grads]


def in_fp64(inputs: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def table(rows: list[Row]) -> str:
    """Rows as aligned text, failures marked."""
    header = ("", "case", "output", "our error", "eager's", "ratio", "")
    lines = [header]
    for row in rows:
        ratio = row.ours / row.eager if row.eager else (1.0 if row.ours == 0 else math.inf)
        numbers = (f"{row.ours:.2e}", f"{row.eager:.2e}", f"{ratio:.2f}")
        lines.append((row.subject, row.case, row.output, *numbers, "ok" if row.passed else "FAIL"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
