"""Fused forwards of our own Ministral 3 (``m3kernels.models.ministral3``), whole or sharded."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3kernels.ops import (
    add_rms_norm,
    attention,
    attention_decode,
    linear_cross_entropy,
    rms_norm,
    rotary,
    rotary_2d,
    swiglu,
)
from m3kernels.ops._common import TRITON_DTYPES, why_no_triton
from m3kernels.ops._recompute import forget
from m3kernels.ops.attention_decode import MAX_NEW_TOKENS
from m3kernels.parallel import local
from m3kernels.patching.adapters import project
from m3kernels.patching.classes import fused_forward, note_fallback, original_forward
from m3kernels.patching.joint import joint_linear, lay_side_by_side, linears, whole_weight

LAYERS, TEXT, VISION = (f"m3kernels.models.ministral3.{part}" for part in ("layers", "text", "vision"))
ROOT = ("m3kernels.models.ministral3.model", "Ministral3")


@fused_forward("native_rms_norm")
def rms_norm_forward(self: nn.Module, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight = local(self.weight)
    return (rms_norm(x, weight, self.eps), x) if update is None else add_rms_norm(x, update, weight, self.eps)


@fused_forward("native_swiglu")
def mlp_forward(self: nn.Module, x_TD: Tensor) -> Tensor:
    whole = whole_weight(x_TD, self.gate_proj, self.up_proj)
    if whole is not None:
        gate_up = (joint_linear(x_TD, whole, self.gate_proj, self.up_proj, split=False),)
    else:
        gate_up = _apart(self, x_TD, self.gate_proj, self.up_proj)
    h_TF = forget(swiglu(*gate_up), lambda: swiglu(*gate_up))
    (y_TD,) = project(self, h_TF, self.down_proj)
    return y_TD


def side_by_side_mlp(mlp: nn.Module) -> None:
    lay_side_by_side(mlp.gate_proj, mlp.up_proj)


def _apart(self: nn.Module, x_TD: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Projections whose weights are no neighbours, or are more than weights."""
    return linears(x_TD, *layers) or project(self, x_TD, *layers)


def _heads(self: nn.Module, x_TD: Tensor) -> list[Tensor]:
    """q, k and v, each (1, heads, T, K) over (T, heads, K) memory, as the ops take them."""
    layers = (self.q_proj, self.k_proj, self.v_proj)
    # v is kept for the backward, q and k before their rotation are not: apart they go, a view of one product would stay
    joint = layers[:2] if torch.is_grad_enabled() else layers
    whole = whole_weight(x_TD, *joint)
    if whole is None:
        ys = _apart(self, x_TD, *layers)
    else:
        ys = [*joint_linear(x_TD, whole, *joint, split=True), *(layer(x_TD) for layer in layers[len(joint) :])]
    return [y.unflatten(-1, (-1, self.config.head_dim))[None].transpose(1, 2) for y in ys]


def _tokens_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def side_by_side_attention(module: nn.Module) -> None:
    lay_side_by_side(module.q_proj, module.k_proj, module.v_proj)


@fused_forward("native_rotary")
def attention_forward(self: nn.Module, x_TD: Tensor, step) -> Tensor:
    q, k, v = _heads(self, x_TD)
    q, k = rotary(q, k, step.table_TK[None], step.tokens.positions_T[None], self.config.rope.llama4)
    out_THK = self.core(*map(_tokens_first, (q, k, v)), step.tokens.sequences, step.cache)
    (y_TD,) = project(self, out_THK.flatten(1), self.o_proj)
    return y_TD


@fused_forward("native_rotary_2d")
def vision_attention_forward(self: nn.Module, x_PD: Tensor, table_PK: Tensor, images) -> Tensor:
    q, k, v = _heads(self, x_PD)
    q, k = rotary_2d(q, k, table_PK)
    (y_PD,) = project(self, self.core(*map(_tokens_first, (q, k, v)), images).flatten(1), self.o_proj)
    return y_PD


@fused_forward("native_attention")
def sequences_forward(self: nn.Module, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, sequences, cache=None) -> Tensor:
    reason = why_no_triton(q_THK.device.type) or _why_not(self, q_THK)
    if reason:
        if q_THK.device.type == "cuda":
            note_fallback("attention", reason)
        return original_forward(self)(self, q_THK, k_TGK, v_TGK, sequences, cache)
    if cache is not None:
        cache.write(self.layer, k_TGK, v_TGK)
        if not cache.fresh:
            return _cached(self, q_THK, *cache.read(self.layer, k_TGK.dtype), sequences, cache)
    packed = {}
    if len(sequences.lengths) > 1:
        longest = max(sequences.lengths)
        packed = {"cu_seqlens_q": sequences.cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
    return _tokens_first(attention(q, k, v, causal=self.causal, window=self.window, **packed))


def _why_not(self: nn.Module, q: Tensor) -> str:
    if q.dtype not in TRITON_DTYPES:
        return f"{q.dtype}"
    return "attention dropout" if self.dropout and self.training else ""


def _cached(self: nn.Module, q_THK: Tensor, keys: Tensor, values: Tensor, sequences, cache) -> Tensor:
    """Queries over what the cache holds: the decode kernel for a few tokens of each row, packed attention for more."""
    lengths, rows = sequences.lengths, sequences.rows
    if len(set(lengths)) == 1 and lengths[0] <= MAX_NEW_TOKENS and rows == tuple(range(len(keys))):
        q = q_THK.unflatten(0, (len(rows), lengths[0])).transpose(1, 2)
        with torch.no_grad():
            out = attention_decode(q, keys, values, cache.filled_on_device, window=self.window)
        return out.transpose(1, 2).flatten(0, 1)
    if len(rows) == 1:
        k, v = (held[rows[0], :, : cache.filled[0]][None] for held in (keys, values))
    else:
        k, v = (torch.cat([held[r, :, :n] for r, n in zip(rows, cache.filled)], dim=1)[None] for held in (keys, values))
    bounds = F.pad(cache.filled_on_device.cumsum(0, dtype=torch.int32), (1, 0))
    packed = {"cu_seqlens_q": sequences.cu_seqlens, "cu_seqlens_k": bounds}
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(cache.filled)}
    q = q_THK.transpose(0, 1)[None]
    return _tokens_first(attention(q, k, v, causal=True, window=self.window, **packed, **longest))


@fused_forward("native_head", lambda original: {"computes_loss": True})
def head_forward(self: nn.Module, x_TD: Tensor, labels_T: Tensor | None = None) -> Tensor:
    if labels_T is None:
        return original_forward(self)(self, x_TD)
    return linear_cross_entropy(x_TD, self.rows(), labels_T, reduction="sum")
