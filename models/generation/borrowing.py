"""A native model whose parameters are those of a Hugging Face model: nothing is copied, nothing there is changed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m3kernels.models.generation.prompt import GenerationError
from m3kernels.models.ministral3 import Config, Ministral3
from m3kernels.models.ministral3.adapted import AdaptedLinear
from m3kernels.models.ministral3.quantized import QuantizedLinear
from m3kernels.patching import fp8, patch
from m3kernels.patching.adapters import DORA, is_adapted
from m3kernels.patching.api import PatchError, _check_root, unwrap
from m3kernels.patching.classes import is_plain

ROOTS = ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration")
TEXT_PREFIX = "model.language_model."
# hooks that record or require gradients change no output: transformers' and PEFT's own
HARMLESS_HOOKS = ("transformers.", "peft.")
# modules whose computation is known, by where their class was made
KNOWN = (
    *("torch.nn.modules.linear.Linear", "torch.nn.modules.sparse.Embedding", "torch.nn.modules.conv.Conv2d"),
    *("torch.nn.modules.container.", "torch.nn.modules.activation.", "transformers.activations."),
    *("torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout"),
    ".".join(fp8.LAYER),
    *(f"transformers.models.{name}.modeling_{name}." for name in ("ministral3", "mistral3", "pixtral")),
    *(
        "peft.tuners.lora.layer.Linear",
        "peft.utils.other.ModulesToSaveWrapper",
        "peft.tuners.lora.dora.DoraLinearLayer",
    ),
)
INSTEAD = "call hf_model.generate(...) for it"


@dataclass(frozen=True)
class Adapter:
    """What PEFT adds to a layer; ``magnitude`` of DoRA."""

    A: nn.Parameter
    B: nn.Parameter
    magnitude: nn.Parameter | None
    scaling: float


@dataclass(frozen=True)
class Part:
    """A module's own parameters and what PEFT adds to it.

    Attributes:
        scale: fp32, of an E4M3 weight: one, or one for each block.
        block_size: rows and columns of a block; None where there are no blocks.
    """

    parameters: dict[str, nn.Parameter]
    adapter: Adapter | None = None
    scale: Tensor | None = None
    block_size: tuple[int, int] | None = None

    @property
    def tensors(self) -> Iterator[Tensor]:
        yield from self.parameters.values()
        if self.scale is not None:
            yield self.scale
        if self.adapter is not None:
            yield from (t for t in (self.adapter.A, self.adapter.B, self.adapter.magnitude) if t is not None)


@dataclass(frozen=True)
class Source:
    """A Hugging Face model, checked.

    Attributes:
        model: without the wrappers around it.
        parts: of each module that has parameters, by the native model's names.
    """

    model: nn.Module
    parts: dict[str, Part]

    @classmethod
    def of(cls, hf_model: nn.Module) -> "Source":
        """Raises GenerationError for a model that computes what the engine does not, or whose weights it cannot read."""
        base = _root(hf_model)
        parts: dict[str, Part] = {}
        for name, module in _leaves(base):
            if name == "lm_head" or name.startswith("model."):
                multimodal = hasattr(base.config, "text_config")
                native = name if multimodal or name == "lm_head" else TEXT_PREFIX + name.removeprefix("model.")
                if (part := _part(name, module)) is not None:
                    parts[native] = part
        _check_tensors(parts)
        _check_mode(base)
        return cls(base, parts)

    @property
    def fingerprint(self) -> tuple:
        """Differs where a shell would have to be made anew: exchanged, moved or cast weights, other adapters."""
        tensors = tuple((t.data_ptr(), t.dtype, t.shape) for part in self.parts.values() for t in part.tensors)
        scalings = tuple((name, part.adapter.scaling) for name, part in self.parts.items() if part.adapter is not None)
        text = getattr(self.model.config, "text_config", self.model.config)
        return tensors, scalings, text.sliding_window

    @property
    def tied(self) -> bool:
        head, embedding = (self.parts[name].parameters["weight"] for name in ("lm_head", f"{TEXT_PREFIX}embed_tokens"))
        return head is embedding

    def shell(self) -> Ministral3:
        """A native model of the same parameters, with kernels where they run, in eval mode."""
        with torch.device("meta"):
            shell = Ministral3(Config.from_hf(self.model.config, tied=self.tied))
        shell.borrows_weights = True
        modules = dict(shell.named_modules())
        expected = {name for name, module in modules.items() if module._parameters}
        if differing := expected ^ set(self.parts):
            raise GenerationError(
                f"the model has other layers than its config says: {', '.join(sorted(differing)[:3])}"
            )
        for name, part in self.parts.items():
            _fill(shell, name, modules[name], part)
        patch(shell)
        return shell.eval()


def _root(hf_model: nn.Module) -> nn.Module:
    """The model inside wrappers."""
    if not isinstance(hf_model, nn.Module):
        raise GenerationError(f"generate needs a transformers model, got {type(hf_model).__name__}")
    config = getattr(hf_model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise GenerationError(
            f"the model has a {config.peft_type} prompt, which the fast path does not read: {INSTEAD}"
        )
    base = unwrap(hf_model)
    try:
        root = _check_root(base)
    except PatchError as error:
        raise GenerationError(str(error)) from error
    if root not in ROOTS:
        raise GenerationError(f"a {root} has no head that draws tokens; allowed: {', '.join(ROOTS)}")
    return base


def _leaves(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module with parameters of its own; PEFT's layers stand for what is inside them."""
    stack = [("", base)]
    while stack:
        name, module = stack.pop()
        _check_module(name, module, base)
        if is_adapted(module) or type(module).__name__ == "ModulesToSaveWrapper":
            for inner_name, inner in module.named_modules():
                if inner is not module:
                    _check_module(f"{name}.{inner_name}", inner, base)
            yield name, module
        else:
            if module._parameters:
                yield name, module
            prefix = f"{name}." if name else ""
            stack += [(prefix + child, inner) for child, inner in module._modules.items() if inner is not None]


