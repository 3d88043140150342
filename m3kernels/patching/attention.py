"""``attn_implementation="m3kernels"``: our attention as transformers names it, with its mask function.

A mask is (B, 1, S, 2) int32: the keys [lo, hi) that each query sees. Four dimensions pass through transformers as a mask
that is ready; nothing is S x S, nothing is read by the host, and one form says padding, packing, static caches and windows.
"""

import sys

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from m3kernels.ops._common import TRITON_DTYPES, why_no_triton
from m3kernels.ops.attention import MAX_HEAD_DIM, attention, visible, within
from m3kernels.ops.attention_decode import MAX_NEW_TOKENS, attention_decode
from m3kernels.patching.classes import ATTENTION, ATTENTION_WAS, note_fallback

# a mask's packed form, which the host knows: (cu_seqlens, longest); lost by whoever copies the mask, who gets the ranges
PACKED = "_m3k_packed"

# on a mask or on cu_seqlens: the dense form, where an implementation without kernels has asked for it
DENSE = "_m3k_dense"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config=None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """What transformers asks a mask function for; None: causal, the last query beside the last key, a window apart.

    Custom mask functions give the dense mask that SDPA would get.

    A padding mask with holes is a dense mask too; under ``torch.compile`` it is an assertion that fails on the device.
    """

    def dense() -> Tensor:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            config=config,
            device=device,
            **{"allow_is_bidirectional_skip": False} | kwargs,
        )

    if use_vmap or not getattr(config, "is_causal", True):
        return dense()
    tracing = torch.compiler.is_compiling()
    if attention_mask is not None and not tracing and attention_mask.shape[-1] == kv_length and attention_mask.all():
        attention_mask = None
    at_end = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    packs = not allow_is_causal_skip and attention_mask is None and at_end and q_length == kv_length > 1
    if attention_mask is None and at_end and not packs:
        return None

    position = torch.arange(q_length, device=device) + q_offset - kv_offset
    hi = (position + 1).clamp(max=kv_length).expand(batch_size, -1)
    lo = torch.zeros_like(hi) if local_size is None else (hi - local_size).clamp(min=0)
    if packs:
        starts = _starts(mask_function, batch_size, q_length, device)
        if not tracing and not starts[:, 1:].any():
            return None
        lo = torch.maximum(lo, torch.where(starts, position, 0).cummax(dim=-1).values)
        return _as_mask(lo, hi, None if tracing else _packed(starts))
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        seen = nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        seen = seen[:, kv_offset : kv_offset + kv_length].to(torch.int32)
        # the first and the last token that is none of padding
        first, last = seen.argmax(dim=-1), kv_length - seen.flip(-1).argmax(dim=-1)
        last = torch.where(seen.any(dim=-1), last, 0)
        if not tracing and (seen.sum(dim=-1) != (last - first).clamp(min=0)).any():
            note_fallback("attention", "a padding mask with holes is a dense mask")
            return dense()
        if tracing:
            torch._assert_async(
                (seen.sum(dim=-1) == (last - first).clamp(min=0)).all(),
                "attention_mask has holes, which m3kernels' attention does not take under torch.compile; use sdpa",
            )
        lo, hi = torch.maximum(lo, first[:, None]), torch.minimum(hi, last[:, None])
    return _as_mask(lo, hi, None)


def _starts(mask_function, batch: int, length: int, device) -> Tensor:
    """(B, S) bool: where a document of a packed row begins, which is where a token does not see the one before it."""
    row, token = torch.arange(batch, device=device)[:, None], torch.arange(1, length, device=device)[None, :]
    starts = torch.ones(batch, length, dtype=torch.bool, device=device)
    starts[:, 1:] = ~mask_function(row, torch.zeros_like(row), token, token - 1)
    return starts


def _packed(starts: Tensor) -> tuple[Tensor, int]:
    """(cu_seqlens over all rows, tokens of the longest document)."""
    ends = torch.tensor([starts.numel()], device=starts.device)
    cu = torch.cat([starts.flatten().nonzero()[:, 0], ends]).to(torch.int32)
    return cu, int(cu.diff().max())


