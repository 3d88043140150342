"""PEFT's LoRA and DoRA layers, and our own, with our ops: found where they stand, on every call, so that PEFT may change them.

Adapters can be added, switched, merged and unloaded after patching: a layer is looked at when it is called. What the ops do not
cover runs PEFT's own forward, and that is logged. Off the GPU PEFT's own forward runs too.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3kernels.ops._common import TRITON_DTYPES, why_no_triton
from m3kernels.ops._lora_launch import MAX_RANK
from m3kernels.ops.fp8_dequantize import FP8
from m3kernels.ops.lora_linear import MOST, Adapted, lora_linears
from m3kernels.parallel import local
from m3kernels.patching import fp8
from m3kernels.patching.classes import (
    fused_forward,
    has_hooks,
    is_plain,
    note_fallback,
    original_forward,
    takes_together,
)

LAYER = ("peft.tuners.lora.layer", "Linear")
NATIVE_LAYER = ("m3kernels.models.ministral3.adapted", "AdaptedLinear")
DORA = ("peft.tuners.lora.variants", "DoraLinearVariant")


class Planned(NamedTuple):
    """What a layer computes: the op's arguments, and a bias to be added; ``stream`` as the op's."""

    adapted: Adapted
    bias: Tensor | None
    dropout: float
    stream: int = 0

    @property
    def alike(self) -> tuple:
        """Layers of one input that agree in this go together."""
        a = self.adapted.A
        return a.shape[0], a.dtype, self.dropout, self.adapted.magnitude is None, self.adapted.norm is None, self.stream


def is_adapted(module: nn.Module) -> bool:
    original = getattr(type(module), "_m3k_original", type(module))
    return (original.__module__, original.__name__) == LAYER


def _kernels_run(x: Tensor) -> bool:
    return not why_no_triton(x.device.type) and x.dtype in TRITON_DTYPES and is_plain(x)


def _active(layer: nn.Module) -> list[str]:
    """The adapters that a call adds; none where PEFT's forward is the base layer's."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout(layer: nn.Module, name: str) -> float | None:
    """The probability that counts now; None where it is another kind of dropout."""
    module = layer.lora_dropout[name]
    if isinstance(module, nn.Identity):
        return 0.0
    return (float(module.p) if module.training else 0.0) if type(module) is nn.Dropout else None


def why_not(layer: nn.Module, x: Tensor | None = None) -> str:
    """Why a layer's adapters run PEFT's forward, or an empty string; ``x``: the input of a call."""
    names, base = _active(layer), layer.base_layer
    # a head that computes the loss is a linear layer otherwise
    plain = getattr(type(base), "_m3k_original", type(base)) is nn.Linear or getattr(base, "is_plain_linear", False)
    if not plain and not fp8.is_fp8_linear(base):
        return f"the base layer is {type(base).__module__}.{type(base).__name__}"
    if getattr(layer, "fan_in_fan_out", False):
        return "fan_in_fan_out"
    variants = [layer.lora_variant[name] for name in names if name in layer.lora_variant]
    if any((type(v).__module__, type(v).__name__) != DORA for v in variants):
        return f"variant {', '.join(type(v).__name__ for v in variants)}"
    if variants and len(names) > 1:
        return "DoRA beside another active adapter"
    drops = [_dropout(layer, name) for name in names]
    if None in drops or (any(drops) and (variants or len(names) > 1)) or max(drops, default=0.0) >= 1:
        return "dropout with DoRA or with several active adapters, of everything, or of another kind"
    parts = [module for name in names for module in (layer.lora_A[name], layer.lora_B[name])]
    if any(type(part) is not nn.Linear or part.bias is not None for part in parts[::2]):
        return "lora_A is no plain linear layer"
    if any(type(part) is not nn.Linear for part in parts) or (variants and parts[1].bias is not None):
        return "lora_B is no plain linear layer, or has a bias under DoRA"
    others = [layer.lora_dropout[name] for name in names]
    others += [layer.lora_magnitude_vector[name] for name in names if name in layer.lora_variant]
    if any(map(has_hooks, (base, *parts, *others))):
        return "hooks on the base layer or the adapter"
    weights = [part.weight for part in parts]
    magnitudes = [layer.lora_magnitude_vector[name].weight for name in names if name in layer.lora_variant]
    if sum(w.shape[0] for w in weights[::2]) > MAX_RANK:
        return f"a rank over {MAX_RANK}"
    if any(w.dtype.itemsize < 2 for w in weights):
        return "adapters in FP8, as PEFT before 0.19 makes them over FP8 layers: use peft>=0.19"
    if fp8.is_fp8_linear(base) and (reason := fp8.why_not(base)):
        return f"the FP8 base layer: {reason}"
    if not all(is_plain(w) for w in (base.weight, *weights, *magnitudes)):
        return "weights that are sharded or quantised"
    if len({w.dtype for w in weights}) > 1:
        return "adapter weights of several dtypes"
    if x is None:
        return ""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if base.weight.dtype not in (x.dtype, FP8) or any(w.dtype not in (x.dtype, torch.float32) for w in weights):
        return f"{x.dtype} input, {base.weight.dtype} base, {weights[0].dtype} adapter"
    return (
        ""
        if all(w.device == x.device for w in (base.weight, *weights, *magnitudes))
        else "weights on another device than the input"
    )


