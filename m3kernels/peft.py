"""Exact module names for PEFT: a bare "q_proj" in ``target_modules`` also means the layers of the vision tower."""

import difflib
import operator
from collections.abc import Iterable

from torch import nn

from m3kernels.patching.api import unwrap

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NAMES = ATTENTION + MLP
PROJECTOR = ("linear_1", "linear_2", "patch_merger.merging_layer")


def target_modules(
    model: nn.Module,
    text: bool = True,
    vision: bool = False,
    projector: bool = False,
    names: Iterable[str] = NAMES,
    layers: Iterable[int] | None = None,
) -> list[str]:
    """The linear layers of a Ministral 3 to train an adapter on, for ``LoraConfig(target_modules=...)`` or ``add_adapters``.

    Full names, of which PEFT matches each to one module; never the head or the embeddings. Patched or not makes no
    difference, and neither does an adapter that is there already.

    Args:
        model: a Ministral 3 model with or without a vision tower, Hugging Face's or our own, one of its inner models, or any
            of these inside PEFT, DDP or ``torch.compile`` wrappers. Names are relative to the model inside the wrappers, as
            PEFT's ``get_peft_model`` and ``add_adapter`` want them.
        text: take the text layers.
        vision: take the layers of the vision tower.
        projector: take the projector between them: linear_1, linear_2 and the patch merger's merging_layer.
        names: which projections of the text and vision layers: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj
            and down_proj.
        layers: indices of the text layers to take; all if left out.

    Returns:
        The names, in the model's order.

    Raises:
        TypeError: ``model`` is no module, or ``layers`` are no integers.
        ValueError: an unknown name, a layer out of range, nothing asked for, or a part that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"target_modules needs a model (torch.nn.Module), got {type(model).__name__}")
    if not (text or vision or projector):
        raise ValueError("text, vision and projector are all False: nothing to adapt; pass True for one of them")
    chosen = _chosen_names(names, needed=text or vision)
    if layers is not None and not text:
        raise ValueError("layers are indices of text layers, but text=False; leave layers out or pass text=True")

    base = unwrap(model)
    modules = dict(base.named_modules())
    wanted = set()
    if text:
        found = _find(base, modules, "text")
        for i in range(len(found)) if layers is None else _chosen_layers(layers, len(found)):
            wanted |= _inside(found[i], "self_attn", "mlp", chosen)
    if vision:
        for layer in _find(base, modules, "vision"):
            wanted |= _inside(layer, "attention", "feed_forward", chosen)
    if projector:
        for module in _find(base, modules, "projector"):
            wanted |= {f"{module}.{name}".lstrip(".") for name in PROJECTOR}
    if absent := sorted(wanted - modules.keys()):
        raise ValueError(
            f"{type(base).__name__} has no module {absent[0]!r} ({len(absent)} such names): something wraps the module "
            "around it, as modules_to_save does; leave those names out"
        )
    return [name for name in modules if name in wanted]


def _chosen_names(names: Iterable[str], needed: bool) -> list[str]:
    chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown name {name!r}{hint} Allowed: any of {', '.join(NAMES)}")
    if needed and not chosen:
        raise ValueError(f"names is empty; pass any of {', '.join(NAMES)}")
    return chosen


def _chosen_layers(layers: Iterable[int], count: int) -> list[int]:
    try:
        chosen = [operator.index(i) for i in layers]
    except TypeError:
        raise TypeError(f"layers must be an iterable of integers such as range({count}), got {layers!r}") from None
    if not chosen:
        raise ValueError(f"layers is empty; pass indices from 0 to {count - 1}, or None for all")
    if wrong := [i for i in chosen if not 0 <= i < count]:
        raise ValueError(f"layer {wrong[0]} is out of range: the text model has {count}, allowed are 0 to {count - 1}")
    return chosen


def _find(base: nn.Module, modules: dict[str, nn.Module], part: str) -> list[str]:
    """Names of a part's layers, or of the projector."""
    from m3kernels.patching.rules import MULTIMODAL, TEXT, VISION, native  # imports transformers

    # Hugging Face's classes and our own
    projectors = {(MULTIMODAL, "Mistral3MultiModalProjector"), (native.VISION, "Projector")}
    owner, owners, units, what = {
        "text": (
            "Ministral3Model",
            {(TEXT, "Ministral3Model"), (native.TEXT, "LanguageModel")},
            {(TEXT, "Ministral3DecoderLayer"), (native.TEXT, "DecoderLayer")},
            "Ministral 3 text model",
        ),
        "vision": (
            "PixtralVisionModel",
            {(VISION, "PixtralVisionModel"), (native.VISION, "VisionTower")},
            {(VISION, "PixtralAttentionLayer"), (native.VISION, "VisionLayer")},
            "Pixtral vision tower",
        ),
        "projector": ("Mistral3MultiModalProjector", projectors, projectors, "Mistral 3 projector"),
    }[part]

    def named(classes: set[tuple[str, str]]) -> list[str]:
        # by ancestors: fused classes and FSDP2's are derived from these. PEFT copies what is in modules_to_save
        return [
            name
            for name, module in modules.items()
            if any((c.__module__, c.__name__) in classes for c in type(module).__mro__)
            and not {"original_module", "modules_to_save"} & set(name.split("."))
        ]

    found, kind = named(units), type(base).__name__
    if not found:
        raise ValueError(
            f"{part}=True, but {kind} has no {what} (outside modules_to_save); pass {part}=False, or a model that has it"
        )
    # layer indices would be ambiguous, and one's names may be the ends of the other's
    if len(several := named(owners)) > 1:
        raise ValueError(f"{kind} holds {len(several)} modules {owner} ({', '.join(several)}); pass a model with one")
    return found


def _inside(layer: str, attention: str, mlp: str, names: list[str]) -> set[str]:
    # the layer may be the model itself, whose name is empty
    return {f"{layer}.{attention if name in ATTENTION else mlp}.{name}".lstrip(".") for name in names}
