"""Fused forwards of the Pixtral vision tower: two-dimensional rotary, residual add and norm."""

import torch
from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from m3kernels.ops import rotary_2d, rotary_2d_table
from m3kernels.patching.adapters import project
from m3kernels.patching.classes import ATTENTION, fused_forward, original_forward
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
    q, k, v = (
        y.view(heads).transpose(1, 2) for y in project(self, hidden_states, self.q_proj, self.k_proj, self.v_proj)
    )

    q, k = rotary_2d(q, k, position_embeddings)
    dropout = self.dropout if self.training else 0.0
    output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, **kwargs)
    (out,) = project(self, output.reshape(batch, patches, -1).contiguous(), self.o_proj)
    return out, weights


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


@merge_with_config_defaults
@capture_outputs
def _vision_forward(self: nn.Module, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs):
    """As transformers' forward, with the images' boundaries in place of a (patches, patches) mask."""
    if image_sizes is None:
        image_sizes = [pixel_values.shape[-2:]] * pixel_values.shape[0]
    maps = self.patch_conv(pixel_values.to(dtype=self.patch_conv.weight.dtype))
    size = self.patch_size
    images = [patches[..., : h // size, : w // size] for patches, (h, w) in zip(maps, image_sizes)]
    hidden_states = self.ln_pre(torch.cat([image.flatten(1).T for image in images], dim=0).unsqueeze(0))
    positions = [
        torch.stack(
            torch.meshgrid(*(torch.arange(n, device=hidden_states.device) for n in image.shape[1:]), indexing="ij"), -1
        )
        for image in images
    ]
    position_ids = torch.cat([p.flatten(0, 1) for p in positions])
    lengths = [image.shape[1] * image.shape[2] for image in images]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(hidden_states.device, torch.int32)
    return self.transformer(
        hidden_states,
        attention_mask=None,
        position_embeddings=self.patch_positional_embedding(hidden_states, position_ids),
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        **kwargs,
    )


@fused_forward("vision_model")
def vision_model_forward(self: nn.Module, *args, **kwargs):
    if self.config._attn_implementation != ATTENTION:  # set to another one since
        return original_forward(self)(self, *args, **kwargs)
    return _vision_forward(self, *args, **kwargs)
