"""Weights from a checkpoint straight into a model's parameters, whole or sharded."""

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3.export import read_as
from m3kernels.models.ministral3.files import bar
from m3kernels.models.ministral3.weights import Checkpoint


@torch.no_grad()
def load(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> None:
    """Gives every parameter its tensor, one after the other; of a DTensor only this rank's part is read.

    Args:
        model: a ``Ministral3``, on the meta device or with memory of its own; parameters that are there are overwritten
            where they lie, those on meta are made.
        checkpoint: of the model's config; see ``Checkpoint.check``.
        dtype: of parameters that are made; the checkpoint's own by default.
    """
    parameters = dict(model.named_parameters())
    dtypes = {name: dtype or checkpoint.dtype(name) for name in parameters}
    total = sum(p.numel() * dtypes[name].itemsize for name, p in parameters.items())
    made: dict[int, nn.Parameter] = {}
    with bar("load", total, progress) as advance:
        for name, parameter in parameters.items():
            part = read_as(checkpoint, name, dtypes[name], local_slices(parameter))
            made[id(parameter)] = _fill(parameter, part, torch.device(device))
            advance(part.nbytes)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and made[id(parameter)] is not parameter:
                module._parameters[name] = made[id(parameter)]


def _fill(parameter: nn.Parameter, part: Tensor, device: torch.device) -> nn.Parameter:
    """The parameter with the values of this rank's part; a new one where it was on meta."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if not local.is_meta:
        local.copy_(part)
        return parameter
    # what was read may be a map of the file
    part = part.to(device, copy=True)
    if local is not parameter:
        from torch.distributed.tensor import DTensor

        spec = {"shape": parameter.shape, "stride": parameter.stride()}
        part = DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False, **spec)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


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
        placement = parameter.placements[dim]
        if not placement.is_shard():
            continue
        axis, size = placement.dim, ends[placement.dim] - begins[placement.dim]
        each = -(-size // mesh.size(dim))
        begin = min(begins[axis] + each * mesh.get_local_rank(dim), ends[axis])
        begins[axis], ends[axis] = begin, min(begin + each, ends[axis])
    return tuple(slice(a, b) for a, b in zip(begins, ends))
