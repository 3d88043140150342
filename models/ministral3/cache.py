"""Keys and values of what was seen, without padding: row ``i`` holds the first ``lengths[i]`` tokens of sequence ``i``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.ops import kv_write
from m3kernels.ops.fp8_dequantize import FP8

GROWS_BY = 256


@dataclass(frozen=True)
class LayerCache:
    """One layer's memory.

    Attributes:
        keys, values: (batch, G, room, K).
        key_scales, value_scales: (batch, G, room) fp32 of an E4M3 cache, one for each token and head; else None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> "LayerCache":
        """Zeros: what nobody has written may be read, and masked, by a kernel."""
        pair = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        scales = [torch.zeros(shape[:3], device=device) for _ in range(2)] if dtype == FP8 else []
        return cls(*pair, *scales)

    def write(self, k_TGK: Tensor, v_TGK: Tensor, row_T: Tensor | None, at_T: Tensor) -> None:
        """Keys and values of tokens to their rows (None: token i is row i's) and places, on the device."""
        dtype = self.keys.dtype
        if self.key_scales is None and k_TGK.dtype != dtype:
            k_TGK, v_TGK = k_TGK.to(dtype), v_TGK.to(dtype)
        scales = {"k_scale": self.key_scales, "v_scale": self.value_scales}
        kv_write(k_TGK, v_TGK, self.keys, self.values, row_T, at_T, **scales)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(t for t in every if t is not None)


class KVCache:
    """Keys and values of every layer, each (batch, G, room, K).

    Attributes:
        lengths: tokens that each sequence has in it.
        filled: of the forward that has begun, for each of its packed sequences: tokens in the cache with its own, 0 for
            padding; ``filled_on_device`` is the same as int32 there, made once for all layers.
        columns: how many columns of (batch, seq) inputs went through it, padding included: where transformers' default
            positions go on.
        room: for how many tokens a sequence there is memory. It grows on demand, to twice what it was.
        table: (room, K) fp32 [cos | sin] of every position, where a decode step keeps one.
        dtype: of the memory: None is that of the keys; E4M3 keeps a scale for each token and head.
    """

    def __init__(self, batch: int, room: int = GROWS_BY, *, dtype: torch.dtype | None = None):
        self.lengths = [0] * batch
        self.columns = 0
        self.room = room
        self.dtype = dtype
        self.table: Tensor | None = None
        self._layers: dict[int, LayerCache] = {}
        self._slots: tuple[Tensor, Tensor] | None = None
        self._rows: tuple[int, ...] = ()
        self.filled: tuple[int, ...] = ()
        self.filled_on_device: Tensor | None = None

    def begin(self, rows: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> None:
        """Makes room for a forward over packed sequences; a row of -1 is padding and is not kept.

        Raises:
            ValueError: a batch of more sequences than the cache was made for.
        """
        if max(rows) >= len(self.lengths):
            raise ValueError(f"the cache holds {len(self.lengths)} sequences, the batch has more: {max(rows) + 1}")
        self._rows = rows
        self.filled = tuple(self.lengths[row] + length if row >= 0 else 0 for row, length in zip(rows, lengths))
        self.filled_on_device = torch.tensor(self.filled, dtype=torch.int32, device=device)
        kept = [(row, length) for row, length in zip(rows, lengths) if row >= 0]
        needed = max(self.filled)
        if needed > self.room:
            self.room = max(needed, 2 * self.room)
            for layer, held in self._layers.items():
                self._layers[layer] = LayerCache(*(_longer(x, self.room) for x in held.tensors))
        row_T = torch.repeat_interleave(*(torch.tensor(x) for x in ([r for r, _ in kept], [n for _, n in kept])))
        at_T = torch.cat([torch.arange(self.lengths[row], self.lengths[row] + length) for row, length in kept])
        self._slots = tuple(x.to(device, non_blocking=True) for x in (row_T, at_T))

    @property
    def fresh(self) -> bool:
        """Whether the forward that has begun sees nothing but its own tokens."""
        return not any(self.lengths[row] for row in self._rows if row >= 0)

    def layer(self, number: int) -> LayerCache:
        """The memory of a layer that something was written to."""
        return self._layers[number]

    def _memory(self, number: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """A layer's memory, made where there is none yet."""
        if number not in self._layers:
            shape = (len(self.lengths), heads, self.room, head_dim)
            self._layers[number] = LayerCache.empty(shape, dtype, device)
        return self._layers[number]

    def write(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Appends the tokens of the forward that has begun."""
        _, heads, head_dim = k_TGK.shape
        held = self._memory(layer, heads, head_dim, self.dtype or k_TGK.dtype, k_TGK.device)
        row_T, at_T = self._slots
        # padding comes last
        k_TGK, v_TGK = (x[: len(row_T)].detach() for x in (k_TGK, v_TGK))
        held.write(k_TGK, v_TGK, row_T, at_T)

    def read(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(keys, values), each (batch, G, room, K) in ``dtype``; of an E4M3 cache as long as the longest sequence."""
        held = self._layers[layer]
        if held.key_scales is None:
            return held.keys, held.values
        n = max(self.filled)
        pairs = ((held.keys, held.key_scales), (held.values, held.value_scales))
        return tuple((x[:, :, :n].float() * scale[:, :, :n, None]).to(dtype) for x, scale in pairs)

    def end(self, columns: int) -> None:
        """Counts the tokens that every layer has appended, out of ``columns`` of input."""
        for row, filled in zip(self._rows, self.filled):
            if row >= 0:
                self.lengths[row] = filled
        self.columns += columns

    def take(self, source: "KVCache", rows: list[int], from_rows: list[int], lengths: list[int]) -> None:
        """Makes rows begin with what other rows, of this or of another cache, begin with.

        Args:
            rows: of this cache, each once.
            from_rows: of ``source``, for each of them.
            lengths: tokens that each takes; what it had is forgotten.
        """
        if rows and (count := max(lengths)):
            for number, theirs in source._layers.items():
                _, heads, _, head_dim = theirs.keys.shape
                held = self._memory(number, heads, head_dim, theirs.keys.dtype, theirs.keys.device)
                for mine, other in zip(held.tensors, theirs.tensors):
                    mine[rows, :, :count] = other[from_rows, :, :count]
        for row, length in zip(rows, lengths):
            self.lengths[row] = length


def _longer(x: Tensor, room: int) -> Tensor:
    out = x.new_zeros((*x.shape[:2], room, *x.shape[3:]))
    out[:, :, : x.shape[2]] = x
    return out
