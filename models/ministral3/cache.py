"""Keys and values of what was seen, without padding: row ``i`` holds the first ``lengths[i]`` tokens of sequence ``i``."""

import torch
from torch import Tensor

GROWS_BY = 256


class KVCache:
    """Keys and values of every layer, each (batch, G, room, K).

    Attributes:
        lengths: tokens that each sequence has in it.
        filled: of the forward that has begun, for each of its packed sequences: tokens in the cache with its own, 0 for
            padding; ``filled_on_device`` is the same as int32 there, made once for all layers.
        columns: how many columns of (batch, seq) inputs went through it, padding included: where transformers' default
            positions go on.
        room: for how many tokens a sequence there is memory. It grows on demand, to twice what it was.
    """

    def __init__(self, batch: int, room: int = GROWS_BY):
        self.lengths = [0] * batch
        self.columns = 0
        self.room = room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
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
            for layer, pair in self._layers.items():
                self._layers[layer] = tuple(_longer(x, self.room) for x in pair)
        row_T = [row for row, length in kept for _ in range(length)]
        at_T = [self.lengths[row] + i for row, length in kept for i in range(length)]
        self._slots = tuple(torch.tensor(x, device=device) for x in (row_T, at_T))

    def update(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the tokens of the forward that has begun; returns the layer's (keys, values), each (batch, G, room, K)."""
        if layer not in self._layers:
            shape = (len(self.lengths), k_TGK.shape[1], self.room, k_TGK.shape[2])
            self._layers[layer] = (k_TGK.new_zeros(shape), v_TGK.new_zeros(shape))
        keys, values = self._layers[layer]
        row_T, at_T = self._slots
        keys[row_T, :, at_T] = k_TGK[: len(row_T)].detach()
        values[row_T, :, at_T] = v_TGK[: len(row_T)].detach()
        return keys, values

    def end(self, columns: int) -> None:
        """Counts the tokens that every layer has appended, out of ``columns`` of input."""
        for row, filled in zip(self._rows, self.filled):
            if row >= 0:
                self.lengths[row] = filled
        self.columns += columns


def _longer(x: Tensor, room: int) -> Tensor:
    out = x.new_zeros((*x.shape[:2], room, x.shape[3]))
    out[:, :, : x.shape[2]] = x
    return out