def _check_module(name: str, module: nn.Module, base: nn.Module) -> None:
    cls = getattr(type(module), "_m3k_original", type(module))
    full = f"{cls.__module__}.{cls.__qualname__}"
    if not full.startswith(KNOWN):
        raise GenerationError(
            f"{name or 'the model'} is a {full}, whose weights the fast path does not read: {INSTEAD}, or merge or "
            "dequantise it first"
        )
    if "forward" in vars(module):
        raise GenerationError(
            f"the forward of {name or type(base).__name__} was replaced on the instance (device_map, offloading, tensor "
            f"parallelism, accelerate): {INSTEAD}, or load the model whole on one device"
        )
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            origin = getattr(hook, "__module__", None) or type(hook).__module__
            if not origin.startswith(HARMLESS_HOOKS):
                raise GenerationError(
                    f"{name or type(base).__name__} has a forward hook, which the fast path skips: {INSTEAD}"
                )


def _part(name: str, module: nn.Module) -> Part | None:
    """What a module computes with; of PEFT's layers, what counts now."""
    if type(module).__name__ == "ModulesToSaveWrapper":
        active = None if module.disable_adapters else module.active_adapters
        if active and len(active) > 1:
            raise GenerationError(f"{name} has several active copies (modules_to_save): set one adapter")
        module = module.original_module if not active else module.modules_to_save[active[0]]
    if not is_adapted(module):
        return _plain(name, module)
    active = (
        [] if module.disable_adapters or module.merged else [a for a in module.active_adapters if a in module.lora_A]
    )
    if module.disable_adapters and module.merged:
        raise GenerationError(f"{name}: adapters are merged and disabled at once: unmerge_adapter() first")
    plain = _plain(name, module.base_layer)
    if not active:
        return plain
    reason = "an adapter over FP8 weights" if plain.scale is not None else _why_no_adapter(name, module, active)
    if reason:
        raise GenerationError(
            f"{name}: {reason}; merge the adapters (merge_adapter(), merge_and_unload()) first, or {INSTEAD}"
        )
    (key,) = active
    magnitude = module.lora_magnitude_vector[key].weight if key in module.lora_variant else None
    A, B = module.lora_A[key].weight, module.lora_B[key].weight
    return Part(plain.parameters, Adapter(A, B, magnitude, float(module.scaling[key])))


