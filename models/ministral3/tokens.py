"""Batches as one row of tokens without padding, and the way back to Hugging Face's shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from m3kernels.models.ministral3.cache import KVCache
from m3kernels.models.ministral3.layers import Sequences


@dataclass(frozen=True)
class Tokens:
    """T tokens of several sequences, one after the other; none of them is padding.

    Attributes:
        ids_T: token ids.
        positions_T: of each token in its sequence, as rotary embedding and query scale count; any integers.
        sequences: how they divide.
        columns_T: where the tokens stood in a padded (batch, seq) input, flattened; None for an input of one row.
        shape: of that input.
        pad: how many tokens at the end are there only to make T divisible; they are a sequence of their own.
    """

    ids_T: Tensor
    positions_T: Tensor
    sequences: Sequences
    columns_T: Tensor | None
    shape: tuple[int, ...]
    pad: int = 0

    def padded_to(self, multiple: int) -> "Tokens":
        """With as many tokens more as make T divisible."""
        pad = -self.ids_T.shape[0] % multiple
        if not pad:
            return self
        old = self.sequences
        return replace(
            self,
            ids_T=F.pad(self.ids_T, (0, pad)),
            positions_T=F.pad(self.positions_T, (0, pad)),
            sequences=Sequences((*old.lengths, pad), (*old.rows, -1), old.device),
            pad=pad,
        )

    def pick(self, x: Tensor) -> Tensor:
        """The rows that are tokens of a tensor of the input's shape, and of one more row for each pad, filled by -100."""
        flat = x.flatten()
        flat = flat if self.columns_T is None else flat[self.columns_T]
        return F.pad(flat, (0, self.pad), value=-100) if self.pad else flat

    def rows(self, x: Tensor) -> Tensor:
        """(T, D): those that are tokens of (*input's shape, D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        return x_TD if self.columns_T is None else x_TD[self.columns_T]

    def spread(self, x_TV: Tensor) -> Tensor:
        """(T, V) as (*input's shape, V); zeros where the input had padding."""
        x_TV = x_TV[: x_TV.shape[0] - self.pad]
        if self.columns_T is None:
            return x_TV.view(*self.shape, -1)
        out = x_TV.new_zeros(math.prod(self.shape), x_TV.shape[-1])
        return out.index_copy(0, self.columns_T, x_TV).view(*self.shape, -1)


def from_rows(
    ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: KVCache | None = None,
    *,
    use_cache: bool = False,
) -> Tokens:
    """Hugging Face's batch.

    Args:
        ids: (batch, seq) integers.
        attention_mask: (batch, seq), or (batch, seen + seq) beside a cache; 0 is padding, anywhere in a row.
        position_ids: (batch or 1, seq); by default as transformers counts them, padding included. Where they do not
            go on by one, and there is neither mask nor cache, another packed sequence begins.
        cache: what was seen before.
        use_cache: whether a cache begins, whose rows are those of the batch.

    Raises:
        ValueError: a mask or positions of another shape; a mask that is not one of padding, or of nothing else.
    """
    batch, seq = ids.shape
    seen = 0 if cache is None else cache.columns
    if attention_mask is not None:
        if (
            attention_mask.dim() != 2
            or attention_mask.shape[1] not in (seq, seen + seq)
            or attention_mask.shape[0] != batch
        ):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)} for input_ids {[batch, seq]} after {seen} cached; allowed: "
                f"[{batch}, {seq}] or [{batch}, {seen + seq}] of padding; packed sequences go by position_ids or cu_seqlens"
            )
        attention_mask = attention_mask[:, -seq:].to(ids.device) != 0
    if position_ids is None:
        positions = torch.arange(seen, seen + seq, device=ids.device).expand(batch, seq)
    elif position_ids.shape[-1] != seq or position_ids.numel() not in (seq, batch * seq):
        raise ValueError(
            f"position_ids are {list(position_ids.shape)}; allowed for input_ids {[batch, seq]}: the same or [1, {seq}]"
        )
    else:
        positions = position_ids.to(ids.device).view(-1, seq).expand(batch, seq)
    if attention_mask is not None and not bool(attention_mask.all()):
        columns = attention_mask.flatten().nonzero()[:, 0]
        counts = attention_mask.sum(1).tolist()
        rows = tuple(i for i, n in enumerate(counts) if n)
        lengths = tuple(n for n in counts if n)
        if not lengths:
            raise ValueError(f"attention_mask of {[batch, seq]} is 0 everywhere: there is no token to compute")
        sequences = Sequences(lengths, rows, ids.device)
        return Tokens(ids.flatten()[columns], positions.flatten()[columns], sequences, columns, (batch, seq))
    lengths, rows = (seq,) * batch, tuple(range(batch))
    if position_ids is not None and attention_mask is None and cache is None and not use_cache and seq > 1:
        lengths, rows = _packed(positions)
    sequences = Sequences(lengths, rows, ids.device)
    return Tokens(ids.flatten(), positions.flatten(), sequences, None, (batch, seq))


def _packed(positions: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(lengths, rows) of the sequences in rows of positions: one begins with each row, and where they jump."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    starts = begins.flatten().nonzero()[:, 0].tolist()
    ends = [*starts[1:], positions.numel()]
    return tuple(b - a for a, b in zip(starts, ends)), tuple(range(len(starts)))


def from_packed(ids: Tensor, cu_seqlens: Tensor | Sequence[int], position_ids: Tensor | None = None) -> Tokens:
    """One row of packed sequences, (T,) or (1, T), that ``cu_seqlens`` tells apart.

    Raises:
        ValueError: boundaries that do not rise from 0 to T, or positions of another number of tokens.
    """
    flat, total = ids.flatten(), ids.numel()
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if bounds[:1] != [0] or bounds[-1] != total or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {total}; got {bounds[:8]}")
    lengths = tuple(b - a for a, b in zip(bounds, bounds[1:]) if b > a)
    if position_ids is None:
        positions = torch.cat([torch.arange(n, device=flat.device) for n in lengths])
    elif position_ids.numel() != total:
        raise ValueError(f"position_ids are {list(position_ids.shape)} for {total} tokens")
    else:
        positions = position_ids.to(flat.device).flatten()
    sequences = Sequences(lengths, tuple(range(len(lengths))), flat.device)
    return Tokens(flat, positions, sequences, None, tuple(ids.shape))
