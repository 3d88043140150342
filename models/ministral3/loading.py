"""Weights from a checkpoint straight into a model's parameters, whole or sharded."""

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3.export import read_as
from m3kernels.models.ministral3.files import bar
from m3kernels.models.ministral3.weights import Checkpoint
from m3kernels.patching.rules import prepare


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
        model: a ``Ministral3``, whole or sharded; one on the meta device gets memory on ``device`` first.
        checkpoint: of the model's config; see ``Checkpoint.check``.
        dtype: of the parameters of a model on meta; what they have by default.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        if dtype is not None:
            model.to(dtype)
        to_empty(model, torch.device(device))
        prepare(model)
    parameters = dict(model.named_parameters())
    total = sum(part_of(p).nbytes for p in parameters.values())
    with bar("load", total, progress) as advance:
        for name, parameter in parameters.items():
            part = part_of(parameter)
            read = read_as(checkpoint, name, part.dtype, local_slices(parameter))
            # the file has no rows for the vocabulary's padding
            part[: len(read)].copy_(read)
            part[len(read) :].zero_()
            advance(part.nbytes)


def to_empty(model: nn.Module, device: torch.device) -> None:
    """Memory for parameters on meta, without anything in it; ``nn.Module.to_empty`` alone would untie a head."""
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    model.to_empty(device=device)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight


def part_of(parameter: Tensor) -> Tensor:
    """What of a parameter lies on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


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
