"""A linear layer with a low-rank adapter, whole or on this rank's part: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).

With PEFT's casts and order (peft/tuners/lora/layer.py, variants.py, dora.py):

    LoRA    y = W x + s B A drop(x) + bias
    DoRA    y = W x + (k - 1) W drop(x) + k s B A drop(x) + bias       k = m / |W + s B A| by rows, the norm a constant
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from m3kernels.models.ministral3.layers import Linear
from m3kernels.ops import dora_norm
from m3kernels.ops._lora_launch import MAX_RANK
from m3kernels.parallel import all_reduce_sum, local

if TYPE_CHECKING:
    from m3kernels.models.ministral3.model import Ministral3

# N outputs, K inputs, R rank: of this rank's part of a layer that tensor parallelism splits. A column layer (q, k, v, gate,
# up) has some of N, a row layer (o, down) some of K: base and adapter are both a part of the sum that leaves it.


class AdapterError(ValueError):
    """Adapters that cannot be made, read or written as asked; nothing was changed. The message says what to do."""


@dataclass(frozen=True)
class AdapterConfig:
    """What adapters are alike in.

    Attributes:
        rank: R of A (R, K) and B (N, R).
        alpha: B A counts alpha / rank.
        dropout: probability that an input of the adapters is dropped in training, a mask for each layer.
        dora: with DoRA's magnitudes.
        dtype: of the adapters; None is the base weight's. fp32 beside fp64 weights computes the adapters in fp32.
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    dora: bool = False
    dtype: torch.dtype | None = torch.float32

    def __post_init__(self):
        if not 1 <= self.rank <= MAX_RANK:
            raise AdapterError(f"adapters of rank {self.rank}; allowed: 1 to {MAX_RANK}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise AdapterError(f"adapters with alpha {self.alpha}; allowed: above 0 (rank {self.rank} counts B A once)")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"adapters with dropout {self.dropout}; allowed: from 0 to below 1")
        if self.dtype is not None and not (self.dtype.is_floating_point and self.dtype.itemsize >= 2):
            raise AdapterError(f"adapters in {self.dtype}; allowed: float32, bfloat16, float16, float64")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


class AdaptedLinear(Linear):
    """``Linear`` with ``lora_A`` (R, K), ``lora_B`` (N, R) and, for DoRA, ``lora_magnitude`` (N,) beside its weight.

    Made of a ``Linear`` in place, by :func:`adapt`: the weight keeps its name.

    Attributes:
        scaling: what B A counts: alpha / R.
        dropout: probability that an input of the adapter is dropped in training.
    """

    is_plain_linear = False
    is_adapted_linear = True

    def forward(self, x: Tensor) -> Tensor:
        weight, A, B = local(self.weight), local(self.lora_A), local(self.lora_B)
        base = F.linear(x, weight)
        dropped = self.dropped(x.to(A.dtype))
        low = F.linear(F.linear(dropped, A), B) * self.scaling
        if self.lora_magnitude is None:
            y = base + low
        else:
            k = local(self.lora_magnitude) / self.row_norms(weight, A, B)
            rescaled = F.linear(dropped, weight.to(A.dtype)) if self.drops else base
            y = base + ((k - 1) * rescaled + k * low)
        y = y.to(base.dtype)
        return y if self.bias is None else y + local(self.bias)

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def dropped(self, x: Tensor) -> Tensor:
        """``x`` after dropout. Ranks that draw from equal generators make one mask: that of one process.

        So ranks that share a layer have to be seeded alike. A row layer's inputs differ by rank: each draws the mask of
        all of them and takes its columns.
        """
        if not self.drops:
            return x
        group = self.row_group
        if group is None:
            return F.dropout(x, self.dropout)
        whole = F.dropout(x.new_ones((*x.shape[:-1], self.in_features)), self.dropout)
        return x * whole[..., group.rank() * x.shape[-1] :][..., : x.shape[-1]]

    @property
    def row_group(self) -> ProcessGroup | None:
        """Ranks that hold the other columns of the weight, None where this rank has them all; as it is in a forward."""
        for dim, placement in enumerate(getattr(self.weight, "placements", ())):
            if placement.is_shard(1):
                return self.weight.device_mesh.get_group(dim)
        return None

    @torch.no_grad()
    def row_norms(self, weight: Tensor, A: Tensor, B: Tensor, backend: str = "reference") -> Tensor:
        """(N,): norms of the rows of ``W + s B A``, over all ranks' columns; of local tensors, without a gradient."""
        magnitude = self.lora_magnitude.dtype
        wide = torch.promote_types(torch.promote_types(A.dtype, magnitude), torch.float32)
        norms = dora_norm(weight, A.to(wide), B.to(wide), self.scaling, backend=backend)
        group = self.row_group
        if group is not None:
            norms = all_reduce_sum(norms.square(), group).sqrt()
        # rounded as the magnitude, which began as this norm: a fresh DoRA layer is the frozen one
        return norms.to(magnitude)

    def extra_repr(self) -> str:
        kind = "LoRA" if self.lora_magnitude is None else "DoRA"
        return f"{super().extra_repr()}, {kind} of rank {self.lora_A.shape[0]}, scaling={self.scaling:g}"


def adapt(layer: Linear, config: AdapterConfig) -> None:
    """Makes an :class:`AdaptedLinear` of a layer in place; the adapter's values are not set."""
    options = {"dtype": config.dtype or layer.weight.dtype, "device": layer.weight.device}
    layer.__class__ = AdaptedLinear
    layer.scaling, layer.dropout = config.scaling, config.dropout
    layer.lora_A = nn.Parameter(torch.empty(config.rank, layer.in_features, **options))
    layer.lora_B = nn.Parameter(torch.empty(layer.out_features, config.rank, **options))
    magnitude = nn.Parameter(torch.empty(layer.out_features, **options)) if config.dora else None
    layer.register_parameter("lora_magnitude", magnitude)


def unadapt(layer: AdaptedLinear) -> None:
    """The way back: the adapter is gone, whatever it was."""
    layer.__class__ = Linear
    del layer.lora_A, layer.lora_B, layer.lora_magnitude, layer.scaling, layer.dropout


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def check_adapted(model: "Ministral3") -> None:
    if model.adapters is None:
        raise AdapterError("the model has no adapters: add_adapters(model, config, targets) first")
