"""This rank's part of a parameter, as a plain tensor that a kernel can address."""

from torch import Tensor, nn


def local(parameter: Tensor) -> Tensor:
    """The local tensor of a DTensor; anything else comes back as it is.

    A parameter that every rank holds whole sees other tokens on each of them, so its gradient is a part of a sum.
    Leaving that out is silent: the gradient of one rank alone would be taken for the whole.
    """
    if type(parameter) in (nn.Parameter, Tensor):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in parameter.placements])
