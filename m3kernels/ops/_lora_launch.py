"""Launchers of the low-rank products, and the choice between our kernels and cuBLAS for each.

The host issues hundreds of them a step: what follows from shapes alone is worked out once (:mod:`m3kernels.ops._prepared`).
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, launch, next_power_of_2, sm_count
from m3kernels.ops._lora_kernels import (
    dora_grad_kernel,
    lora_expand_kernel,
    lora_grads_kernel,
    lora_parts_kernel,
    lora_shrink_kernel,
    lora_sum_kernel,
)
from m3kernels.ops._prepared import KEPT, Prepared

MOST = 3  # projections of one input
MAX_RANK = 512


@dataclass(frozen=True)
class SkinnyConfig:
    """Rows and columns of the large operand's tile, warps, load stages."""

    rows: int
    cols: int
    warps: int
    stages: int


# by columns of t in one program
SHRINK = {64: SkinnyConfig(64, 128, 4, 4), 128: SkinnyConfig(64, 64, 8, 3), 512: SkinnyConfig(16, 32, 8, 2)}
# (columns, split): of 7 each, H100 (8192 x 18,432: 178, 206 and 210 us; two cuBLAS products take 240)
GRADS = {
    (16, False): SkinnyConfig(64, 512, 8, 3),
    (16, True): SkinnyConfig(64, 128, 4, 3),
    (32, False): SkinnyConfig(64, 256, 8, 3),
}
# with dropout, and for fp32, where products are no business of tensor cores
WIDE = SkinnyConfig(32, 64, 4, 1)
# where a program has less shared memory than an H100's 227 KB
SMALL = SkinnyConfig(32, 64, 4, 2)
SHARED_MEMORY = 232_448
MOST_AT_ONCE = 64


class Layout(NamedTuple):
    """How parts lie: ``width`` columns for one projection (3 x rank where ``split``), ``padded`` to 16 bytes."""

    rank: int
    split: bool
    count: int
    width: int
    padded: int

    @classmethod
    def of(cls, x: Tensor, a: Tensor, count: int) -> "Layout":
        return _layout(a.shape[0], a.dtype == torch.float32 and x.dtype != torch.float32, count)

    def buffer(self, like: Tensor, *size: int) -> Tensor:
        # what lies between the parts is multiplied with other padding: it must be finite
        return like.new_empty(size) if self.padded == self.width else like.new_zeros(size)

    def part(self, t: Tensor, j: int) -> Tensor:
        """Columns of projection ``j``."""
        return t[:, j * self.padded : j * self.padded + self.width]


def _layout(rank: int, split: bool, count: int) -> Layout:
    width = rank * (3 if split else 1)
    return Layout(rank, split, count, width, cdiv(width, 8) * 8)


def config_for(table: dict[int, SkinnyConfig], columns: int) -> SkinnyConfig:
    return next(config for most, config in table.items() if columns <= most)


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def columns_of(rank: int) -> int:
    """The columns that a kernel computes for ``rank``: tensor cores take 16 at least."""
    return max(16, next_power_of_2(rank))


def three(tensors: list[Tensor]) -> list[Tensor]:
    """As many as a kernel takes; the last one again where there are fewer."""
    return [*tensors, *(tensors[-1:] * (MOST - len(tensors)))]


def fill(numbers: tuple, nothing: float) -> tuple:
    """As many as a kernel takes; ``nothing`` where there is no projection."""
    return *numbers, *[nothing] * (MOST - len(numbers))


@cache
def _has_room(device: torch.device) -> bool:
    """Whether a program may have as much shared memory as the tiles above were chosen for."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED_MEMORY


def product32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@lru_cache(KEPT)
def _parts(
    layout: Layout, ns: tuple[int, ...], width: int, scalings: tuple[float, ...], scaled: bool, *where
) -> Prepared:
    count, a_blocks = len(ns), cdiv(layout.rank * width, 1024)
    return Prepared(
        "lora_linear (parts)",
        lora_parts_kernel,
        where[0],
        (a_blocks * count + cdiv(sum(ns) * layout.rank, 1024),),
        (*fill(scalings, 0.0), *fill(ns, 0), width, layout.rank, layout.padded, a_blocks, count),
        {"BLOCK": 1024, "SPLIT": layout.split, "SCALED": scaled},
    )


def as_parts(
    x: Tensor,
    many_a: list[Tensor],
    many_b: list[Tensor],
    scalings: list[float],
    layout: Layout,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(A of all (count * padded, K), s B of all (N of all, padded), each row times ``scale`` where given) as parts."""
    ns, width = tuple([b.shape[0] for b in many_b]), many_a[0].shape[1]
    a = layout.buffer(x, layout.count * layout.padded, width)
    low = layout.buffer(x, sum(ns), layout.padded)
    sources = [*three([t.contiguous() for t in many_a]), *three([t.contiguous() for t in many_b])]
    run = _parts(layout, ns, width, tuple(scalings), scale is not None, x.device, x.dtype, many_a[0].dtype)
    run(*sources, low if scale is None else scale, a, low)
    return a, low


