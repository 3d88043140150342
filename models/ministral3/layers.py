"""Parts that the text model and the vision tower share."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from m3kernels.models.ministral3.cache import KVCache
from m3kernels.ops._recompute import forget
from m3kernels.ops.attention import visible
from m3kernels.parallel import linear, local

# T tokens, D hidden, F intermediate, H query heads, G key-value heads, K head_dim, V vocabulary.
# t: the tokens of this rank, where the sequence is split over tensor-parallel ranks; T otherwise. Heads, F and V are
# those of this rank, as its weights have them.


class Linear(nn.Linear):
    """``x @ weight.T``, on this rank's part of a sharded weight."""

    is_plain_linear = True  # adapters and joint products may take its weight for what it computes

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, in fp32, cast before the weight as transformers does."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + update), x + update): a residual stream takes the last block's update where it is normed next."""
        if update is not None:
            x = x + update
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return local(self.weight) * normed.to(x.dtype), x

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class MLP(nn.Module):
    """``down(act(gate(x)) * up(x))``; under tensor parallelism this rank's part of the sum over F."""

    def __init__(self, width: int, intermediate: int, activation: str):
        super().__init__()
        self.gate_proj = Linear(width, intermediate, bias=False)
        self.up_proj = Linear(width, intermediate, bias=False)
        self.down_proj = Linear(intermediate, width, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_proj(x_TD), self.up_proj(x_TD)
        h_TF = forget(self.act_fn(gate_TF) * up_TF, lambda: self.act_fn(gate_TF) * up_TF)
        return self.down_proj(h_TF)


class Constant:
    """A tensor that goes to the device where it is used, once for each; a buffer would be cast with the model."""

    def __init__(self, value: Tensor):
        self._on = {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = next(iter(self._on.values())).to(device)
        return self._on[device]


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rotate(x_THK: Tensor, table_TK: Tensor) -> Tensor:
    """Rotary embedding by a [cos | sin] table, rounded to the activations' dtype first as transformers does."""
    cos, sin = (torch.cat([half, half], dim=-1)[:, None].to(x_THK.dtype) for half in table_TK.chunk(2, dim=-1))
    return x_THK * cos + rotate_half(x_THK) * sin


@dataclass(frozen=True)
class Sequences:
    """How packed tokens divide into sequences that do not see each other.

    Attributes:
        lengths: of each, on the host: what lets a forward run without waiting for the device.
        rows: the cache's row of each; -1 is kept nowhere.
        device: where ``cu_seqlens`` is wanted.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    device: torch.device

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where each begins, and the number of tokens: int32 on the device, made once for all layers."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)


class SequenceAttention(nn.Module):
    """Softmax attention within each sequence of packed tokens, after what a cache holds of it."""

    def __init__(self, *, causal: bool, window: int | None = None, dropout: float = 0.0, layer: int = 0):
        super().__init__()
        self.causal, self.window, self.dropout, self.layer = causal, window, dropout, layer

    def forward(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, sequences: Sequences, cache: KVCache | None = None
    ) -> Tensor:
        """(T, H, K)."""
        queries = q_THK.split(sequences.lengths)
        if cache is not None:
            cache.write(self.layer, k_TGK, v_TGK)
        if cache is None or cache.fresh:
            keys, values = (x.transpose(0, 1).split(sequences.lengths, dim=1) for x in (k_TGK, v_TGK))
            return torch.cat([self.one(q, k, v) for q, k, v in zip(queries, keys, values)])
        keys, values = cache.read(self.layer, k_TGK.dtype)
        outs = []
        for q, row, filled in zip(queries, sequences.rows, cache.filled):
            seen = (keys[row, :, :filled], values[row, :, :filled])
            outs.append(self.one(q, *seen) if row >= 0 else torch.zeros_like(q))
        return torch.cat(outs)

    def one(self, q_SHK: Tensor, k_GUK: Tensor, v_GUK: Tensor) -> Tensor:
        """S queries of one sequence, the last of which stands beside the last of U keys; (S, H, K)."""
        queries, keys = q_SHK.shape[0], k_GUK.shape[1]
        plain = queries == keys and self.window is None
        options = {"dropout_p": self.dropout if self.training else 0.0, "enable_gqa": True}
        if self.causal and plain:
            options["is_causal"] = True
        elif self.causal and (queries > 1 or self.window is not None):
            options["attn_mask"] = visible(queries, keys, True, self.window, q_SHK.device)
        qkv = (q_SHK.transpose(0, 1)[None], k_GUK[None], v_GUK[None])
        return F.scaled_dot_product_attention(*qkv, **options)[0].transpose(0, 1)
