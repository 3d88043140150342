"""Which part of a parameter lies on this rank."""

import torch
from torch import Tensor, nn


def part_of(parameter: Tensor) -> Tensor:
    """What of a parameter lies on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole_of(parameter: Tensor) -> Tensor:
    """The whole tensor, detached, where it lies; of a sharded one every rank has to call this."""
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_slices(parameter: Tensor) -> tuple[slice, ...] | None:
    """Which part of the whole tensor lies on this rank, None for all of it.

    Tensor parallelism splits first and evenly, FSDP2 splits each of those parts again.
    """
    if not hasattr(parameter, "placements"):
        return None
    begins, ends = [0] * parameter.dim(), list(parameter.shape)
    mesh = parameter.device_mesh
    # the innermost dimension of the mesh is tensor parallelism
    for dim in reversed(range(mesh.ndim)):
        # of Shard, and of FSDP2's own kind that is strided
        axis = getattr(parameter.placements[dim], "dim", None)
        if axis is None:
            continue
        size = ends[axis] - begins[axis]
        each = -(-size // mesh.size(dim))
        begin = min(begins[axis] + each * mesh.get_local_rank(dim), ends[axis])
        begins[axis], ends[axis] = begin, min(begin + each, ends[axis])
    return tuple(slice(a, b) for a, b in zip(begins, ends))


def become(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Gives a parameter another tensor, of its shape and placements and of any dtype; who holds the parameter has it, too.

    Setting ``.data`` of a DTensor does that to the outside alone: what lies on this rank stays what it was.
    """
    if hasattr(parameter, "to_local"):
        torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    else:
        parameter.data = tensor


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copies this rank's part of ``whole`` into a parameter."""
    part_of(parameter).copy_(whole[local_slices(parameter) or ()])
