"""Selective recompute: what a decoder layer keeps for its backward, by layer, chosen by hand or by a memory budget.

none        everything
cheap       no outputs of norms and SwiGLU: made again from what their own backward keeps (rotary keeps nothing anyway)
attention   the layer's input, and attention's output with its log-sum-exp: all is recomputed but attention
all         the layer's input

Layers of the vision tower recompute what ``model.model.vision_tower.recompute`` says, nothing by default.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from m3kernels.ops._recompute import KeptOutputs, forgetting
from m3kernels.patching.classes import note_fallback

if TYPE_CHECKING:
    from m3kernels.models.ministral3.config import TextConfig


def _none(layer: nn.Module, *inputs):
    return layer(*inputs)


def _cheap(layer: nn.Module, *inputs):
    with forgetting():
        return layer(*inputs)


def _attention(layer: nn.Module, *inputs):
    kept = KeptOutputs()

    def run(*inputs):
        with kept.used():
            return layer(*inputs)

    outputs = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=_draws(layer))
    if not kept.any:
        note_fallback("attention under recompute", "its output is kept by our kernels only, so it is computed again")
    return outputs


def _all(layer: nn.Module, *inputs):
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=_draws(layer))


def _draws(layer: nn.Module) -> bool:
    """Whether a forward may take random numbers: for attention's dropout, or that of an adapter in the layer."""
    return any(getattr(module, "p", 0) or getattr(module, "dropout", 0) for module in layer.modules())


# from the least recompute to the most
RUN: dict[str, Callable] = {"none": _none, "cheap": _cheap, "attention": _attention, "all": _all}


def set_recompute(
    model: nn.Module,
    mode: str | Sequence[str] | None = None,
    *,
    budget_bytes: int | None = None,
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """Chooses what the decoder layers of a ``Ministral3`` recompute.

    "attention" needs kernels that give attention's log-sum-exp: without ``m3kernels.patch`` on a GPU it recomputes all, and
    says so once.

    Args:
        mode: one for all layers, or one for each.
        budget_bytes: instead of ``mode``: what the layers of this rank may keep; the least recompute that fits is taken.
        tokens: with it, how many tokens a forward has (all of them under tensor parallelism).
        dtype: with it, of the activations; the parameters' by default.

    Returns:
        The mode of each layer.

    Raises:
        ValueError: an unknown mode, another number of them than layers, or a budget that nothing fits into.
    """
    text = model.model.language_model
    count = len(text.layers)
    if (mode is None) == (budget_bytes is None):
        raise ValueError("set_recompute takes either a mode or a budget_bytes with tokens")
    if budget_bytes is not None:
        if tokens is None:
            raise ValueError("budget_bytes needs tokens: how many a forward has")
        tp = 1 if model.layout is None else model.layout.mesh["tp"].size()
        kept = kept_bytes(text.config, tokens, dtype or text.norm.weight.dtype, tp)
        modes = least_recompute(kept, count, budget_bytes)
    else:
        modes = (mode,) * count if isinstance(mode, str) else tuple(mode)
    if unknown := set(modes) - RUN.keys():
        raise ValueError(f"unknown recompute mode {sorted(unknown)}; allowed: {', '.join(RUN)}")
    if len(modes) != count:
        raise ValueError(f"{len(modes)} recompute modes for {count} layers")
    text.recompute = modes
    return modes


def kept_bytes(config: "TextConfig", tokens: int, dtype: torch.dtype, tp: int = 1) -> dict[str, int]:
    """What one layer of the patched model keeps for its backward on one rank, by mode; nothing that a step shares."""
    size, here = dtype.itemsize, tokens / tp
    residual = here * config.hidden_size * size
    normed = tokens * config.hidden_size * size
    rstd = here * 4
    kv = 2 * here * config.num_kv_heads * config.head_dim * size
    heads = here * config.num_heads * config.head_dim * size
    lse = here * config.num_heads * 4
    product = here * config.intermediate_size * size
    cheap = 2 * (residual + rstd) + heads + kv + heads + lse + 2 * product
    each = {
        "none": cheap + 2 * normed + product,
        "cheap": cheap,
        "attention": 2 * residual + heads + lse,
        "all": 2 * residual,
    }
    return {mode: round(kept) for mode, kept in each.items()}


def least_recompute(kept: dict[str, int], layers: int, budget_bytes: int) -> tuple[str, ...]:
    """Modes of the layers that keep at most ``budget_bytes``: as few layers as possible one step beyond the others.

    Raises:
        ValueError: recomputing everything keeps more.
    """
    order = list(RUN)
    for less, more in zip(order, order[1:]):
        saved = kept[less] - kept[more]
        over = layers * kept[less] - budget_bytes
        raised = max(0, -(-over // saved))
        if raised <= layers:
            # the last layers run backward first, while all others still keep theirs
            return (more,) * raised + (less,) * (layers - raised)
    raise ValueError(
        f"{layers} layers keep {layers * kept[order[-1]] / 2**30:.2f} GiB when all is recomputed, the budget is "
        f"{budget_bytes / 2**30:.2f}: take fewer tokens a forward, or more ranks"
    )
