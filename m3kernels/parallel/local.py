"""This rank's part of a parameter, as a plain tensor that a kernel can address."""

from torch import Tensor, nn

from m3kernels.parallel.collectives import copy_to_ranks


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
    part = parameter.to_local(grad_placements=parameter.placements)
    for dim, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            part = copy_to_ranks(part, parameter.device_mesh.get_group(dim))
    return part