def _as_mask(lo: Tensor, hi: Tensor, packed) -> Tensor:
    mask = torch.stack([lo, hi], dim=-1).to(torch.int32)[:, None]
    if packed is not None:
        setattr(mask, PACKED, packed)
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it: (B, H, S, D) in, (B, S, H, D) and no weights out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window if causal else None
    cu, longest = _documents(kwargs, attention_mask)
    if reason := _why_not(query, attention_mask, dropout, kwargs):
        if query.device.type == "cuda":
            note_fallback("attention", reason)
        wants_weights = kwargs.pop("output_attentions", False)
        implementation = "eager" if wants_weights else getattr(module, ATTENTION_WAS, "sdpa")
        seq, keys = query.shape[2], key.shape[2]
        plain = attention_mask is None and cu is None and (window is None or window >= keys)
        if implementation != "eager" and plain and (not causal or seq == keys or seq == 1):
            options = {"dropout": dropout, "scaling": scaling, "is_causal": causal}
            return sdpa_attention_forward(module, query, key, value, None, **options, **kwargs)
        mask = _dense(query, key, attention_mask, causal, window, cu)
        return _other(implementation, module, query, key, value, mask, dropout, scaling, sliding_window, **kwargs)

    ranges = None if attention_mask is None else attention_mask[:, 0]
    batch, heads, seq, dim = query.shape
    if cu is not None:
        q, k, v = (_one_row(t) for t in (query, key, value))
        out = attention(
            *(q, k, v),
            causal=causal,
            window=window,
            scale=scaling,
            cu_seqlens_q=cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
        )
        return out.transpose(1, 2).reshape(batch, seq, heads, dim), None
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if causal and seq <= MAX_NEW_TOKENS and not recorded:
        out = attention_decode(
            query, key, value, key_ranges=ranges, window=window if ranges is None else None, scale=scaling
        )
    else:
        out = attention(query, key, value, causal=causal, window=window, scale=scaling, key_ranges=ranges)
    return out.transpose(1, 2), None


def _documents(kwargs: dict, mask: Tensor | None) -> tuple[Tensor | None, int | None]:
    """(cu_seqlens, longest) of packed sequences: as the caller gave them, or as the mask function found them."""
    cu, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu is None:
        return getattr(mask, PACKED, (None, None)) if mask is not None else (None, None)
    return cu.to(torch.int32), None if longest is None else int(longest)


def _one_row(x: Tensor) -> Tensor:
    """(B, H, S, D) as (1, H, B * S, D); no copy of what projections give."""
    batch, heads, seq, dim = x.shape
    return x.transpose(1, 2).reshape(1, batch * seq, heads, dim).transpose(1, 2)


def _why_not(query: Tensor, mask: Tensor | None, dropout: float, kwargs: dict) -> str:
    """Why the kernels do not take a call, or an empty string."""
    if reason := why_no_triton(query.device.type):
        return reason
    if query.dtype not in TRITON_DTYPES:
        return f"{query.dtype}"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {query.shape[3]}"
    if dropout:
        return "attention dropout"
    if kwargs.get("output_attentions"):
        return "output_attentions"
    if mask is not None and (mask.dtype != torch.int32 or mask.shape[-1] != 2):
        return "a dense attention mask"
    return ""


def _dense(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, window: int | None, cu) -> Tensor | None:
    """(1 or B, 1, S, T): what another implementation needs in place of our mask; None: everything is seen.

    Kept on what it is made of, so that the layers of one forward share it.
    """
    source = cu if mask is None else mask
    made_for = (query.shape[2], key.shape[2], causal, window)
    kept = getattr(source, DENSE, None) if source is not None and not torch.compiler.is_compiling() else None
    if kept is not None and kept[0] == made_for:
        return kept[1]
    if mask is not None:
        dense = mask if mask.dtype != torch.int32 or mask.shape[-1] != 2 else within(mask[:, 0], key.shape[2])
    elif not causal and cu is None:
        return None
    else:
        dense = visible(query.shape[2], key.shape[2], causal, window, query.device)[None, None]
        if cu is not None:
            at = torch.arange(query.shape[2], device=query.device)
            document = torch.bucketize(at, cu[1:-1].contiguous(), right=True)
            dense = dense & (document[:, None] == document[None, :])
    if source is not None and dense is not source and not torch.compiler.is_compiling():
        setattr(source, DENSE, (made_for, dense))
    return dense


def _other(implementation, module, query, key, value, mask, dropout, scaling, window, **kwargs):
    """Eager attention where the model had it or weights are asked for, SDPA otherwise."""
    if implementation != "eager":
        options = {"dropout": dropout, "scaling": scaling, "is_causal": False}
        return sdpa_attention_forward(module, query, key, value, mask, **options, **kwargs)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
            ~mask, torch.finfo(query.dtype).min
        )
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, sliding_window=window, **kwargs)


def register() -> None:
    """Make the name known to transformers; twice is once."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, attention_mask)
