"""FP8 weights for generation: E4M3 with a scale for each output channel, made on load, or as a checkpoint ships them.

Activations stay as they are (W8A16): a layer computes what it would with its weight dequantised, and reads half of the bytes.
The text model's layers are quantised; embedding, head, vision tower and projector are not, as in Mistral's own checkpoints.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from m3kernels.models.ministral3 import sharding
from m3kernels.models.ministral3.layers import Linear
from m3kernels.models.ministral3.shards import local_slices, part_of
from m3kernels.models.ministral3.weights import Checkpoint
from m3kernels.ops import fp8_linear
from m3kernels.ops.fp8_dequantize import FP8, quantize_rows
from m3kernels.parallel import local

if TYPE_CHECKING:
    from m3kernels.models.ministral3.model import Ministral3

LAYERS = "model.language_model.layers"
Quantize = Literal["fp8", "keep"]
ALLOWED = "None (no FP8), 'fp8' (a scale for each output channel, made on load) or 'keep' (an FP8 checkpoint's own)"


class QuantizationError(ValueError):
    """Weights that cannot be quantised, or kept in FP8, as asked; the message says what to do."""


class QuantizedLinear(nn.Module):
    """``x @ (weight * weight_scale).T``, on this rank's part of a sharded weight.

    Attributes:
        weight: (N, K) E4M3, frozen.
        weight_scale: fp32, what E4M3 numbers are multiplied with: one (), one for each row (N,) or one for each block; of a
            sharded weight those of this rank.
        block_size: rows and columns of a block; None where there are no blocks.
    """

    is_plain_linear = False  # its weight alone is not what it computes
    is_quantized_linear = True

    def __init__(self, weight: Tensor, scale: Tensor, block_size: tuple[int, int] | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block_size = block_size
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weight, scale, block = local(self.weight), self.weight_scale, self.block_size
        if scale.dim() == 1:
            scale, block = scale[:, None], (1, weight.shape[1])
        return fp8_linear(x, weight, scale, block_size=block)

    def _apply(self, fn, recurse=True):
        """Moves and never casts: a dtype asked of the model is that of what is not FP8."""

        def moved(t: Tensor) -> Tensor:
            done = fn(t)
            return done if done.dtype == t.dtype else t.to(done.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        scales = "tensor" if self.weight_scale.dim() == 0 else "row" if self.weight_scale.dim() == 1 else "block"
        return f"in_features={self.in_features}, out_features={self.out_features}, a scale for each {scales}"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """By name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def text_layers(model: "Ministral3") -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(name, parent, attribute, layer) of the linear layers of the text model's decoder layers."""
    for prefix, parent in model.get_submodule(LAYERS).named_modules(prefix=LAYERS):
        for attribute, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                yield f"{prefix}.{attribute}", parent, attribute, layer


@torch.no_grad()
def quantize_(model: "Ministral3", layers: Literal["text"] = "text") -> "Ministral3":
    """Puts the decoder layers' weights into E4M3 with a scale for each output channel, in place, one after the other.

    For generation: the layers are frozen, and ``save_pretrained`` refuses the model. Each number is within 2^-4 of itself, or
    within 2^-10 of its row's scale (the row's largest / 448) where it is below 2^-6 of that.

    Raises:
        QuantizationError: other layers, a model that is sharded, on meta, has adapters, or is quantised already.
    """
    if layers != "text":
        raise QuantizationError(f"layers={layers!r}; allowed: 'text': vision tower, projector, embedding and head stay")
    if model.layout is not None:
        raise QuantizationError("the model is sharded: load it with from_pretrained(..., mesh=mesh, quantize='fp8')")
    found = _plain_layers(model)
    if any(layer.weight.is_meta for *_, layer in found):
        raise QuantizationError("the model is on the meta device: load it with from_pretrained(..., quantize='fp8')")
    for _, parent, attribute, layer in found:
        setattr(parent, attribute, QuantizedLinear(*quantize_rows(layer.weight.detach())).train(layer.training))
    return model


def _plain_layers(model: "Ministral3") -> list[tuple[str, nn.Module, str, nn.Module]]:
    if quantized_layers(model):
        raise QuantizationError("the model is quantised already")
    found = list(text_layers(model))
    for name, _, _, layer in found:
        if type(layer) is not Linear:
            raise QuantizationError(f"{name} is a {type(layer).__name__}: merge_adapters(model) first")
    return found


def prepare_quantized(
    model: "Ministral3", checkpoint: Checkpoint, quantize: Quantize, mesh: DeviceMesh | None = None
) -> None:
    """Replaces layers of a model on meta, whose weights ``loading.load`` then reads in FP8 or quantises, one by one.

    Raises:
        QuantizationError: another ``quantize``, a checkpoint without FP8 weights to keep, or a mesh that spreads weights over
            data-parallel ranks or cuts through the blocks of scales.
    """
    if quantize not in ("fp8", "keep"):
        raise QuantizationError(f"quantize={quantize!r}; allowed: {ALLOWED}")
    if mesh is not None and mesh.size() != mesh["tp"].size():
        raise QuantizationError(
            f"quantize={quantize!r} with {mesh.size() // mesh['tp'].size()} data-parallel ranks: FP8 weights are for "
            "generation; take dp=1"
        )
    stored_fp8 = {name for name in checkpoint.names if checkpoint.stored_dtype(name) == FP8}
    kept = 0
    for name, parent, attribute, layer in _plain_layers(model):
        shape = (layer.out_features, layer.in_features)
        block = None
        if quantize == "fp8":
            scales = shape[:1]
        elif f"{name}.weight" in stored_fp8:
            kept += 1
            scales = checkpoint.scale_shape(f"{name}.weight")
            scales, block = (scales, checkpoint.block) if len(scales) == 2 else ((), None)
            if block is not None and mesh is not None:
                _check_blocks(name, shape, block, mesh["tp"].size())
        else:
            continue
        weight, scale = torch.empty(shape, dtype=FP8, device="meta"), torch.empty(scales, device="meta")
        setattr(parent, attribute, QuantizedLinear(weight, scale, block))
    if quantize == "keep" and not kept:
        raise QuantizationError(
            f"{checkpoint.folder} has no FP8 weights to keep: quantize='fp8' makes them, None loads what is there"
        )


def _check_blocks(name: str, shape: tuple[int, int], block: tuple[int, int], tp: int) -> None:
    dim = sharding.row_of(f"{name}.weight").dim
    if tp > 1 and shape[dim] // tp % block[dim]:
        raise QuantizationError(
            f"{name} {list(shape)} over tp={tp} is cut within a block of {list(block)} that shares a scale: take a smaller "
            "tp, or quantize='fp8' for scales of rows"
        )


def read_quantized(layer: QuantizedLinear, checkpoint: Checkpoint, name: str) -> None:
    """Fills a layer's part on this rank: scales of rows are made of whole rows, others are the checkpoint's own."""
    index = local_slices(layer.weight)
    if layer.weight_scale.dim() == 1:
        rows = None if index is None else index[:1]
        weight, scale = quantize_rows(checkpoint.read(name, rows, torch.float32))
        weight = weight if index is None else weight[:, index[1]]
    else:
        weight, scale = checkpoint.read_fp8(name, index)
    part = part_of(layer.weight)
    part.copy_(weight)
    layer.weight_scale = scale.to(part.device)
