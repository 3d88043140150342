"""This rank's part of a parameter, as a plain tensor that a kernel can address."""

import torch
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
    if type(parameter) in (nn.Parameter, Tensor):
        return parameter
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter
    mesh, placements = parameter.device_mesh, parameter.placements
    groups = [mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_replicate()]
    if not torch.compiler.is_compiling():
        return _Local.apply(parameter, groups)
    part = parameter.to_local(grad_placements=placements)
    for group in groups:
        part = copy_to_ranks(part, group)
    return part


class _Local(torch.autograd.Function):
    """``to_local`` and ``copy_to_ranks``: the gradient has the parameter's own spec, which ``to_local`` finds out anew.

    That takes half of what a sharded parameter costs the host in a step, and there are nine a layer.
    """

    @staticmethod
    def forward(ctx, parameter: Tensor, groups: list[ProcessGroup]) -> Tensor:
        ctx.spec, ctx.groups = parameter._spec, groups
        part = parameter._local_tensor
        return part.view_as(part)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from torch.distributed.tensor import DTensor

        for group in ctx.groups:
            grad = all_reduce_sum(grad, group)
        # strides are those of the spec
        return DTensor(grad.contiguous(), ctx.spec, requires_grad=False), None
