"""What an op's case is, and how it is measured."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m3kernels.parity.core import (
    Row,
    allowed_error,
    in_fp64,
    outputs_and_gradients,
    poisoned_allocations,
    relative_error,
)

Generator = torch.Generator


@dataclass(frozen=True)
class OpCase:
    """One op.

    Attributes:
        make: (shape, dtype, generator) -> inputs by name.
        wrt: inputs that get a gradient.
        outputs: names of outputs, then gradients follow as ``d<input>``.
        ours, eager: functions of the inputs; eager is what transformers computes, also run in fp64 as the truth.
        small, real: shapes for the interpreter, and for a GPU.
        wrong: name -> a deliberately wrong variant of ``ours``.
        independent: (shape, dtype, numel) -> how many roundings of an output are independent of each other.
    """

    name: str
    make: Callable[[tuple, torch.dtype, Generator], dict]
    wrt: tuple[str, ...]
    outputs: tuple[str, ...]
    ours: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., tuple[Tensor, ...]]
    small: tuple[tuple, ...]
    real: tuple[tuple, ...]
    wrong: dict[str, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)
    independent: Callable[[tuple, torch.dtype, int], int] = lambda shape, dtype, numel: numel


def measure(
    case: OpCase,
    shape: tuple,
    dtype: torch.dtype,
    device: str,
    *,
    seed: int = 0,
    ours: Callable[..., tuple[Tensor, ...]] | None = None,
) -> list[Row]:
    """Rows for one op at one shape: fresh random inputs, NaN-poisoned allocations, fp64 as the truth."""
    inputs = case.make(shape, dtype, torch.Generator(device).manual_seed(seed))
    with poisoned_allocations():
        actual = outputs_and_gradients(ours or case.ours, inputs, case.wrt)
    eager = outputs_and_gradients(case.eager, inputs, case.wrt)
    truth = outputs_and_gradients(case.eager, in_fp64(inputs), case.wrt)
    names = (*case.outputs, *(f"d{name}" for name in case.wrt))
    rows = []
    for name, a, e, t in zip(names, actual, eager, truth):
        error = relative_error(e, t)
        label = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        allowed = allowed_error(error, dtype, t.numel() and case.independent(shape, dtype, t.numel()))
        rows.append(Row(case.name, label, name, relative_error(a, t), error, allowed))
    return rows


def randn(*shape: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)
