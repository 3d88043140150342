"""Frozen weights' products with the low-rank ones inside them, by the kernel for Hopper or by cuBLAS (beta = 1)."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.ops import _dora_scale as dora
from m3kernels.ops import _lora_launch as skinny
from m3kernels.ops import _lora_sums as sums
from m3kernels.ops._common import cdiv, overlap_meta
from m3kernels.ops._lora_launch import Layout


@cache
def _hopper(device: torch.device):
    """The module that launches the Gluon kernel, or None where the GPU or its Triton is another one."""
    if device.type != "cuda":
        return None
    from m3kernels.ops._attention_backends import _hopper_missing

    if _hopper_missing(device):
        return None
    from m3kernels.ops import _linear_launch

    return _linear_launch


def _overlaps(x: Tensor, layout: Layout, dropout: float = 0.0) -> bool:
    """Whether the kernel before the product is the one that wrote its low-rank factors."""
    return overlap_meta(x.device)["OVERLAP"] and not skinny.by_cublas(layout, dropout, x.device, x.dtype)


class Begun(NamedTuple):
    """t and low as :func:`make_t`; DoRA's norms and scales, or None; where t is in the making, what the product counts by, its
    cut, and what the pass over x still reads when the product begins to write.
    """

    t: Tensor
    low: Tensor
    norms: Tensor | None
    scales: Tensor | None
    work: Tensor | None = None
    cut: tuple | None = None
    read: Tensor | None = None


def t_and_low(
    x: Tensor, weights: list[Tensor], many_a: list[Tensor], many_b: list[Tensor], scalings: list[float], magnitudes: list[Tensor],
    layout: Layout, dropout: float, seeds: Tensor | None,
) -> Begun:  # fmt: skip
    """What goes into the product; DoRA's norms and scales where ``magnitudes`` are given."""
    ns, norms = [w.shape[0] for w in weights], (None, None)
    if not dropout and (kernel := _hopper(x.device)) is not None and not x.data_ptr() & 15:
        from m3kernels.ops import _lora_x_hopper

        found = _lora_x_hopper.prepared(layout, *x.shape, x.stride(0), tuple(ns), x.dtype, x.device)
        scale = magnitudes[0] if magnitudes else None
        if found and kernel.takes([x], weights, layout, False, scale, ns, True, found[1]) is not None:
            run, cut = found
            # each begins at 16 bytes
            sizes = [cdiv(n, 4) * 4 for n in (cut.work(x.shape[0]), dora.arrivals(ns) if magnitudes else 0)]
            counters = x.new_empty(sum(sizes), dtype=torch.int32)
            work, arrived = counters.split(sizes)
            a, low = skinny.make_parts(x, many_a, many_b, scalings, layout, counters)
            if magnitudes:
                norms = dora.scales_of(weights, many_a, many_b, scalings, magnitudes, layout, arrived)
            return Begun(_lora_x_hopper.t_of(run, x, a, work, layout), low, *norms, work, cut, a)
    if magnitudes:
        norms = dora.scales_of(weights, many_a, many_b, scalings, magnitudes, layout)
    return Begun(*skinny.make_t(x, many_a, many_b, scalings, layout, dropout, seeds), *norms)


def project(
    x: Tensor,
    weights: list[Tensor],
    begun: Begun,
    layout: Layout,
    scale: Tensor | None,
    shape: tuple,
    dropout: float,
) -> list[Tensor]:
    """scale * (x W_j^T + t_j low_j^T) of each projection, (\\*shape, N); right after :func:`t_and_low`."""
    t, low = begun.t, begun.low
    sizes = [(*shape, w.shape[0]) for w in weights]
    if (kernel := _hopper(x.device)) is not None:
        overlaps = begun.cut is not None or _overlaps(x, layout, dropout)
        found = kernel.linear_low_rank(
            [x], weights, t, low, layout, False, scale, sizes, overlaps, begun.work, begun.cut
        )
        if found is not None:
            return found
    found, row = [], 0
    for j, (w, size) in enumerate(zip(weights, sizes)):
        n, y = w.shape[0], x.new_empty(size)
        flat = y.view(-1, n)
        torch.mm(layout.of_t(t, j), low[row : row + n, : layout.width].T, out=flat)
        flat.addmm_(x, w.T)
        if scale is not None:
            flat.mul_(scale[row : row + n])
        found.append(y)
        row += n
    return found


def lets_begin(dys: list[Tensor], weights: list[Tensor], layout: Layout, dropout: float, plan) -> bool:
    """Whether :func:`input_gradient` lets what follows it begin before it has ended."""
    if (kernel := _hopper(dys[0].device)) is None or dropout or not (plan or _overlaps(dys[0], layout)):
        return False
    return kernel.takes(dys, weights, layout, True, None, [weights[0].shape[1]], True, plan and plan.cut) is not None


def one_pass(
    dys: list[Tensor], x: Tensor, layout: Layout, many_b: list[Tensor], scalings: list[float], scaled: bool, dropout: float
):  # fmt: skip
    """The plan of a pass over dy for both du and dB, and perhaps over x for dA, or None where it takes two."""
    if _hopper(dys[0].device) is None:
        return None
    from m3kernels.ops import _lora_dy_launch

    bits = x.data_ptr()
    for tensor in (*dys, *many_b):
        bits |= tensor.data_ptr()
    if bits & 15 or not all(b.is_contiguous() for b in many_b):
        return None
    ns = tuple([dy.shape[1] for dy in dys])
    return _lora_dy_launch.prepared(
        layout,
        x.shape[0],
        ns,
        x.shape[1],
        x.stride(0),
        tuple(scalings),
        scaled,
        not dropout,
        x.dtype,
        many_b[0].dtype,
        x.device,
    )


def of_adapters(plan, *given) -> tuple[Tensor, Tensor]:
    """:func:`m3kernels.ops._lora_dy_launch.of_adapters`, which only Hopper's Triton can import."""
    from m3kernels.ops import _lora_dy_launch

    return _lora_dy_launch.of_adapters(plan, *given)


def input_gradient(
    dys: list[Tensor], weights: list[Tensor], du: Tensor, a: Tensor, layout: Layout, dropout: float, seeds: Tensor | None,
    shape: tuple[int, ...], plan, work: Tensor | None,
) -> Tensor:  # fmt: skip
    """sum_j dy_j W_j + drop_j'(du_j A_j) in ``shape``; right after du, or while ``plan``'s pass still makes it."""
    if not dropout and (kernel := _hopper(du.device)) is not None:
        overlaps = bool(plan) or _overlaps(du, layout)
        found = kernel.linear_low_rank(
            dys, weights, du, a, layout, True, None, [shape], overlaps, work, plan and plan.cut
        )
        if found is not None:
            return found[0]
    dx = du.new_empty(shape)
    flat = dx.view(-1, a.shape[1])
    if dropout:
        for j in range(layout.count):
            rows = a[j * layout.padded :][: layout.width]
            sums.expand(layout.of_du(du, j), rows, flat, j > 0, dropout, seeds[j:])
    else:
        torch.mm(du, a, out=flat)
    for dy, w in zip(dys, weights):
        flat.addmm_(dy, w)
    return dx
