"""The low-rank part of a head with an adapter, a chunk of rows at a time: ``logits += s (h A^T) B^T``, and its gradients.

    u = h A^T        du = s dlogits B        dh += du A        dA = du^T h        dB = s dlogits^T u

Neither ``W + s B A`` nor more logits than a chunk's exist. The low-rank product is written first and the head's added to it
(beta = 1): the sum of both is rounded once. fp32 adapters beside 16-bit hidden states stand as parts, as in lora_linear.py.
"""

import torch
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._lora_launch import Layout


class LowRank:
    """One adapter of one call: what is made of it once, and the gradients that chunks add up."""

    def __init__(self, hidden: Tensor, A: Tensor, B: Tensor, scaling: float, wants_gradients: bool):
        self.hidden, self.scaling, self.layout = hidden, scaling, Layout.of(hidden, A, 1)
        self.u, self.low = skinny.make_t(hidden, [A], [B], [scaling], self.layout)
        self.a = self._parts_of(A, hidden.dtype)
        self.du = self.layout.buffer(hidden, *self.u.shape)
        self.db = torch.zeros(B.shape if wants_gradients else (0,), dtype=torch.float32, device=B.device)

    def write_logits(self, rows: slice, logits: Tensor) -> None:
        width = self.layout.width
        torch.mm(self.u[rows, :width], self.low[:, :width].t(), out=logits)

    def read_dlogits(self, rows: slice, dlogits: Tensor) -> None:
        """du of the rows, and their share of dB."""
        rank, width = self.layout.rank, self.layout.width
        du = self.du[rows, :width]
        if self.layout.split:
            # [hi | lo]
            total = skinny.joined_parts(skinny.product32(dlogits, self.low[:, rank:width]), self.layout)
            skinny.store_parts(du, total, self.layout)
        else:
            torch.mm(dlogits, self.low[:, :rank], out=du)
        if self.db.numel():
            found = skinny.product32(dlogits.t(), self.u[rows, : min(width, 2 * rank)])
            self.db.add_(skinny.joined_parts(found, self.layout), alpha=self.scaling)

    def write_dhidden(self, rows: slice, dhidden: Tensor) -> None:
        width = self.layout.width
        torch.mm(self.du[rows, :width], self.a[:width], out=dhidden)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(dA, dB) in fp32; empty where they are not wanted."""
        if not self.db.numel():
            return self.db, self.db.clone()
        rank = self.layout.rank
        found = skinny.product32(self.du[:, : min(self.layout.width, 2 * rank)].t(), self.hidden)
        return found[:rank] + found[rank:] if self.layout.split else found, self.db

    def _parts_of(self, A: Tensor, dtype: torch.dtype) -> Tensor:
        """A as rows [hi ; hi ; lo]."""
        hi = A.to(dtype)
        return torch.cat([hi, hi, (A - hi.float()).to(dtype)]) if self.layout.split else hi


def joined(adapters: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor, float]:
    """Several adapters are one of the sum of their ranks."""
    if len(adapters) == 1:
        return adapters[0]
    return torch.cat([a for a, _, _ in adapters]), torch.cat([b * s for _, b, s in adapters], dim=1), 1.0


def check_adapters(op: str, hidden: Tensor, weight: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> None:
    """Raises for adapters that do not fit; autocast has been at work already."""
    rank, dtypes = 0, set()
    for a, b, _ in adapters:
        fits = a.dim() == b.dim() == 2 and a.shape[1] == weight.shape[1] and b.shape == (weight.shape[0], a.shape[0])
        if not fits:
            raise ValueError(
                f"{op}: an adapter of a weight {tuple(weight.shape)} is A (R, {weight.shape[1]}), B ({weight.shape[0]}, R), "
                f"scaling; got A {tuple(a.shape)}, B {tuple(b.shape)}"
            )
        rank, dtypes = rank + a.shape[0], dtypes | {a.dtype, b.dtype}
    if not 1 <= rank <= skinny.MAX_RANK:
        raise ValueError(f"{op}: the adapters' ranks must add up to 1 to {skinny.MAX_RANK}, got {rank}")
    if len(dtypes) > 1 or not dtypes <= {hidden.dtype, torch.float32}:
        raise ValueError(
            f"{op}: adapters must have one dtype, hidden's ({hidden.dtype}) or fp32, got {', '.join(map(str, dtypes))}"
        )
