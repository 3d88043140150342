"""Fused forwards of the Ministral 3 text model. Each does what the transformers class it is given to does, with our ops.

The unfused forward stays the other branch wherever a layer can change after patching (adapters, hooks, shards).
"""

import inspect
import sys

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from m3kernels.ops import (
    add_rms_norm,
    decode_linear,
    decode_qkv,
    decode_swiglu,
    rms_norm,
    rotary,
    rotary_table,
    swiglu,
)
from m3kernels.patching.adapters import project
from m3kernels.patching.classes import fused_forward, has_hooks, is_fused, is_plain, note_fallback, original_forward
from m3kernels.patching.decode import LayerWeights, decode_weights, is_rms_norm, is_silu


@fused_forward("rms_norm")
def rms_norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    if not (is_plain(self.weight) and is_plain(hidden_states)):
        note_fallback("rms_norm", f"{type(self.weight).__name__} weight, {type(hidden_states).__name__} input")
        return original_forward(self)(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), in one pass where the norm is transformers' own and nobody hooks into it."""
    if is_rms_norm(norm) and not has_hooks(norm) and is_plain(norm.weight) and is_plain(x) and is_plain(residual):
        return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
    note_fallback("add_rms_norm", f"{type(norm).__name__} is replaced, hooked or sharded")
    summed = residual + x
    return norm(summed), summed


@fused_forward("swiglu")
def mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = project(self, x, self.gate_proj, self.up_proj)
    if not is_silu(self.act_fn) or has_hooks(self.act_fn) or gate.dtype != up.dtype or not is_plain(gate):
        note_fallback("swiglu", f"activation {type(self.act_fn).__name__}, gate {type(gate).__name__} {gate.dtype}")
        return self.down_proj(self.act_fn(gate) * up)
    (down,) = project(self, swiglu(gate, up), self.down_proj)
    return down


@fused_forward("rotary_table")
@torch.no_grad()
@dynamic_rope_update
def rotary_embedding_forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (batch or 1, seq, head_dim) as in transformers, but fp32 whatever the activations are."""
    return duplicate_halves(rotary_table(self.inv_freq, position_ids.to(x.device), self.attention_scaling))


def duplicate_halves(table: Tensor) -> tuple[Tensor, Tensor]:
    """[cos | sin] as the pair (cos, sin) that transformers hands around, each as wide as a head."""
    cos, sin = table.chunk(2, dim=-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def table_for(attention: nn.Module, table: tuple[Tensor, Tensor] | None, dtype: torch.dtype):
    """The fp32 table for a fused attention; one that was replaced since patching expects it in the activations' dtype."""
    if table is None or (is_fused(attention) and "forward" not in vars(attention)):
        return table
    return tuple(half.to(dtype) for half in table)


def llama4_parameters(config) -> tuple[float, int] | None:
    """(beta, original_max) of the query scale; transformers fails without them, here absent means no scale."""
    rope = config.rope_parameters
    beta, original_max = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    return None if beta is None or original_max is None else (beta, int(original_max))


def attention_facts(original: type) -> dict:
    """transformers 5.17 does not hand position_ids to the attention function, later releases do; packing depends on it."""
    try:
        passes = "position_ids=position_ids" in inspect.getsource(original.forward).replace(" ", "")
    except OSError:
        passes = True
    eager = sys.modules[original.__module__].eager_attention_forward
    return {"_m3k_passes_positions": passes, "_m3k_eager_attention": staticmethod(eager)}


def cache_name(original: type) -> str:
    """The argument that carries the cache: ``past_key_values`` up to transformers 5.23, ``cache`` since 5.24."""
    return "cache" if "cache" in inspect.signature(original.forward).parameters else "past_key_values"


def text_attention_facts(original: type) -> dict:
    """Since 5.24 a cache's update is also given what the attention function is given."""
    return attention_facts(original) | {"_m3k_cache_name": cache_name(original)}


def one_cache(cache, kwargs: dict):
    """The cache by whichever name it came, or by place; the older name leaves ``kwargs``, and the newer counts."""
    older = kwargs.pop("past_key_values", None)
    return older if cache is None else cache