@lru_cache(KEPT)
def _shrink(layout: Layout, rows: int, width: int, stride: int, dropout: float, device, dtype) -> Prepared | None:
    """None: cuBLAS's."""
    rank, count, split = layout.rank, layout.count, layout.split
    groups = count if dropout else 1
    columns, full = rank * (count // groups), dtype == torch.float32
    if device.type == "cuda" and not dropout and (full or (columns > 64 and not split)):
        return None
    if columns > MAX_RANK:  # three of large rank
        groups, columns = count, rank
    config = config_for(SHRINK, columns_of(columns))
    if columns_of(columns) <= 128 and not _has_room(device):
        config = SMALL
    columns_all = count * layout.padded
    return Prepared(
        "lora_linear (shrink)",
        lora_shrink_kernel,
        device,
        (groups, cdiv(rows, config.rows)),
        (stride, width, columns_all, rows, width, columns, rank, layout.padded, dropout),
        {"BLOCK_M": config.rows, "BLOCK_K": config.cols, "RANK": columns_of(columns), "SPLIT": split}
        | {"DROPS": dropout > 0, "PRECISION": precision(dtype), "num_warps": config.warps, "num_stages": config.stages},
    )


def shrink(x: Tensor, a: Tensor, layout: Layout, dropout: float, seeds: Tensor | None) -> Tensor:
    """t = drop(x) A^T of all projections (M, count * padded)."""
    rows, width = x.shape
    t = layout.buffer(x, rows, layout.count * layout.padded)
    run = _shrink(layout, rows, width, x.stride(0), dropout, x.device, x.dtype)
    if run is not None:
        run(x, a, t, t if seeds is None else seeds)
    elif layout.padded == layout.rank:
        torch.mm(x, a.T, out=t)
    else:
        for j in range(layout.count):
            layout.part(t, j).copy_(x @ a[j * layout.padded :][: layout.rank].T)
    return t


class Pass(NamedTuple):
    """The two launches of one pass over y, and the fp32 numbers that they hand over: db's by shares of rows, du's by blocks."""

    grads: Prepared
    sums: Prepared
    db_size: int
    du_size: int


@lru_cache(KEPT)
def _pass(
    layout: Layout, ns: tuple[int, ...], rows: int, here: int, with_du: bool, strides: tuple[int, ...],
    scalings: tuple[float, ...], scaled: bool, dropout: float, device, dtype, *_,
) -> Pass:  # fmt: skip
    """``here`` of the rank's columns; ``strides``: of low, t, du, and both of db."""
    split, columns, total = layout.split, columns_of(here), sum(ns)
    fast = not dropout and precision(dtype) == "tf32"
    config = GRADS.get((columns, split), WIDE) if fast else WIDE
    if config is not WIDE and not _has_room(device):
        config = SMALL
    blocks = sum(cdiv(n, config.cols) for n in ns)
    per_sm = 2 if config.cols < 512 else 1
    shares = min(cdiv(rows, config.rows), max(1, cdiv(per_sm * sm_count(device), blocks)))
    each = cdiv(cdiv(rows, shares), config.rows) * config.rows
    shares = cdiv(rows, each)
    low_stride, t_stride, du_stride, *db_strides = strides
    ns = fill(ns, 0)
    grads = Prepared(
        "lora_linear backward",
        lora_grads_kernel,
        device,
        (blocks, shares),
        (*ns, rows, low_stride, t_stride, layout.padded, here, layout.rank, each, dropout),
        {"BLOCK_M": config.rows, "BLOCK_N": config.cols, "RANK": columns, "WITH_DU": with_du}
        | {"SPLIT": split, "DROPS": dropout > 0, "PRECISION": precision(dtype)}
        | {"num_warps": config.warps, "num_stages": config.stages},
    )
    du_programs = cdiv(rows, 32) if with_du else 0
    sums = Prepared(
        "lora_linear backward (sum)",
        lora_sum_kernel,
        device,
        (du_programs * layout.count + cdiv(total, 32),),
        (*fill(scalings, 0.0), *ns, rows, du_stride, *db_strides, layout.padded, here, layout.rank)
        + (shares, du_programs, layout.count),
        {"BLOCK": 32, "BLOCK_N": config.cols, "RANK": columns, "SPLIT": split, "SCALED": scaled, "num_warps": 2},
    )
    return Pass(grads, sums, shares * total * columns, blocks * rows * columns)


def _one_pass(
    ys: list[Tensor], low: Tensor, t: Tensor, layout: Layout, du: Tensor | None, db: Tensor, scalings: list[float],
    scale: Tensor | None = None, dropout: float = 0.0, seeds: Tensor | None = None,
) -> None:  # fmt: skip
    """du = y low where it is given and db (N of all, R) = scaling * scale * drop(y)^T t.

    Reads y once for each 64 of the rank.
    """
    ns, rows = tuple([y.shape[1] for y in ys]), ys[0].shape[0]
    strides = (low.stride(0), t.stride(0), 0 if du is None else du.stride(0), *db.stride())
    settled = (strides, tuple(scalings), scale is not None, dropout, t.device, ys[0].dtype, db.dtype)
    for first in range(0, layout.rank, MOST_AT_ONCE):
        here = min(MOST_AT_ONCE, layout.rank - first)
        launches = _pass(layout, ns, rows, here, du is not None, *settled)
        part_db = t.new_empty(launches.db_size, dtype=torch.float32)
        part_du = part_db if du is None else t.new_empty(launches.du_size, dtype=torch.float32)
        if first:
            low, t, db = low[:, MOST_AT_ONCE:], t[:, MOST_AT_ONCE:], db[:, MOST_AT_ONCE:]
            du = None if du is None else du[:, MOST_AT_ONCE:]
        launches.grads(*three(ys), low, t, part_du, part_db, t if seeds is None else seeds)
        scales = part_db if scale is None else scale
        launches.sums(part_du, part_db, part_db if du is None else du, db, scales)


def du_and_db(
    dys: list[Tensor], low: Tensor, t: Tensor, layout: Layout, db: Tensor, scalings: list[float], scale: Tensor | None
) -> Tensor:
    """du = dy low of all projections (M, count * padded); writes db = scaling * scale * dy^T t (N of all, R).

    ``low`` holds the scaling (and DoRA's ``scale`` (N of all,)) already.
    """
    rank, split = layout.rank, layout.split
    du = layout.buffer(t, *t.shape)
    if not t.is_cuda or ((columns_of(rank), split) in GRADS and t.dtype != torch.float32):
        _one_pass(dys, low, t, layout, du, db, scalings, scale)
        return du
    start = 0
    for j, (dy, scaling) in enumerate(zip(dys, scalings)):
        end, part, t_j = start + dy.shape[1], layout.part(du, j), layout.part(t, j)
        if split:
            both = product32(dy, low[start:end, rank : 3 * rank])  # [hi | lo]
            total = both[:, :rank] + both[:, rank:]
            hi = total.to(du.dtype)
            part[:, :rank] = part[:, 2 * rank :] = hi
            part[:, rank : 2 * rank] = total - hi.float()
            both = product32(dy.T, t_j[:, : 2 * rank])
            found = both[:, :rank] + both[:, rank:]
        else:
            torch.mm(dy, low[start:end, :rank], out=part)
            found = product32(dy.T, t_j)
        db[start:end] = found.mul_(scaling) if scale is None else found.mul_(scaling * scale[start:end, None])
        start = end
    return du


def das_of(x: Tensor, du: Tensor, layout: Layout, like: Tensor, dropout: float, seeds: Tensor | None) -> Tensor:
    """dA = du^T drop(x) of all projections (count, R, K)."""
    rank, count, width = layout.rank, layout.count, x.shape[1]
    size, strides = (count, rank, width), (layout.padded * width, width, 1)
    if dropout:
        das, x, one = like.new_empty(size), x.contiguous(), _layout(rank, layout.split, 1)
        for j, da in enumerate(das):
            part = layout.part(du, j)
            _one_pass([x], x, part, one, None, da.T, [1 / (1 - dropout)], None, dropout, seeds[j:])
        return das
    # one product for all: x is read once
    if layout.split:
        found = product32(du.T, x)
        return found.as_strided(size, strides) + found.as_strided(size, strides, rank * width)
    found = torch.mm(du.T, x)
    return found.view(size) if layout.padded == rank else found.as_strided(size, strides).contiguous()


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


@lru_cache(KEPT)
def _dora_grads(rows: int, cols: int, strides: tuple[int, int], device, dtype) -> Prepared:
    blocks = cdiv(cols, 256)
    each = cdiv(cdiv(rows, max(1, 4 * sm_count(device) // blocks)), 16) * 16
    grid, numbers = (blocks, cdiv(rows, each)), (*strides, rows, cols, each)
    return Prepared("dora_linear backward", dora_grad_kernel, device, grid, numbers, {"BLOCK_M": 16, "BLOCK_N": 256})


def dora_grads(dy: Tensor, out: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dz = scale * dy, the sum over rows of dy * out in fp32)."""
    rows, cols = dy.shape
    run = _dora_grads(rows, cols, (dy.stride(0), out.stride(0)), dy.device, dy.dtype)
    dz, parts = dy.new_empty((rows, cols)), dy.new_empty((run.grid[1], cols), dtype=torch.float32)
    run(dy, out, scale, dz, parts)
    return dz, parts.sum(0)
