"""Several projections of one input as one matrix product, while each keeps its own parameter under its own name.

Their weights are laid side by side in one buffer, of which each parameter has its part as a storage of its own: state dicts,
optimizers, adapters and what saves tensors by their storages (safetensors, accelerate) see what they always saw. Where the
weights have come apart (a copy, a cast, FSDP's own buffers, shards), each has its product again, and their backward is one.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m3kernels import parallel
from m3kernels.parallel.local import gradients_of_linears
from m3kernels.patching.classes import has_hooks, is_plain

# by the id of the first parameter, as long as that lives; an attribute of it would be copied and saved along
_wholes: dict[int, Tensor] = {}


def lay_side_by_side(*layers: nn.Linear) -> None:
    """Moves the weights of layers into one buffer, in place; nothing where they cannot be or are there already."""
    weights = [layer.weight for layer in layers]
    kinds = {(w.dtype, w.device, w.shape[1:]) for w in weights}
    if len(kinds) > 1 or not all(map(is_plain, weights)) or weights[0].is_meta or _whole(weights) is not None:
        return
    if weights[0].dtype.itemsize < 2:  # each has scales of its own
        return
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([w.shape[0] for w in weights])):
        weight.data = _with_own_storage(part)
    _wholes[id(weights[0])] = whole
    weakref.finalize(weights[0], _wholes.pop, id(weights[0]), None).atexit = False


def _with_own_storage(part: Tensor) -> Tensor:
    """The same memory as a storage by itself: one of several parameters' would be taken for tied weights, and saved once."""
    begin = part.storage_offset() * part.element_size()
    storage = part.untyped_storage()[begin : begin + part.nbytes]
    return part.new_empty(0).set_(storage, 0, part.shape, part.stride())


def _whole(weights: list[Tensor] | tuple[Tensor, ...]) -> Tensor | None:
    """The (sum of rows, columns) tensor that weights are the parts of, or None where they are no neighbours."""
    whole = _wholes.get(id(weights[0]))
    if whole is None:
        return None
    if weights[0].data_ptr() != whole.data_ptr():
        _wholes.pop(id(weights[0]), None)  # it was moved, and nothing else needs the buffer
        return None
    rows, end = 0, whole.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != whole.dtype or not weight.is_contiguous():
            return None
        rows, end = rows + weight.shape[0], end + weight.nbytes
    return whole[:rows]


def whole_weight(x: Tensor, *layers: nn.Module) -> Tensor | None:
    """One weight for all layers, or None where a call needs each by itself: biases, adapters, hooks, autocast, shards."""
    if not _are_linear(x, layers) or not all(is_plain(layer.weight) for layer in layers):
        return None
    return _whole([layer.weight for layer in layers])


def _are_linear(x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
    """Whether the layers are nothing but products of x with their weights."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    for layer in layers:
        if not getattr(layer, "is_plain_linear", False) or layer.bias is not None or has_hooks(layer):
            return False
        if layer.weight.dtype != x.dtype:
            return False
    return True


def linears(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...] | None:
    """Each layer's product with weights anywhere, this rank's parts of sharded ones; None where a layer is more than that.

    In the backward the products add up the gradient of x themselves, where autograd would add all tokens of it each time.
    """
    if len(layers) < 2 or not torch.is_grad_enabled() or not _are_linear(x, layers):
        return None
    return parallel.linears(x, *(layer.weight for layer in layers))


class _JointLinear(torch.autograd.Function):
    """``x @ whole.T`` with a gradient for each part of the whole weight."""

    @staticmethod
    def forward(ctx, x: Tensor, whole: Tensor, split: bool, *weights: Tensor):
        # the weights for their versions: in-place changes before the backward are an error, as they are everywhere
        ctx.save_for_backward(x, whole, *weights)
        ctx.sizes, ctx.split = [w.shape[0] for w in weights], split
        y = F.linear(x, whole)
        return y.split(ctx.sizes, dim=-1) if split else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor):
        x, whole, *_ = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        if not ctx.split:
            dy = dys[0].flatten(0, -2)
            dx = (dy @ whole).view(x.shape) if needs_dx else None
            dws = (dy.t() @ x.flatten(0, -2)).split(ctx.sizes) if needs_dw else [None] * len(ctx.sizes)
            return dx, None, None, *dws
        dx, dws = gradients_of_linears(x, dys, whole.split(ctx.sizes), needs_dx, ctx.needs_input_grad[3:])
        return dx, None, None, *dws


def joint_linear(x: Tensor, whole: Tensor, *layers: nn.Linear, split: bool) -> Tensor | tuple[Tensor, ...]:
    """The layers' outputs side by side, (..., sum of rows), or each as a view of that.

    The backward takes them apart where the gradients come apart (q, k, v), and is one product each for input and weights
    where they come as one (gate and up out of SwiGLU).
    """
    weights = [layer.weight for layer in layers]
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        return _JointLinear.apply(x, whole, split, *weights)
    y = F.linear(x, whole)
    return y.split([w.shape[0] for w in weights], dim=-1) if split else y
