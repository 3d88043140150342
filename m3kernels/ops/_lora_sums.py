"""Launchers of what the adapters' gradients are summed by, and of what the product does not do: dropout's dx, DoRA's k dy."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, sm_count
from m3kernels.ops._lora_kernels import lora_expand_kernel, lora_outer_kernel
from m3kernels.ops._lora_launch import (
    MOST,
    MOST_AT_ONCE,
    MOST_OF_DA,
    Layout,
    by_cublas,
    columns_of,
    fill,
    joined_parts,
    options_of,
    outer_form,
    precision,
    product32,
    three,
)
from m3kernels.ops._lora_sum_kernels import dora_grad_kernel
from m3kernels.ops._prepared import KEPT, Prepared

# of the pass that makes k dy: programs for each multiprocessor, rows and columns of a tile
DORA_PROGRAMS, DORA_ROWS, DORA_COLS = 4, 32, 128


class Summing(NamedTuple):
    """The launch that makes the adapters' gradients, and what it hands over between its programs."""

    run: Prepared
    slabs: int
    arrivals: int


@lru_cache(KEPT)
def _outer(
    layout: Layout, rows: int, ns: tuple[int, ...], width: int, x_stride: int, scalings: tuple[float, ...],
    scaled: bool, dropout: float, overlaps: bool, makers: int, tiles: int, device, dtype, *_,
) -> Summing:  # fmt: skip
    rank, count, padded = layout.rank, layout.count, layout.padded
    config, form = outer_form(layout, scaled, dropout, dtype, MOST_AT_ONCE if ns else MOST_OF_DA)
    y_blocks = sum(cdiv(n, config.cols) for n in ns)
    blocks, groups = y_blocks + cdiv(width, config.cols), cdiv(rank, form["RANK"])
    programs = config.programs * 32 * sm_count(device) // max(32, form["RANK"] * count)
    shares = max(1, min(cdiv(rows, config.rows), programs // (blocks * groups)))
    each = cdiv(cdiv(rows, shares), config.rows) * config.rows
    shares = cdiv(rows, each)
    run = Prepared(
        "lora_linear backward",
        lora_outer_kernel,
        device,
        (blocks, shares, groups),
        (
            *fill(ns, 0),
            width,
            x_stride,
            rows,
            each,
            rank,
            padded,
            rows * padded,
            count * padded,
        )
        + (padded, rank, *fill(scalings, 0.0), dropout, y_blocks, shares, makers * tiles, tiles),
        form
        | {"WITH_Y": bool(ns), "OVERLAP": overlaps}
        | options_of(config)
        | ({"launch_pdl": True} if overlaps else {}),
    )
    return Summing(run, blocks * groups * shares * config.cols * form["RANK"] * count, blocks * groups)


def _sums_fit(layout: Layout) -> bool:
    """Whether dA of all projections stays in registers."""
    return layout.rank <= MOST_OF_DA and layout.rank * layout.count * (2 if layout.split else 1) <= 3 * MOST_OF_DA


class Sums(NamedTuple):
    """Gradients of the adapters: dA (count, R, K), dB (N of all, R); empty where not needed.

    Made before the product is launched: what runs beside it may write no memory that anything before it still reads.
    """

    da: Tensor
    db: Tensor

    @classmethod
    def like(cls, x: Tensor, n: int, layout: Layout, adapter: Tensor, needed: bool) -> "Sums":
        da = adapter.new_empty((layout.count, layout.rank, x.shape[1]) if needed else 0)
        return cls(da, adapter.new_empty((n, layout.rank) if needed else 0))


class Adding(NamedTuple):
    """The sums of one backward in the making.

    ``counters``: all that kernels count by, set to zero before them: ``arrived`` of the sums, and, where one pass over dy makes
    du, that pass's and what the product beside it counts by, and with DoRA those of :class:`DoraGrads`.
    """

    run: Prepared | None
    slabs: Tensor
    counters: Tensor | None
    arrived: Tensor | None
    of_pass: Tensor | None
    work: Tensor | None
    of_dora: Tensor | None

    @classmethod
    def of(
        cls, x: Tensor, ns: list[int], layout: Layout, scalings: list[float], scaled: bool, dropout: float,
        overlaps: bool, dtype: torch.dtype, plan,
    ) -> "Adding":  # fmt: skip
        """``overlaps``: right behind a product that lets it begin; ``dtype``: of the sums; ``plan``: of one pass over dy."""
        run, slabs, arrivals = None, 0, 0
        own = not by_cublas(layout, dropout, x.device, x.dtype) or (plan and _sums_fit(layout))
        if own and not (plan and plan.makes_da):
            run, slabs, arrivals = _outer(
                layout, x.shape[0], () if plan else tuple(ns), x.shape[1], x.stride(0), tuple(scalings), scaled, dropout,
                overlaps, *((plan.cut.makers, plan.tiles) if plan and overlaps else (0, 0)), x.device, x.dtype, dtype,
            )  # fmt: skip
        elif not plan:
            return cls(None, x, None, None, None, None, None)
        of_dora = dora_blocks(ns)[-1] if plan and scaled else 0
        # each begins at 16 bytes
        sizes = [cdiv(n, 4) * 4 for n in (arrivals, *((plan.arrivals, plan.work, of_dora) if plan else ()))]
        counters = x.new_empty(sum(sizes), dtype=torch.int32)
        return cls(run, x.new_empty(slabs, dtype=torch.float32), counters, *[*counters.split(sizes), *[None] * 3][:4])


def adapter_gradients(
    adding: Adding, sums: Sums, dys: list[Tensor], x: Tensor, t: Tensor, du: Tensor, layout: Layout, scalings: list[float],
    scales: Tensor | None, seeds: Tensor | None,
) -> None:  # fmt: skip
    """Writes ``sums``; without ``dys`` dA alone."""
    if adding.run is None:
        _sums_by_cublas(sums, dys, x, t, du, layout, scalings, scales)
        return
    unused = sums.db
    none = lambda option: unused if option is None else option
    adding.run(
        *three(dys or [x]), x, t, du, sums.db, sums.da, adding.slabs, adding.arrived, none(scales), none(seeds),
        adding.arrived if adding.work is None else adding.work,
    )  # fmt: skip


def _sums_by_cublas(sums, dys, x, t, du, layout, scalings, scales) -> None:
    rank, ns = layout.rank, [dy.shape[1] for dy in dys]
    parts = slice(0, 2 * rank if layout.split else rank)
    for j, (dy, db, s) in enumerate(zip(dys, sums.db.split(ns) if dys else [], scalings)):
        db.copy_(joined_parts(product32(dy.T, layout.of_t(t, j)[:, parts]), layout).mul_(s))
    # one product for all: x is read once
    found, width = product32(du.T, x), x.shape[1]
    size, strides = sums.da.shape, (layout.padded * width, width, 1)
    da = found.as_strided(size, strides)
    sums.da.copy_(da + found.as_strided(size, strides, rank * width) if layout.split else da)
    if scales is not None and dys:
        sums.db.mul_(scales[:, None])


def expand(du: Tensor, a: Tensor, dx: Tensor, adds: bool, dropout: float, seed: Tensor) -> None:
    """dx (+)= drop'(du a), all parts of one projection."""
    rows, width = dx.shape
    launch(
        "lora_linear backward (dx)",
        lora_expand_kernel,
        (cdiv(width, 128), cdiv(rows, 64)),
        *(du, a, dx, seed, du.stride(0), a.stride(0), dx.stride(0), rows, width, a.shape[0], dropout),
        **{"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_R": min(64, columns_of(a.shape[0])), "ADDS": adds},
        **{"PRECISION": precision(dx.dtype), "num_warps": 8},
    )


def dora_blocks(ns: list[int]) -> list[int]:
    """Blocks of columns before each gradient, and all."""
    first = [0]
    for n in ns:
        first.append(first[-1] + cdiv(n, DORA_COLS))
    return first


@lru_cache(KEPT)
def _dora_grads(
    rows: int, ns: tuple[int, ...], dy_strides: tuple[int, ...], y_strides: tuple[int, ...], by_scale: bool, overlaps: bool,
    device, *_,
) -> Prepared:  # fmt: skip
    first = dora_blocks(ns)
    each = cdiv(cdiv(rows, max(1, DORA_PROGRAMS * sm_count(device) // first[-1])), DORA_ROWS) * DORA_ROWS
    begins = (*first[1 : len(ns)], *[first[-1]] * (MOST - len(ns)))
    shares = cdiv(rows, each)
    numbers = (*fill(ns, 0), *fill(dy_strides, 0), *fill(y_strides, 0), *begins, rows, each, shares)
    meta = {"BLOCK_M": DORA_ROWS, "BLOCK_N": DORA_COLS, "BY_SCALE": by_scale, "OVERLAP": overlaps}
    meta |= {"launch_pdl": True} if overlaps else {}
    return Prepared("dora_linear backward", dora_grad_kernel, device, (first[-1], shares), numbers, meta)


class DoraGrads(NamedTuple):
    """dz_j = k_j * dy_j, and dm of all (N of all,), in the making: the sums over rows of dy * out, by the norms.

    In 16-bit floats of few exponents ``outs`` are not y but z = y / k: then by k no more.
    """

    dys: list[Tensor]
    outs: list[Tensor]
    norms: Tensor
    scales: Tensor
    dzs: list[Tensor]
    dm: Tensor

    @classmethod
    def like(
        cls, dys: list[Tensor], outs: list[Tensor], norms: Tensor, scales: Tensor, dtype: torch.dtype
    ) -> "DoraGrads":
        """``dtype``: of the magnitudes."""
        return cls(dys, outs, norms, scales, [torch.empty_like(dy) for dy in dys], torch.empty_like(norms, dtype=dtype))

    def make(self, arrived: Tensor | None) -> None:
        """``arrived``: counters that the kernel right before this one clears, which lets this one begin, as this one the next."""
        strides = [tuple([t.stride(0) for t in group]) for group in (self.dys, self.outs)]
        like, norms = self.dys[0], self.norms
        ns = tuple([dy.shape[1] for dy in self.dys])
        run = _dora_grads(
            like.shape[0], ns, *strides, like.dtype != torch.float16, arrived is not None, norms.device, like.dtype,
            self.dm.dtype,
        )  # fmt: skip
        if arrived is None:
            arrived = norms.new_zeros(run.grid[0], dtype=torch.int32)
        parts = norms.new_empty((run.grid[1], sum(ns)))
        run(*three(self.dys), *three(self.outs), norms, self.scales, *three(self.dzs), parts, self.dm, arrived)