def attend(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs):
    """The model's own attention implementation, whichever is set."""
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self._m3k_eager_attention)
    return interface(self, q, k, v, mask, scaling=self.scaling, **kwargs)


def attend_cached(
    self: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position_ids: Tensor,
    cache,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    """Attention of rotated heads after what the cache holds, to which they are added: (B, S, H, D), and weights or None."""
    if cache is not None:
        more = {"kwargs": kwargs} if self._m3k_cache_name == "cache" else {}
        k, v = cache.update(k, v, self.layer_idx, **more)
    if self._m3k_passes_positions:
        kwargs = {**kwargs, "position_ids": position_ids}
    dropout = self.attention_dropout if self.training else 0.0
    window = getattr(self.config, "sliding_window", None)
    return attend(self, q, k, v, mask, dropout=dropout, sliding_window=window, **kwargs)


@fused_forward("rotary", text_attention_facts)
def attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    cache = one_cache(cache, kwargs)
    input_shape = hidden_states.shape[:-1]
    heads = (*input_shape, -1, self.head_dim)
    q, k, v = (
        y.view(heads).transpose(1, 2) for y in project(self, hidden_states, self.q_proj, self.k_proj, self.v_proj)
    )

    q, k = rotary(q, k, position_embeddings, position_ids.to(q.device), llama4_parameters(self.config))
    output, weights = attend_cached(self, q, k, v, attention_mask, position_ids, cache, kwargs)
    (out,) = project(self, output.reshape(*input_shape, -1).contiguous(), self.o_proj)
    return out, weights


@fused_forward("add_rms_norm", lambda original: {"_m3k_cache_name": cache_name(original)})
def decoder_layer_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache=None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs,
) -> Tensor:
    cache = one_cache(cache, kwargs)
    wants_weights = bool(kwargs.get("output_attentions"))
    weights = decode_weights(self, hidden_states, position_embeddings, position_ids, wants_weights)
    if weights is not None:
        options = {"use_cache": use_cache, **kwargs}
        return decode(self, weights, hidden_states, attention_mask, position_ids, cache, position_embeddings, options)
    kwargs[self._m3k_cache_name] = cache
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=use_cache,
        position_embeddings=table_for(self.self_attn, position_embeddings, hidden_states.dtype),
        **kwargs,
    )
    normed, residual = add_norm(self.post_attention_layernorm, attended, hidden_states)
    return residual + self.mlp(normed)


def decode(
    self: nn.Module,
    weights: LayerWeights,
    hidden_states: Tensor,
    mask: Tensor | None,
    position_ids: Tensor,
    cache,
    table: tuple[Tensor, Tensor],
    kwargs: dict,
) -> Tensor:
    """A decoder layer over a few tokens, by the decode ops: the residual stream, (batch, seq, D)."""
    attention, shape = self.self_attn, hidden_states.shape[:2]
    rows, norm = shape.numel(), self.input_layernorm
    x_MD = hidden_states.reshape(rows, -1)
    q, k, v = decode_qkv(
        *(x_MD, weights.q.weight, weights.k.weight, weights.v.weight),
        head_dim=attention.head_dim,
        table=tuple(half.expand(*shape, -1).reshape(rows, -1) for half in table),
        positions=position_ids.to(x_MD.device).expand(shape).reshape(rows),
        norm_weight=norm.weight,
        eps=norm.variance_epsilon,
        llama4=llama4_parameters(attention.config),
        scales=(weights.q.scale, weights.k.scale, weights.v.scale),
    )
    q, k, v = (heads.unflatten(0, shape).transpose(1, 2) for heads in (q, k, v))
    attended, _ = attend_cached(attention, q, k, v, mask, position_ids, cache, kwargs)
    x_MD = decode_linear(attended.reshape(rows, -1), weights.o.weight, residual=x_MD, scale=weights.o.scale)

    norm = self.post_attention_layernorm
    h_MF = decode_swiglu(
        *(x_MD, weights.gate.weight, weights.up.weight),
        norm_weight=norm.weight,
        eps=norm.variance_epsilon,
        gate_scale=weights.gate.scale,
        up_scale=weights.up.scale,
    )
    return decode_linear(h_MF, weights.down.weight, residual=x_MD, scale=weights.down.scale).view(hidden_states.shape)
