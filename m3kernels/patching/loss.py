"""The fused loss: hidden states to cross-entropy without the logits, inside ``lm_head``'s own forward.

Running there lets the hooks of FSDP and of PEFT's wrappers fire around the head's weight. The loss is fused while training
with labels; otherwise, and wherever something wants logits, the model's own forward runs.
"""

import dataclasses
import inspect
import sys

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from m3kernels.ops import linear_cross_entropy
from m3kernels.patching import adapters
from m3kernels.patching.classes import (
    fuse,
    fused_forward,
    has_hooks,
    is_plain,
    note_fallback,
    original_forward,
    takes_together,
)

OUTPUTS = {
    "Ministral3ForCausalLM": "CausalLMOutputWithPast",
    "Mistral3ForConditionalGeneration": "Mistral3CausalLMOutputWithPast",
}
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


@fused_forward("lm_head")
def lm_head_forward(self: nn.Module, input: Tensor, *, labels: Tensor | None = None, **options) -> Tensor:
    """Logits as ever; with ``labels`` (already shifted) the cross-entropy of them instead, ``adapters`` among the options."""
    if labels is None:
        return original_forward(self)(self, input)
    return linear_cross_entropy(input, self.weight, labels, **options)


def _is_sharded_by_fsdp2(module: nn.Module) -> bool:
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def _has_hooks_beside_fsdp(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


def _head_inside(head: nn.Module) -> nn.Module:
    """The head itself, or the active copy of it that PEFT trains under ``modules_to_save``."""
    copies, active = getattr(head, "modules_to_save", None), getattr(head, "active_adapters", None)
    if copies is None or not active or getattr(head, "disable_adapters", False) or active[0] not in copies:
        return head
    return copies[active[0]]


def _adapted(head: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """(the head that computes the loss, PEFT's layer around it or None)."""
    return (head.base_layer, head) if adapters.is_adapted(head) else (head, None)


def _why_not_adapted(model: nn.Module, layer: nn.Module) -> str:
    if adapters.has_active(layer) and not takes_together(model):
        return "the head's adapter is left to PEFT, as patch was asked (adapters=...)"
    return adapters.why_not_in_loss(layer)


def _computes_loss(head: nn.Module) -> bool:
    """Whether the head has the forward above."""
    return getattr(type(head), "_m3k_forward", "") == "lm_head"


def why_not_fused(model: nn.Module) -> str:
    """Why this call's loss takes the full logits; empty when it does not have to."""
    head, layer = _adapted(_head_inside(model.lm_head))
    if model.loss_function is not ForCausalLMLoss:
        return "a loss_function of its own is set"
    if layer is not None and (reason := _why_not_adapted(model, layer)):
        return reason
    if not _computes_loss(head):
        return f"lm_head is {type(model.lm_head).__module__}.{type(model.lm_head).__name__}"
    if head.bias is not None:
        return "lm_head has a bias"
    if _is_sharded_by_fsdp2(head):
        return "lm_head has hooks, which expect logits" if _has_hooks_beside_fsdp(head) else ""
    if has_hooks(head):
        return "lm_head has hooks or a replaced forward, which expect logits"
    return "" if is_plain(head.weight) else f"lm_head.weight is a {type(head.weight).__name__}"


def causal_lm_facts(original: type) -> dict:
    output = getattr(sys.modules[original.__module__], OUTPUTS[original.__name__])
    return {
        "_m3k_parameters": tuple(inspect.signature(original.forward).parameters)[1:],
        "_m3k_output": output,
        "_m3k_output_fields": tuple(f.name for f in dataclasses.fields(output) if f.name not in ("loss", "logits")),
        "set_output_embeddings": set_output_embeddings,
    }


def set_output_embeddings(self: nn.Module, new_embeddings: nn.Module) -> None:
    """Resizing the vocabulary replaces the head: the new one is fused as the old one was."""
    type(self)._m3k_original.set_output_embeddings(self, new_embeddings)
    reason = fuse_head(self)
    if reason:
        note_fallback("linear_cross_entropy", reason)


@fused_forward("linear_cross_entropy", causal_lm_facts)
def causal_lm_forward(self: nn.Module, *args, skip_logits: bool | None = None, **kwargs):
    """As the model's own forward; ``loss`` is fused and ``logits`` are None when ``skip_logits`` (default: training)."""
    original = original_forward(self)
    if skip_logits is None:
        skip_logits = self.training
    inputs = {**dict(zip(self._m3k_parameters, args)), **kwargs}
    if not skip_logits or inputs.get("labels") is None:
        return original(self, *args, **kwargs)
    reason = why_not_fused(self) or _why_not_these(self, inputs)
    if reason:
        note_fallback("linear_cross_entropy", reason)
        return original(self, *args, **kwargs)

    labels = inputs.pop("labels")
    inputs.pop("logits_to_keep", None)
    inputs.pop("return_dict", None)
    options = {name: inputs[name] for name in LOSS_ARGUMENTS if inputs.get(name) is not None}
    outputs = self.model(**inputs)
    hidden = outputs.last_hidden_state

    shifted = options.pop("shift_labels", None)
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=options.get("ignore_index", -100))[..., 1:]
    if shifted.device.type != "cpu":
        shifted = shifted.to(hidden.device)
    head, layer = _adapted(self.lm_head)
    if layer is not None:
        options["adapters"] = adapters.low_rank(layer)
    loss = head(hidden, labels=shifted.reshape(hidden.shape[:-1]), **options)

    return self._m3k_output(loss=loss, **{name: getattr(outputs, name, None) for name in self._m3k_output_fields})


def _why_not_these(self: nn.Module, inputs: dict) -> str:
    keep = inputs.get("logits_to_keep", 0)
    if not (isinstance(keep, int) and keep == 0):
        return "logits_to_keep selects positions"
    if inputs.get("return_dict", self.config.return_dict) is False:
        return "return_dict=False counts on the position of the logits"
    return ""


def fuse_head(model: nn.Module) -> str:
    """Give the model's ``lm_head`` the fused forward; returns why not, or an empty string."""
    head, layer = _adapted(_head_inside(model.lm_head))
    if layer is not None and (reason := _why_not_adapted(model, layer)):
        return reason
    if _computes_loss(head):
        return ""
    if type(head) is not nn.Linear:
        return f"lm_head is {type(head).__module__}.{type(head).__name__}, not torch.nn.Linear"
    if "forward" in vars(head):
        return "lm_head's forward was replaced on the instance"
    fuse(head, "lm_head")
    return ""
