"""Fused forwards of the Pixtral vision tower: two-dimensional rotary, residual add and norm."""

from torch import Tensor, nn

from m3kernels.ops import rotary_2d, rotary_2d_table
from m3kernels.patching.classes import fused_forward
from m3kernels.patching.text import add_norm, attend, attention_facts, duplicate_halves, table_for


@fused_forward("rotary_2d_table")
def vision_rotary_embedding_forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (patches, head_dim) as in transformers, but fp32 whatever the activations are."""
    return duplicate_halves(rotary_2d_table(self.inv_freq, position_ids.to(x.device), self.attention_scaling))


@fused_forward("rotary_2d", attention_facts)
def vision_attention_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    batch, patches, _ = hidden_states.shape
    heads = (batch, patches, -1, self.head_dim)
    q = self.q_proj(hidden_states).view(heads).transpose(1, 2)
    k = self.k_proj(hidden_states).view(heads).transpose(1, 2)
    v = self.v_proj(hidden_states).view(heads).transpose(1, 2)

    q, k = rotary_2d(q, k, position_embeddings)
    dropout = self.dropout if self.training else 0.0
    output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, **kwargs)
    return self.o_proj(output.reshape(batch, patches, -1).contiguous()), weights


@fused_forward("vision_add_rms_norm")
def vision_layer_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs,
) -> Tensor:
    attended, _ = self.attention(
        hidden_states=self.attention_norm(hidden_states),
        attention_mask=attention_mask,
        position_embeddings=table_for(self.attention, position_embeddings, hidden_states.dtype),
        **kwargs,
    )
    normed, residual = add_norm(self.ffn_norm, attended, hidden_states)
    return residual + self.feed_forward(normed)
