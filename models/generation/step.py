"""The decode step: one token of every row through the model, as few kernels over its own parameters.

A layer is five launches beside attention's: norm with q, k, v, rotary and cache write; attention; o with its residual; norm
with gate, up and SwiGLU; down with its residual. Under tensor parallelism the first rank adds the residual, and a sum over
ranks follows o and down.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3kernels.models.ministral3 import Ministral3
from m3kernels.models.ministral3.cache import KVCache, LayerCache
from m3kernels.models.ministral3.layers import Sequences
from m3kernels.models.ministral3.tokens import Tokens
from m3kernels.ops import attention_decode, decode_linear, decode_qkv, decode_swiglu, rotary_table
from m3kernels.parallel import all_reduce_sum, local, vocab_parallel_embedding
from m3kernels.patching.classes import has_hooks
from m3kernels.patching.decode import Weight, is_silu

# B rows, D hidden, H query heads, G key-value heads, K head_dim, V vocabulary; heads and V are those of this rank.


@dataclass(frozen=True)
class LayerWeights:
    """What a decoder layer computes with, on this rank."""

    attention_norm: Tensor
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    mlp_norm: Tensor
    gate: Weight
    up: Weight
    down: Weight


class DecodeStep:
    """A model's decode step: called with the rows' last tokens, it gives their logits and fills the cache by one.

    Everything that changes from step to step lies on the device: a CUDA graph may replay the call.
    """

    def __init__(self, model: Ministral3):
        text = model.config.text
        self.model, self.text, self.llama4 = model, text, text.rope.llama4
        self.group = None if model.layout is None else model.layout.tp_group
        self.adds_residual = self.group is None or self.group.rank() == 0
        body = model.model.language_model
        self.inv_freq = body.inv_freq
        self.layers = [_weights_of(layer) for layer in body.layers]
        self.norm = local(body.norm.weight.detach())
        self.embedding = local(body.embed_tokens.weight.detach())
        self.head = model.lm_head.rows().detach()

    def __call__(self, ids_B: Tensor, positions_B: Tensor, filled_B: Tensor, cache: KVCache) -> Tensor:
        """(B, V) fp32 logits of every row.

        Args:
            ids_B: the tokens, int64.
            positions_B: their positions and slots in the cache, int64.
            filled_B: positions + 1: tokens that attention sees.
            cache: with room for them.
        """
        x_BD = self.embed(ids_B)
        if cache.table is None:
            every = torch.arange(cache.room, device=x_BD.device)
            cache.table = rotary_table(self.inv_freq.on(x_BD.device), every, self.text.rope.attention_factor)
        table_BK = F.embedding(positions_B, cache.table)
        for number, layer in enumerate(self.layers):
            x_BD = self.attend(layer, x_BD, table_BK, positions_B, filled_B, cache.layer(number))
            options = {"gate_scale": layer.gate.scale, "up_scale": layer.up.scale}
            h_BF = decode_swiglu(
                x_BD,
                layer.gate.weight,
                layer.up.weight,
                norm_weight=layer.mlp_norm,
                eps=self.text.rms_norm_eps,
                **options,
            )
            x_BD = self.project(h_BF, layer.down, x_BD)
        options = {"norm_weight": self.norm, "eps": self.text.rms_norm_eps}
        logits_BV = decode_linear(x_BD, self.head, **options, out_dtype=_wide(x_BD))
        return self.model.whole_vocabulary(logits_BV, self.group)

    def embed(self, ids_B: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(ids_B, self.embedding)
        x_BD = vocab_parallel_embedding(ids_B, self.embedding, self.group, vocab_size=self.text.vocab_size)
        return all_reduce_sum(x_BD, self.group)

    def attend(
        self,
        layer: LayerWeights,
        x_BD: Tensor,
        table_BK: Tensor,
        positions_B: Tensor,
        filled_B: Tensor,
        held: LayerCache,
    ) -> Tensor:
        """The residual stream after attention."""
        plain = held.key_scales is None
        q_BHK, k_BGK, v_BGK = decode_qkv(
            *(x_BD, layer.q.weight, layer.k.weight, layer.v.weight),
            head_dim=self.text.head_dim,
            table=table_BK,
            positions=positions_B,
            norm_weight=layer.attention_norm,
            eps=self.text.rms_norm_eps,
            llama4=self.llama4,
            caches=(held.keys, held.values) if plain else None,
            slots=positions_B if plain else None,
            scales=(layer.q.scale, layer.k.scale, layer.v.scale),
        )
        if not plain:
            held.write(k_BGK, v_BGK, None, positions_B)
        options = {"window": self.text.sliding_window, "k_scale": held.key_scales, "v_scale": held.value_scales}
        out_BHK = attention_decode(q_BHK[:, :, None], held.keys, held.values, filled_B, **options)[:, :, 0]
        return self.project(out_BHK.flatten(1), layer.o, x_BD)

    def project(self, h_BN: Tensor, layer: Weight, residual_BD: Tensor) -> Tensor:
        """The residual stream with a block's output."""
        residual_BD = residual_BD if self.adds_residual else None
        x_BD = decode_linear(h_BN, layer.weight, residual=residual_BD, scale=layer.scale)
        return x_BD if self.group is None else all_reduce_sum(x_BD, self.group)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _weight_of(layer: nn.Module) -> Weight:
    return Weight(local(layer.weight.detach()), getattr(layer, "weight_scale", None))


