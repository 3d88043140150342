"""The launch of :mod:`m3kernels.ops._linear_hopper`: which products it takes, and how the copy engine sees their tensors."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from m3kernels.ops._beside import BLOCK_M, Cut
from m3kernels.ops._common import cdiv, sm_count
from m3kernels.ops._linear_hopper import (
    A_TILE,
    B_TILE,
    B_TILE_ACROSS,
    BLOCK_K,
    BLOCK_N,
    PANEL,
    ROWS,
    linear_low_rank_kernel,
)
from m3kernels.ops._lora_launch import MOST, Layout, fill, three
from m3kernels.ops._prepared import KEPT, Prepared

SHARE = BLOCK_M.value * BLOCK_N.value  # numbers of a tile's sum


class Matrix(NamedTuple):
    """What the copy engine moves of a tensor: from element ``start`` on, rows that begin ``stride`` elements apart."""

    rows: int
    cols: int
    stride: int
    block: tuple[int, int]
    layout: gl.NVMMASharedLayout
    start: int = 0

    def of(self, t: Tensor) -> TensorDescriptor:
        # what its constructor checks, `_prepared` has
        blocks = object.__new__(TensorDescriptor)
        blocks.base = t.as_strided((self.rows, self.cols), (self.stride, 1), t.storage_offset() + self.start)
        blocks.shape, blocks.strides, blocks.block_shape = [self.rows, self.cols], [self.stride, 1], list(self.block)
        blocks.layout, blocks.padding = self.layout, "zero"
        return blocks


@lru_cache(KEPT)
def _prepared(
    m: int, ks: tuple[int, ...], ns: tuple[int, ...], layout: Layout, strides: tuple[int, ...], weight_strides: tuple[int, ...],
    across: bool, scaled: bool, overlaps: bool, cut: Cut | None, dtype: torch.dtype, device: torch.device,
) -> Prepared | None:  # fmt: skip
    """The launch, or None where this kernel does not take the product.

    ``ks``: columns of the left operands; ``ns``: of the outputs.
    """
    count = len(weight_strides)
    if any(stride % 8 or not stride for stride in strides + weight_strides):
        return None  # the copy engine reads rows that begin at 16-byte marks
    first = [0]
    for n in ns:
        first.append(first[-1] + cdiv(n, BLOCK_N.value))
    m_tiles, n_tiles = cdiv(m, BLOCK_M.value), first[-1]
    fits = dtype in (torch.bfloat16, torch.float16) and not any(n % 8 for n in ns)
    if not fits or m_tiles * n_tiles < sm_count(device):
        return None
    left, panel = ((ROWS.value, BLOCK_K.value), A_TILE.value), ((ROWS.value, PANEL.value), B_TILE_ACROSS.value)
    padded, width = layout.padded, layout.width
    if across:
        right = (BLOCK_K.value, BLOCK_N.value), B_TILE_ACROSS.value
        low_tiles = cdiv(count * padded, BLOCK_K.value)
        weights = [Matrix(k, ns[0], stride, *right) for k, stride in zip(ks, weight_strides)]
        t = Matrix(m, count * padded, count * padded, *left)
        low = Matrix(count * padded, ns[0], ns[0], *right)
        beyond = (n_tiles, n_tiles)
    else:
        right = (BLOCK_N.value, BLOCK_K.value), B_TILE.value
        low_tiles = cdiv(width, BLOCK_K.value)
        weights = [Matrix(n, ks[0], stride, *right) for n, stride in zip(ns, weight_strides)]
        t = Matrix(count * m, width, padded, *left)
        low = Matrix(sum(ns), width, padded, *right)
        beyond = (*first[1:count], *[n_tiles] * (MOST - count))
    lefts = [Matrix(m, k, stride, *left) for k, stride in zip(ks, strides)]
    outs = [Matrix(m, n, n, *panel) for n in ns]
    units = (cut.whole, cut.pieces, cut.units()) if cut else (m_tiles * n_tiles, 1, m_tiles * n_tiles)
    # where the second and the third output begin
    starts, k_tiles = (sum(ns[:1]), sum(ns[:2])), tuple(cdiv(k, BLOCK_K.value) for k in ks)
    return Prepared(
        "lora_linear",
        linear_low_rank_kernel,
        device,
        (min(m_tiles * n_tiles, sm_count(device)),),
        (
            *fill(ns, 0),
            *fill(k_tiles, 0),
            m_tiles,
            n_tiles,
            *units,
            m,
            low_tiles,
            *beyond,
            *starts,
            cut.makers if cut else 0,
        ),
        {
            "ACROSS": across,
            "COUNT": count,
            "SCALED": scaled,
            "OVERLAP": overlaps,
            "BESIDE": cut is not None,
            "CUT": bool(cut and cut.cut),
            "num_warps": 4,
            "maxnreg": 168,
        }
        | ({"launch_pdl": True} if overlaps else {}),
        (None, None, None, *three(lefts), *three(weights), t, low, *three(outs)),
    )


def takes(
    lefts: list[Tensor],
    weights: list[Tensor],
    layout: Layout,
    across: bool,
    scale: Tensor | None,
    ns: list[int],
    overlaps: bool,
    cut: Cut | None = None,
) -> Prepared | None:
    """The launch of :func:`linear_low_rank`, or None where this kernel does not take it."""
    bits, dtype = 0, lefts[0].dtype
    for tensor in (*lefts, *weights):
        bits |= tensor.data_ptr()
        if tensor.stride(1) != 1 or tensor.dtype != dtype:
            return None
    if bits & 15:
        return None
    return _prepared(
        lefts[0].shape[0], tuple([a.shape[1] for a in lefts]), tuple(ns), layout, tuple([a.stride(0) for a in lefts]),
        tuple([w.stride(0) for w in weights]), across, scale is not None, overlaps, cut, dtype, lefts[0].device,
    )  # fmt: skip


def linear_low_rank(
    lefts: list[Tensor], weights: list[Tensor], t: Tensor, low: Tensor, layout: Layout, across: bool, scale: Tensor | None,
    sizes: list[tuple[int, ...]], overlaps: bool, work: Tensor | None = None, cut: Cut | None = None,
) -> list[Tensor] | None:  # fmt: skip
    """The products in ``sizes``, rows side by side, or None where this kernel does not take them.

    One left operand and several weights (N, K) give several results; ``across``, several of both, weights (K, N), one sum.
    ``t`` and ``low``: fresh, as :mod:`m3kernels.ops._lora_launch` lays them. ``scale``: of all results' columns. ``overlaps``:
    the kernel before this one wrote t and low and lets this one begin, as this one does the next. ``work``: that of
    :mod:`m3kernels.ops._beside`, where a kernel beside this one makes t, and ``cut`` as it is there.
    """
    run = takes(lefts, weights, layout, across, scale, [size[-1] for size in sizes], overlaps, cut)
    if run is None:
        return None
    outs = [t.new_empty(size) for size in sizes]
    shares = t.new_empty(cut.cut * cut.pieces * SHARE, dtype=torch.float32) if cut and cut.cut else low
    run(
        t if scale is None else scale,
        low if work is None else work,
        shares,
        *three(lefts),
        *three(weights),
        t,
        low,
        *three(outs),
    )
    return outs
