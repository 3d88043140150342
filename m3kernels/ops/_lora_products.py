"""A frozen weight's product with the low-rank one inside its sum, by the kernel for Hopper or by cuBLAS (beta = 1)."""

from functools import cache

import torch
from torch import Tensor

from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops._lora_launch import Layout


@cache
def _hopper(device: torch.device):
    """The module of the Gluon kernel, or None where the GPU or its Triton is another one."""
    from m3kernels.ops._attention_backends import _hopper_missing

    if _hopper_missing(device):
        return None
    from m3kernels.ops import _linear_hopper

    return _linear_hopper


def project(
    x: Tensor, weights: list[Tensor], t: Tensor, low: Tensor, layout: Layout, scales: list[Tensor] | None, shape: tuple
) -> list[Tensor]:
    """scale * (x W^T + t_j low_j^T) of each projection, (\\*shape, N); all of t and low."""
    kernel = _hopper(x.device) if x.is_cuda else None
    found, row = [], 0
    for j, w in enumerate(weights):
        n, scale = w.shape[0], scales[j] if scales else None
        size, starts = (*shape, n), (j * layout.padded, row * layout.padded)
        y = kernel and kernel.linear_low_rank(x, w, t, low, layout.width, starts, False, scale, size)
        if y is None:
            y = x.new_empty(size)
            flat = y.view(-1, n)
            torch.mm(layout.part(t, j), low[row : row + n, : layout.width].T, out=flat)
            flat.addmm_(x, w.T)
            if scale is not None:
                flat.mul_(scale)
        found.append(y)
        row += n
    return found


def input_gradient(
    dys: list[Tensor], weights: list[Tensor], du: Tensor, a: Tensor, layout: Layout, dropout: float,
    seeds: Tensor | None, shape: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """sum_j dy_j W_j + drop_j'(du_j A_j) in ``shape``."""
    dx = None
    if not dropout and du.is_cuda and (kernel := _hopper(du.device)) is not None:
        dx = kernel.linear_low_rank(dys[0], weights[0], du, a, a.shape[0], (0, 0), True, None, shape)
    added = 0 if dx is None else 1
    dx = du.new_empty(shape) if dx is None else dx
    if added == len(dys):
        return dx
    flat = dx.view(-1, a.shape[1])
    if dropout:
        for j in range(layout.count):
            rows = a[j * layout.padded :][: layout.width]
            skinny.expand(layout.part(du, j), rows, flat, j > 0, dropout, seeds[j:])
    elif not added:
        torch.mm(du, a, out=flat)
    for dy, w in zip(dys[added:], weights[added:]):
        flat.addmm_(dy, w)
    return dx
