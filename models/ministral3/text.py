"""The language model: grouped-query attention with YaRN and the Llama-4 query scale, SwiGLU, over packed tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m3kernels.models.ministral3.cache import KVCache
from m3kernels.models.ministral3.config import TextConfig
from m3kernels.models.ministral3.layers import MLP, Constant, Linear, RMSNorm, SequenceAttention, rotate
from m3kernels.models.ministral3.recompute import RUN
from m3kernels.models.ministral3.tokens import Tokens
from m3kernels.ops import rotary_table
from m3kernels.ops._recompute import forget
from m3kernels.parallel import all_gather_tokens, local, reduce_scatter_tokens, vocab_parallel_embedding


@dataclass(frozen=True)
class Step:
    """What every layer of a forward needs besides its input.

    Attributes:
        tokens: positions and boundaries of the sequences.
        table_TK: fp32 [cos | sin] of the positions.
        cache: keys and values of what was seen before, None without one.
        group: the tensor-parallel ranks, None for one.
    """

    tokens: Tokens
    table_TK: Tensor
    cache: KVCache | None = None
    group: torch.distributed.ProcessGroup | None = None


def query_scale(positions_T: Tensor, beta: float, original_max: int, dtype: torch.dtype) -> Tensor:
    """(T, 1, 1): ``1 + beta * ln(1 + floor(position / original_max))``, in fp32 first."""
    return (1 + beta * torch.log(1 + torch.floor(positions_T / original_max)))[:, None, None].to(dtype)


class Attention(nn.Module):
    """Grouped-query attention of packed sequences; under tensor parallelism over this rank's heads."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.config = config
        options = {"window": config.sliding_window, "dropout": config.attention_dropout}
        self.core = SequenceAttention(causal=True, layer=layer, **options)
        self.q_proj = Linear(width, config.num_heads * head_dim, bias=False)
        self.k_proj = Linear(width, config.num_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(width, config.num_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(config.num_heads * head_dim, width, bias=False)

    def forward(self, x_TD: Tensor, step: Step) -> Tensor:
        heads = (-1, self.config.head_dim)
        q_THK = self.q_proj(x_TD).unflatten(-1, heads)
        k_TGK = self.k_proj(x_TD).unflatten(-1, heads)
        v_TGK = self.v_proj(x_TD).unflatten(-1, heads)

        q_THK, k_TGK = rotate(q_THK, step.table_TK), rotate(k_TGK, step.table_TK)
        if llama4 := self.config.rope.llama4:
            q_THK = q_THK * query_scale(step.tokens.positions_T, *llama4, q_THK.dtype)

        out_THK = self.core(q_THK, k_TGK, v_TGK, step.tokens.sequences, step.cache)
        return self.o_proj(out_THK.flatten(1))


class DecoderLayer(nn.Module):
    """Attention and MLP on a residual stream that takes the last block's update where it is normed next."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, update_tD: Tensor, residual_tD: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """(update, residual), whose sum is the layer's output; ``residual`` None stands for zero."""
        h_TD, residual_tD = self.normed(self.input_layernorm, update_tD, residual_tD, step)
        update_TD = self.self_attn(h_TD, step)
        update_tD = reduce_scatter_tokens(update_TD, step.group)

        h_TD, residual_tD = self.normed(self.post_attention_layernorm, update_tD, residual_tD, step)
        update_TD = self.mlp(h_TD)
        update_tD = reduce_scatter_tokens(update_TD, step.group)
        return update_tD, residual_tD

    @staticmethod
    def normed(norm: RMSNorm, update_tD: Tensor, residual_tD: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """(all tokens' norm of the sum, this rank's sum): the norm and its all-gather may be made again in the backward."""
        h_tD, residual_tD = norm(update_tD, residual_tD)
        h_TD = all_gather_tokens(h_tD, step.group)
        return forget(h_TD, lambda: all_gather_tokens(norm(residual_tD)[0], step.group)), residual_tD


class Embedding(nn.Embedding):
    """Rows of the table; of this rank's part of it, zeros for other ranks' ids, where the vocabulary is sharded."""

    def __init__(self, config: TextConfig):
        super().__init__(config.vocab_rows, config.hidden_size, config.pad_token_id)
        self.vocab_size = config.vocab_size

    def forward(self, ids_T: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
        options = {"padding_idx": self.padding_idx, "vocab_size": self.vocab_size}
        return vocab_parallel_embedding(ids_T, local(self.weight), group, **options)


class LanguageModel(nn.Module):
    """Token embeddings, decoder layers and the last norm."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = ("none",) * config.num_layers  # of each layer; see recompute.set_recompute
        self.inv_freq = Constant(config.rope.inv_freq(config.head_dim))

    def embed(self, ids_T: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
        """Embeddings of this rank's tokens, (t, D)."""
        partial_TD = self.embed_tokens(ids_T, group)
        return reduce_scatter_tokens(partial_TD, group)

    def forward(
        self,
        x_tD: Tensor,
        tokens: Tokens,
        cache: KVCache | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (t, D)."""
        table_TK = rotary_table(self.inv_freq.on(x_tD.device), tokens.positions_T, self.config.rope.attention_factor)
        step = Step(tokens, table_TK, cache, group)
        update_tD, residual_tD = x_tD, None
        for layer, mode in zip(self.layers, self.recompute):
            run = RUN[mode if torch.is_grad_enabled() else "none"]
            update_tD, residual_tD = run(layer, update_tD, residual_tD, step)
        return self.norm(update_tD, residual_tD)[0]
