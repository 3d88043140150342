"""Weights from a checkpoint straight into a model's parameters, whole or sharded."""

import torch
from torch import nn

from m3kernels.models.ministral3.adapters import adapter_parameters, reset_adapters
from m3kernels.models.ministral3.export import read_as
from m3kernels.models.ministral3.files import bar
from m3kernels.models.ministral3.merging import is_adapter
from m3kernels.models.ministral3.quantized import quantized_layers, read_quantized
from m3kernels.models.ministral3.shards import local_slices, part_of
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

    A layer in FP8 (``quantized.prepare_quantized``) gets its tensor as that.

    Adapters are not in a checkpoint: those of a model on meta are reset with seed 0, others stay as they are.

    Args:
        model: a ``Ministral3``, whole or sharded; one on the meta device gets memory on ``device`` first.
        checkpoint: of the model's config; see ``Checkpoint.check``.
        dtype: of the parameters of a model on meta but its adapters'; what they have by default.
    """
    adapters = adapter_parameters(model)
    was_meta = any(parameter.is_meta for parameter in model.parameters())
    if was_meta:
        if dtype is not None:
            kept = set(map(id, adapters.values()))
            model._apply(lambda parameter: parameter if id(parameter) in kept else parameter.to(dtype))
        to_empty(model, torch.device(device))
        prepare(model)
    parameters = {name: p for name, p in model.named_parameters() if not is_adapter(name)}
    quantized = quantized_layers(model)
    total = sum(part_of(p).nbytes for p in parameters.values())
    with bar("load", total, progress) as advance:
        for name, parameter in parameters.items():
            part = part_of(parameter)
            if layer := quantized.get(name.removesuffix(".weight")):
                read_quantized(layer, checkpoint, name)
                advance(part.nbytes)
                continue
            read = read_as(checkpoint, name, part.dtype, local_slices(parameter))
            # the file has no rows for the vocabulary's padding
            part[: len(read)].copy_(read)
            part[len(read) :].zero_()
            advance(part.nbytes)
    if was_meta and adapters:
        reset_adapters(model, 0)


def to_empty(model: nn.Module, device: torch.device) -> None:
    """Memory for parameters on meta, without anything in it; ``nn.Module.to_empty`` alone would untie a head."""
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    model.to_empty(device=device)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