def _weights_of(layer: nn.Module) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    qkvo = (_weight_of(getattr(attention, f"{name}_proj")) for name in "qkvo")
    gate_up_down = (_weight_of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    norms = (local(norm.weight.detach()) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    return LayerWeights(next(norms), *qkvo, next(norms), *gate_up_down)


def why_not_fused(model: Ministral3) -> str:
    """Why a model's decode step runs module by module, or an empty string."""
    body = model.model.language_model
    for module in (*body.modules(), model.lm_head):
        # not by getattr: what a module lacks takes it a microsecond, and every call asks
        if "lora_A" in module._parameters or "lora_A" in module._modules:
            return "it has adapters: merge_adapters(model) puts them into the weights"
        if vars(module).get("block_size") is not None:
            return "its FP8 weights have a scale for each block: quantize='fp8' makes one for each row"
        if has_hooks(module):
            return f"{type(module).__name__} has hooks"
    if not is_silu(body.layers[0].mlp.act_fn):
        return f"its activation is {model.config.text.hidden_act}, not silu"
    if model.lm_head.bias is not None:
        return "its head has a bias"
    return ""


def states_of(model: nn.Module) -> list[dict]:
    """The attributes of each module: walking through all of them at every call would take a millisecond."""
    return [vars(module) for module in model.modules()]


@contextmanager
def evaluating(states: list[dict]) -> Iterator[None]:
    """Without dropout in modules of these ``states_of``; afterwards each module trains again that did."""
    training = [state for state in states if state["training"]]
    for state in training:
        state["training"] = False
    try:
        yield
    finally:
        for state in training:
            state["training"] = True


def module_step(model: Ministral3) -> Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]:
    """The same step through the model's own modules, for what the fused one does not compute."""
    group, states = None if model.layout is None else model.layout.tp_group, states_of(model)

    def step(ids_B: Tensor, positions_B: Tensor, filled_B: Tensor, cache: KVCache) -> Tensor:
        rows = len(ids_B)
        sequences = Sequences((1,) * rows, tuple(range(rows)), ids_B.device)
        tokens = Tokens(ids_B, positions_B, sequences, None, (rows,))
        tokens = tokens if group is None else tokens.padded_to(group.size())
        with evaluating(states):
            x_tD = model.hidden_states(tokens, cache=cache, group=group)
        return model.logits(x_tD, tokens, 0, group).to(_wide(x_tD))

    return step
