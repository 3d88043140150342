"""LoRA and DoRA on a ``Ministral3``, whole or sharded, read and written in PEFT's format."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3.adapted import (
    AdapterConfig,
    AdapterError,
    adapt,
    adapted_layers,
    check_adapted,
    unadapt,
)
from m3kernels.models.ministral3.adapter_files import adapter_of, load_adapter, save_adapter
from m3kernels.models.ministral3.layers import Linear
from m3kernels.models.ministral3.merging import LORA_A, LORA_B, MAGNITUDE, is_adapter, merged_weight
from m3kernels.models.ministral3.shards import fill, whole_of
from m3kernels.peft import NAMES, target_modules

if TYPE_CHECKING:
    from m3kernels.models.ministral3.model import Ministral3

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "adapter_of",
    "adapter_parameters",
    "add_adapters",
    "load_adapter",
    "merge_adapters",
    "reset_adapters",
    "save_adapter",
    "targets_of",
]


def targets_of(
    model: "Ministral3",
    names: Iterable[str] = NAMES,
    *,
    text: bool = True,
    vision: bool = False,
    projector: bool = False,
) -> list[str]:
    """Full names of the layers to adapt, in the model's order: see :func:`m3kernels.peft.target_modules`.

    Args:
        names: projections of text and vision layers.
        text, vision, projector: the parts to take.

    Raises:
        ValueError: an unknown name, nothing asked for, or a part that the model does not have.
    """
    return target_modules(model, text=text, vision=vision, projector=projector, names=names)


def add_adapters(model: "Ministral3", config: AdapterConfig, targets: Sequence[str]) -> list[str]:
    """Puts adapters beside linear layers and freezes everything else; before ``parallelize``, also on the meta device.

    A model with weights computes what it did: B is zero, and A of seed 0 until :func:`reset_adapters` draws another.
    What is to be trained whole beside them gets ``requires_grad_(True)`` afterwards. ``m3kernels.patch`` comes after.

    Args:
        targets: full names of modules, such as :func:`targets_of` gives.

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        AdapterError: no target, one that there is not or that takes no adapter; a model that is sharded or adapted already.
    """
    if model.adapters is not None:
        raise AdapterError("the model has adapters already: merge_adapters(model) first, or make a new model")
    if model.layout is not None:
        raise AdapterError(
            "the model is sharded already: add_adapters goes before parallelize (from_pretrained: prepare=)"
        )
    layers = {name: module for name, module in model.named_modules() if name in set(targets)}
    if not targets:
        raise AdapterError("no targets to adapt: give full names, such as targets_of(model)")
    for target in targets:
        _check_target(model, target, layers.get(target))
    model.requires_grad_(False)
    for layer in layers.values():
        adapt(layer, config)
    model.adapters = config
    if not any(parameter.is_meta for parameter in model.parameters()):
        reset_adapters(model, 0)
    return list(layers)


def _check_target(model: "Ministral3", name: str, module: nn.Module | None) -> None:
    if module is None:
        known = [n for n, m in model.named_modules() if type(m) is Linear]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
        raise AdapterError(f"no module {name!r} to adapt; near: {', '.join(near)} (targets_of(model) lists all)")
    if module in (model.lm_head, model.get_input_embeddings()):
        raise AdapterError(
            f"{name} takes no adapter here: the fused loss reads its weight alone. Leave it out of the targets, or train "
            "it whole with requires_grad_(True)"
        )
    if type(module) is not Linear:
        raise AdapterError(f"{name} is a {type(module).__name__}; adapters go beside linear layers: targets_of(model)")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name (``….q_proj.lora_A``, ``lora_B``, ``lora_magnitude``)."""
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def _adapted_state(model: "Ministral3", on_meta: str) -> dict[str, Tensor]:
    """Parameters by name of an adapted model that has memory; ``on_meta``: what to say of one that has none."""
    check_adapted(model)
    # this has FSDP2 take back what it gathered
    state = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in state.values()):
        raise AdapterError(f"the model is on the meta device: {on_meta}")
    return state


@torch.no_grad()
def reset_adapters(model: "Ministral3", seed: int) -> None:
    """A as PEFT draws it (uniform to 1 / sqrt(K)), B zero, DoRA's magnitudes the norms of the weights' rows.

    After the weights are there. The values go by seed and names alone, bit for bit the same at every sharding: each rank
    draws whole tensors on the CPU and keeps its part. Every rank calls this.

    Raises:
        AdapterError: no adapters, or a model on the meta device.
    """
    state = _adapted_state(model, "load its weights first, then reset_adapters")
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapted_layers(model).items():
        A = state[f"{name}.{LORA_A}"]
        whole = nn.init.kaiming_uniform_(torch.empty(A.shape), a=math.sqrt(5), generator=generator)
        fill(A, whole)
        fill(state[f"{name}.{LORA_B}"], torch.zeros(()).expand(layer.out_features, A.shape[0]))
        if layer.lora_magnitude is not None:
            magnitude = state[f"{name}.{MAGNITUDE}"]
            wide = torch.promote_types(magnitude.dtype, torch.float32)
            # of the whole weight: sums of parts would be rounded in another order
            fill(magnitude, torch.linalg.norm(whole_of(state[f"{name}.weight"]).to(wide), dim=1))


@torch.no_grad()
def merge_adapters(model: "Ministral3") -> None:
    """Folds the adapters into the weights, in fp32 (fp64 for fp64) and cast to the weights' dtype, and removes them.

    ``save_pretrained`` writes merged weights without this, and leaves the model as it is. Every rank calls this; one
    layer's whole weight is gathered at a time. Optimizers that hold the adapters hold nothing of the model afterwards.

    Raises:
        AdapterError: no adapters, or a model on the meta device.
    """
    state = _adapted_state(model, "there is nothing to merge yet")
    for name, layer in adapted_layers(model).items():
        parts = [state.get(f"{name}.{part}") for part in ("weight", LORA_A, LORA_B, MAGNITUDE)]
        whole = merged_weight(*(part if part is None else whole_of(part) for part in parts), layer.scaling)
        fill(parts[0], whole)
        unadapt(layer)
    model.adapters = None
