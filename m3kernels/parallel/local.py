"""This rank's part of a parameter, as a plain tensor that a kernel can address, and products with it."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from m3kernels.parallel.collectives import all_reduce_sum, copy_to_ranks


def local(parameter: Tensor) -> Tensor:
    """The local tensor of a DTensor; anything else comes back as it is.

    A parameter that every rank holds whole sees other tokens on each of them: its gradient is summed over ranks in the
    backward. Leaving that out is silent. Leaving it to later, as a Partial gradient, is no better: foreach AdamW, which
    CUDA takes by default, squares the parts instead of the whole in torch 2.11.
    """
    if not _is_sharded(parameter):
        return parameter
    if not torch.compiler.is_compiling():
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return parameter._local_tensor
        part = getattr(_together, "parts", {}).get(id(parameter))
        return _Local.apply(parameter) if part is None else part
    part = parameter.to_local(grad_placements=parameter.placements)
    for group in _whole_over(parameter):
        part = copy_to_ranks(part, group)
    return part


_together = threading.local()
# elements of gradients that are copied into one collective
BUCKET = 1 << 24


@contextmanager
def summed_together(parameters: Iterable[Tensor], group: ProcessGroup) -> Iterator[None]:
    """Inside, :func:`local` gives parts of these parameters whose gradients are summed together, when the backward has all.

    One by one they are a collective each, in the way of the backward: 70 of them in a model of 34 layers, of 4,096 numbers.

    Args:
        parameters: DTensors that the ranks of ``group`` hold whole, and no others share.
    """
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    _together.parts = dict(zip(map(id, chosen), _Together.apply(group, *chosen))) if chosen else {}
    try:
        yield
    finally:
        _together.parts = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with this rank's parts of parameters, whole or sharded."""
    whole = not _is_sharded(weight) or bias is not None or not torch.is_grad_enabled()
    if whole or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, local(weight), None if bias is None else local(bias))
    return linears(x, weight)[0]


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """``x @ local(weight).T`` of each weight.

    One node of the graph, where each weight has one more by ``local`` and autograd adds up the gradient of x, all tokens of
    it each time. Not to be traced, and not for autocast.
    """
    return _Linears.apply(x, *weights)


def gradients_of_linears(
    x: Tensor, dys: Sequence[Tensor], weights: Sequence[Tensor], needs_dx: bool, needs_dws: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of x, summed over the weights, and of each weight."""
    dx, dws, rows = None, [], x.flatten(0, -2)
    for dy, weight, needs in zip(dys, weights, needs_dws):
        dy = dy.flatten(0, -2)
        if needs_dx:
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        dws.append(dy.t() @ rows if needs else None)
    return None if dx is None else dx.view(x.shape), dws


def _is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor; which most are not, and a program without shards need not import."""
    if type(parameter) in (nn.Parameter, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _whole_over(parameter: Tensor) -> list[ProcessGroup]:
    """The groups whose ranks all hold the whole of what a DTensor is to them."""
    mesh = parameter.device_mesh
    return [mesh.get_group(dim) for dim, placement in enumerate(parameter.placements) if placement.is_replicate()]


class _Part(NamedTuple):
    """What a parameter's local gradient must become to be the parameter's: nothing, where it is no DTensor.

    ``to_local`` finds out the spec anew, which takes half of what a sharded parameter costs the host in a step.
    """

    spec: object
    groups: list[ProcessGroup]

    @classmethod
    def of(cls, parameter: Tensor) -> tuple[Tensor, "_Part | None"]:
        if not _is_sharded(parameter):
            return parameter, None
        return parameter._local_tensor, cls(parameter._spec, _whole_over(parameter))

    def gradient(self, grad: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        for group in self.groups:
            grad = all_reduce_sum(grad, group)
        # strides are those of the spec
        return DTensor(grad.contiguous(), self.spec, requires_grad=False)


class _Local(torch.autograd.Function):
    """``to_local`` and ``copy_to_ranks``."""

    @staticmethod
    def forward(ctx, parameter: Tensor) -> Tensor:
        part, ctx.part = _Part.of(parameter)
        return part.view_as(part)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.part.gradient(grad)


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: ProcessGroup, *parameters: Tensor):
        # sums are made here
        ctx.group, ctx.parts = group, [_Part(parameter._spec, []) for parameter in parameters]
        ctx.set_materialize_grads(False)
        return tuple(part.view_as(part) for part in (parameter._local_tensor for parameter in parameters))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        sums = iter(_sums([grad for grad in grads if grad is not None], ctx.group))
        return None, *(None if grad is None else part.gradient(next(sums)) for part, grad in zip(ctx.parts, grads))


def _sums(grads: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Each summed over ranks; neighbours of one dtype go as one."""
    found, bucket = [], []

    def send() -> None:
        summed = all_reduce_sum(torch.cat([grad.reshape(-1) for grad in bucket]), group)
        parts = summed.split([grad.numel() for grad in bucket])
        found.extend(part.view(grad.shape) for part, grad in zip(parts, bucket))
        bucket.clear()

    for grad in grads:
        if bucket and (grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + grad.numel() > BUCKET):
            send()
        bucket.append(grad)
    if bucket:
        send()
    return found


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor):
        parts, ctx.parts = zip(*map(_Part.of, weights))
        ctx.save_for_backward(x, *parts)
        return tuple(F.linear(x, part) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor):
        x, *weights = ctx.saved_tensors
        needs_dx, *needs_dws = ctx.needs_input_grad
        dx, dws = gradients_of_linears(x, dys, weights, needs_dx, needs_dws)
        return dx, *(part.gradient(dw) if part and dw is not None else dw for part, dw in zip(ctx.parts, dws))