def _plain(name: str, module: nn.Module) -> Part:
    if fp8.is_fp8_linear(module):
        reason = fp8.why_not(module) or (
            "" if module.weight_scale_inv.dtype == torch.float32 else "scales are not fp32"
        )
        if reason or module.bias is not None:
            raise GenerationError(f"{name}, an FP8 layer: {reason or 'it has a bias'}: {INSTEAD}")
        scale, block = module.weight_scale_inv.detach(), fp8.block_size(module)
        return Part({"weight": module.weight}, scale=scale.reshape(()) if block is None else scale, block_size=block)
    return Part({name: parameter for name, parameter in module._parameters.items() if parameter is not None})


def _why_no_adapter(name: str, layer: nn.Module, active: list[str]) -> str:
    """Why a layer's adapters are not ones that the native model has, or an empty string."""
    if len(active) > 1:
        return f"{len(active)} adapters are active at once ({', '.join(active)})"
    (key,) = active
    if name == "lm_head":
        return "an adapter on the head"
    variant = layer.lora_variant.get(key)
    if variant is not None and (type(variant).__module__, type(variant).__name__) != DORA:
        return f"a {type(variant).__name__} adapter"
    if getattr(layer, "fan_in_fan_out", False):
        return "fan_in_fan_out"
    if any(part[key].bias is not None for part in (layer.lora_A, layer.lora_B)):
        return "an adapter with a bias"
    if layer.lora_A[key].weight.dtype != layer.lora_B[key].weight.dtype:
        return "an adapter of two dtypes"
    dropout = layer.lora_dropout[key]
    return (
        "adapter dropout in training mode: call model.eval()" if dropout.training and getattr(dropout, "p", 0) else ""
    )


def _check_tensors(parts: dict[str, Part]) -> None:
    tensors = [(name, tensor) for name, part in parts.items() for tensor in part.tensors]
    for name, tensor in tensors:
        if not is_plain(tensor):
            raise GenerationError(
                f"{name} has a {type(tensor).__name__} weight in {tensor.dtype} (sharded or quantised), which the fast path "
                f"does not read: {INSTEAD}"
            )
    devices = {str(tensor.device) for _, tensor in tensors}
    if "meta" in devices:
        raise GenerationError(
            "weights are on the meta device (offloaded or not loaded): load the model whole on one device"
        )
    if len(devices) > 1:
        raise GenerationError(
            f"weights are on {', '.join(sorted(devices))}; the fast path takes one device: model.to(device)"
        )
    dtypes = {p.dtype for part in parts.values() for p in part.parameters.values() if part.scale is None}
    if len(dtypes) > 1:
        named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise GenerationError(f"weights are in {named}; the fast path takes one dtype: model.to(torch.bfloat16)")


def _check_mode(base: nn.Module) -> None:
    text = getattr(base.config, "text_config", base.config)
    vision = getattr(base.config, "vision_config", None)
    dropout = max(config.attention_dropout for config in (text, vision) if config is not None)
    if base.training and dropout:
        raise GenerationError(
            f"the model is in training mode, with attention dropout {dropout}, which the fast path does not have: model.eval()"
        )


def _fill(shell: Ministral3, name: str, module: nn.Module, part: Part) -> None:
    """Gives a shell's module the parameters of its twin."""
    if set(part.parameters) != {key for key, value in module._parameters.items() if value is not None}:
        raise GenerationError(
            f"{name} has {', '.join(part.parameters)}; the native one has {', '.join(module._parameters)}: {INSTEAD}"
        )
    for key, parameter in part.parameters.items():
        if parameter.shape != module._parameters[key].shape:
            wanted = tuple(module._parameters[key].shape)
            raise GenerationError(f"{name}.{key} is {tuple(parameter.shape)}, by the model's config {wanted}")
    if part.scale is not None:
        module = QuantizedLinear(part.parameters["weight"], part.scale, part.block_size)
        shell.set_submodule(name, module)
    module._parameters.update(part.parameters)
    if part.adapter is not None:
        module.__class__ = AdaptedLinear
        module.scaling, module.dropout = part.adapter.scaling, 0.0
        module.lora_A, module.lora_B = part.adapter.A, part.adapter.B
        module.register_parameter("lora_magnitude", part.adapter.magnitude)