def why_not_in_loss(layer: nn.Module) -> str:
    """Why an adapter on ``lm_head`` wants its logits, or an empty string."""
    names = _active(layer)
    if layer.disable_adapters and layer.merged:
        return "the head's adapters are merged and disabled at once, which PEFT's forward resolves"
    if has_hooks(layer):
        return "the head's PEFT layer has hooks or a replaced forward, which expect logits"
    if any(name in layer.lora_variant for name in names):
        return "DoRA or another variant of LoRA on lm_head"
    if any(_dropout(layer, name) != 0.0 for name in names):
        return "dropout before the head's adapter"
    if reason := why_not(layer):
        return f"the head's adapter: {reason}"
    if any(layer.lora_B[name].bias is not None for name in names):
        return "the head's adapter has a bias"
    dtypes = {part[name].weight.dtype for name in names for part in (layer.lora_A, layer.lora_B)}
    if not dtypes <= {layer.base_layer.weight.dtype, torch.float32}:
        return f"the head is {layer.base_layer.weight.dtype}, its adapter {', '.join(map(str, dtypes))}"
    return ""


def low_rank(layer: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of each adapter that a call of the layer adds."""
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in _active(layer)]


def has_active(layer: nn.Module) -> bool:
    return bool(_active(layer))


def _is_bare(module: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether a part is a plain module of a kind, without a bias, hooks or a forward of its own."""
    if type(module) is not kind:
        return False
    its = module.__dict__
    hooks = its["_forward_hooks"] or its["_forward_pre_hooks"] or its["_backward_hooks"] or its["_backward_pre_hooks"]
    return not hooks and "forward" not in its and its["_parameters"].get("bias") is None


def _usual(layer: nn.Module, x: Tensor) -> Planned | None:
    """The plan of a call that is like nearly all: one LoRA adapter on a linear layer, nothing special; None: look closer.

    Asks what :func:`why_not` asks, but takes parts from where nn.Module keeps them, in a fourth of the host time.
    """
    names, parts = layer.active_adapters, layer._modules
    name = names[0] if len(names) == 1 else None
    a, b, drop = (parts[group]._modules.get(name) for group in ("lora_A", "lora_B", "lora_dropout"))
    base, kind = parts["base_layer"], type(drop)
    if kind not in (nn.Identity, nn.Dropout) or nn.modules.module._has_any_global_hook():
        return None
    p = float(drop.p) if kind is nn.Dropout and drop.training else 0.0
    if not (_is_bare(base) and _is_bare(a) and _is_bare(b) and _is_bare(drop, kind)) or not 0 <= p < 1:
        return None
    if layer.disable_adapters or layer.merged or name in layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
        return None
    weights = weight, a, b = [part._parameters.get("weight") for part in (base, a, b)]
    if not all(type(w) is nn.Parameter and w.device == x.device for w in weights):
        return None
    if weight.dtype != x.dtype or a.dtype != b.dtype or a.dtype not in (x.dtype, torch.float32):
        return None
    if a.shape[0] > MAX_RANK or torch.is_autocast_enabled(x.device.type):
        return None
    return Planned(Adapted(weight, a, b, layer.scaling[name]), None, p)


def _plan(layer: nn.Module, x: Tensor) -> Planned | None:
    """What a call of the layer computes, or None where PEFT's own forward shall."""
    if not torch.compiler.is_compiling() and (usual := _usual(layer, x)):
        return usual
    names = _active(layer)
    if not names:
        return None
    if reason := why_not(layer, x):
        note_fallback("lora_linear", reason)
        return None
    base, scalings = layer.base_layer, [layer.scaling[name] for name in names]
    many_a, many_b = ([group[name] for name in names] for group in (layer.lora_A, layer.lora_B))
    a, b, scaling = many_a[0].weight, many_b[0].weight, scalings[0]
    if len(names) > 1:
        a = torch.cat([part.weight for part in many_a])
        b, scaling = torch.cat([part.weight * s for part, s in zip(many_b, scalings)], dim=1), 1.0
    dora = names[0] in layer.lora_variant
    magnitude = layer.lora_magnitude_vector[names[0]].weight if dora else None
    bias = base.bias
    for part, s in zip(many_b, scalings):
        if part.bias is not None:
            bias = s * part.bias if bias is None else bias + s * part.bias
    quantised = (base.weight_scale_inv, fp8.block_size(base)) if fp8.is_fp8_linear(base) else ()
    return Planned(Adapted(base.weight, a, b, scaling, magnitude, *quantised), bias, _dropout(layer, names[0]))


def why_not_native(layer: nn.Module, x: Tensor | None = None) -> str:
    """Why our own adapted layer runs its plain forward, or an empty string; ``x``: the input of a call."""
    if layer.lora_A.shape[0] > MAX_RANK:
        return f"a rank over {MAX_RANK}"
    if layer.lora_magnitude is not None and layer.dropout > 0 and (x is None or layer.training):
        return "dropout with DoRA, which needs the frozen product of both inputs"
    if x is None:
        return ""
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    weight, a = layer.weight, layer.lora_A
    if weight.dtype != x.dtype or a.dtype not in (x.dtype, torch.float32):
        return f"{x.dtype} input, {weight.dtype} base, {a.dtype} adapter"
    return ""


def _native_plan(layer: nn.Module, x: Tensor) -> Planned | None:
    """What a call of our own adapted layer computes, on this rank's parts; None where its plain forward shall."""
    if reason := why_not_native(layer, x):
        note_fallback("lora_linear", reason)
        return None
    weight, a, b = local(layer.weight), local(layer.lora_A), local(layer.lora_B)
    magnitude, norm, group = layer.lora_magnitude, None, layer.row_group
    if magnitude is not None:
        magnitude = local(magnitude)
        if group is not None:
            norm = layer.row_norms(weight, a, b, backend="auto")
    bias = None if layer.bias is None else local(layer.bias)
    adapted = Adapted(weight, a, b, layer.scaling, magnitude, norm=norm)
    # the columns of other ranks are other inputs: they get masks of their own
    return Planned(adapted, bias, layer.dropout if layer.drops else 0.0, 0 if group is None else group.rank())


def _planned(layer: nn.Module, x: Tensor) -> Planned | None:
    """The plan of a layer of any kind; None where the layer itself is to be called."""
    if has_hooks(layer):
        return None
    if getattr(layer, "is_adapted_linear", False):
        return _native_plan(layer, x)
    return _plan(layer, x) if is_adapted(layer) else None


def _compute(x: Tensor, plans: list[Planned]) -> list[Tensor]:
    first = plans[0]
    ys = lora_linears(x, [plan.adapted for plan in plans], dropout_p=first.dropout, stream=first.stream)
    return [y if plan.bias is None else y + plan.bias.to(y.dtype) for y, plan in zip(ys, plans)]


def project(parent: nn.Module, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Each layer's output; adapters of one kind read x together and give it one gradient."""
    if not takes_together(parent) or not _kernels_run(x):
        return [layer(x) for layer in layers]
    plans = [_planned(layer, x) for layer in layers]
    outputs = [None if plan else layer(x) for plan, layer in zip(plans, layers)]
    kinds = [plan and plan.alike for plan in plans]
    while waiting := [i for i, plan in enumerate(plans) if plan and outputs[i] is None]:
        group = [i for i in waiting if kinds[i] == kinds[waiting[0]]][:MOST]
        for i, y in zip(group, _compute(x, [plans[i] for i in group])):
            outputs[i] = y
    return outputs


@fused_forward("lora_linear")
def lora_linear_forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    plan = None if args or kwargs or not _kernels_run(x) else _plan(self, x)
    return original_forward(self)(self, x, *args, **kwargs) if plan is None else _compute(x, [plan])[0]


@fused_forward("native_lora_linear")
def native_lora_linear_forward(self: nn.Module, x: Tensor) -> Tensor:
    plan = _native_plan(self, x) if _kernels_run(x) else None
    return original_forward(self)(self, x) if plan is None else _compute(x, [plan])[0]
