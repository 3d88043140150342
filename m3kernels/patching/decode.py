"""Whether a decoder layer of transformers runs a few tokens through the decode ops, and the weights that it does it with.

Five launches beside attention's and the cache's: norm with q, k, v and rotary, o with its residual, norm with gate, up and
SwiGLU, down with its residual. Looked at on every call: hooks, adapters, shards and dtypes come and go, and a layer with any
of them runs module by module.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3kernels.ops._common import TRITON_DTYPES, records, why_no_triton
from m3kernels.ops._decode_products import MAX_ROWS
from m3kernels.ops.attention_decode import MAX_NEW_TOKENS
from m3kernels.ops.fp8_dequantize import FP8
from m3kernels.patching import fp8
from m3kernels.patching.classes import ATTENTION, has_hooks, is_plain

# hooks that note a module's outputs, where they are asked for
CAPTURING = "transformers.utils.output_capturing"


# tuples, not frozen dataclasses: they are made for each layer and token, and are cheaper to make
class Weight(NamedTuple):
    """A linear layer's weight, (N, K), and the fp32 scale of an E4M3 one: of all of it, or (N,) of its rows."""

    weight: Tensor
    scale: Tensor | None


class LayerWeights(NamedTuple):
    """What a decoder layer multiplies with."""

    q: Weight
    k: Weight
    v: Weight
    o: Weight
    gate: Weight
    up: Weight
    down: Weight


def decode_weights(
    layer: nn.Module, x: Tensor, table: tuple[Tensor, Tensor] | None, position_ids: Tensor | None, wants_weights: bool
) -> LayerWeights | None:
    """The weights of a layer that the decode ops compute on this call; None where its modules are to be called.

    Args:
        x: (batch, seq, D), the layer's input.
        table: cos and sin of the positions.
        wants_weights: whether attention weights are asked for.
    """
    if torch.is_grad_enabled() if torch.compiler.is_compiling() else records():
        return None
    if x.dim() != 3 or not 1 <= x.shape[1] <= MAX_NEW_TOKENS:
        return None
    if not 1 <= x.shape[0] * x.shape[1] <= MAX_ROWS or not _kernels_run(x):
        return None
    # in the activations' dtype where another rotary embedding stands beside ours
    if table is None or position_ids is None or table[0].dtype != torch.float32:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if wants_weights or not _is_ours(attention, "rotary") or not _is_ours(mlp, "swiglu"):
        return None
    if (has_hooks(attention) and not _only_captures(attention)) or has_hooks(mlp) or not _plain_silu(mlp.act_fn):
        return None
    if not (_norm_fits(layer.input_layernorm, x) and _norm_fits(layer.post_attention_layernorm, x)):
        return None
    q, k, v, o = (weight_of(p, x) for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
    gate, up, down = (weight_of(p, x) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    weights = (q, k, v, o, gate, up, down)
    if any(weight is None for weight in weights) or not (_alike(q, k, v) and _alike(gate, up)):
        return None
    return LayerWeights(*weights)


def _kernels_run(x: Tensor) -> bool:
    if why_no_triton(x.device.type) or x.dtype not in TRITON_DTYPES or not is_plain(x):
        return False
    return not torch.is_autocast_enabled(x.device.type)


def _is_ours(module: nn.Module, forward: str) -> bool:
    return getattr(type(module), "_m3k_forward", "") == forward


def _only_captures(attention: nn.Module) -> bool:
    """Whether transformers' own hooks are all, which note attention weights; our attention has none.

    They stay once any output was asked for.
    """
    if attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks:
        return False
    if "forward" in vars(attention) or attention.config._attn_implementation != ATTENTION:
        return False
    return all(getattr(hook, "__module__", "") == CAPTURING for hook in attention._forward_hooks.values())


def is_silu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _plain_silu(activation: nn.Module) -> bool:
    return is_silu(activation) and not has_hooks(activation)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a norm is one of transformers' own."""
    cls = getattr(type(module), "_m3k_original", type(module))
    return cls.__name__ in ("Ministral3RMSNorm", "PixtralRMSNorm") and cls.__module__.startswith("transformers.models.")


def _norm_fits(norm: nn.Module, x: Tensor) -> bool:
    return is_rms_norm(norm) and not has_hooks(norm) and is_plain(norm.weight) and norm.weight.dtype == x.dtype


def weight_of(layer: nn.Module, x: Tensor) -> Weight | None:
    """The weight of a linear layer that is nothing else: plain, or FP8 with one scale for all; None of any other."""
    quantised = _is_ours(layer, "fp8_linear")
    if not (quantised or type(layer) is nn.Linear) or layer.bias is not None or has_hooks(layer):
        return None
    weight = layer.weight
    if not is_plain(weight) or weight.device != x.device:
        return None
    if not quantised:
        return Weight(weight, None) if weight.dtype == x.dtype else None
    scale = layer.weight_scale_inv
    if fp8.why_not(layer) or scale.numel() != 1 or scale.dtype != torch.float32 or weight.dtype != FP8:
        return None
    return Weight(weight, scale)


def _alike(*weights: Weight) -> bool:
    return len({weight.scale is None for weight in weights}) == 1
