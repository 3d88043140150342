"""Launchers of the low-rank products t and du, and the choice between our kernels and cuBLAS.

The host issues hundreds of them a step: what follows from shapes alone is worked out once (:mod:`m3kernels.ops._prepared`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from m3kernels.ops._common import cdiv, next_power_of_2, overlap_meta
from m3kernels.ops._lora_kernels import PARTS_BLOCK, lora_shrink_kernel
from m3kernels.ops._lora_sum_kernels import lora_parts_kernel
from m3kernels.ops._prepared import KEPT, Prepared

MOST = 3  # projections of one input
MAX_RANK = 512


@dataclass(frozen=True)
class SkinnyConfig:
    """Rows and columns of the large operand's tile, warps, load stages.

    ``programs``: for each multiprocessor, where a result of 32 columns is summed over shares of the rows.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    programs: int = 4


# by columns of small matrices that one tile of x meets
SHRINK = {16: SkinnyConfig(32, 128, 4, 4), 96: SkinnyConfig(32, 64, 4, 3)}
OUTER = {
    16: SkinnyConfig(128, 64, 4, 3, 2),
    48: SkinnyConfig(64, 64, 4, 3),
    64: SkinnyConfig(128, 64, 4, 3, 2),
    128: SkinnyConfig(64, 64, 4, 3),
    192: SkinnyConfig(64, 64, 4, 3, 6),
}
# with dropout, and for fp32, where products are no business of tensor cores
WIDE = SkinnyConfig(32, 64, 4, 1)
# columns of A^T or B in one program; cuBLAS takes larger ranks
MOST_AT_ONCE = 32
# the same where dA alone is made
MOST_OF_DA = 64


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

    def of_t(self, t: Tensor, j: int) -> Tensor:
        """t of projection ``j`` (M, width)."""
        rows = t.shape[0] // self.count
        return t[j * rows : (j + 1) * rows, : self.width]

    def of_du(self, du: Tensor, j: int) -> Tensor:
        """du of projection ``j`` (M, width)."""
        return du[:, j * self.padded : j * self.padded + self.width]


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


def three(given: list) -> list:
    """As many tensors, or descriptions of them, as a kernel takes; the last one again where there are fewer."""
    return [*given, *(given[-1:] * (MOST - len(given)))]


def fill(numbers: tuple, nothing: float) -> tuple:
    """As many as a kernel takes; ``nothing`` where there is no projection."""
    return *numbers, *[nothing] * (MOST - len(numbers))


def product32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def joined_parts(found: Tensor, layout: Layout) -> Tensor:
    """A product with [hi | lo], both added up; as it is where there are no parts."""
    return found[:, : layout.rank] + found[:, layout.rank :] if layout.split else found


def store_parts(out: Tensor, total: Tensor, layout: Layout) -> None:
    """``total`` (M, R) in fp32 as [hi | lo | hi]."""
    rank, hi = layout.rank, total.to(out.dtype)
    out[:, :rank] = out[:, 2 * rank :] = hi
    out[:, rank : 2 * rank] = total - hi.float()


def by_cublas(layout: Layout, dropout: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the skinny products are cuBLAS's."""
    return device.type == "cuda" and not dropout and (dtype == torch.float32 or layout.rank > MOST_AT_ONCE)


def options_of(config: SkinnyConfig) -> dict:
    return {"num_warps": config.warps, "num_stages": config.stages}


def shrink_form(
    layout: Layout, forward: bool, scaled: bool, dropout: float, dtype: torch.dtype
) -> tuple[SkinnyConfig, dict]:
    """The tile and the constexprs (without OVERLAP) of a pass that makes t (``forward``) or du."""
    columns, full = min(MOST_AT_ONCE, columns_of(layout.rank)), precision(dtype) == "ieee"
    shared = forward and layout.count > 1 and not dropout and layout.count * columns <= 64
    config = WIDE if full or dropout else config_for(SHRINK, layout.count * columns if shared else columns)
    return config, {"BLOCK_M": config.rows, "BLOCK_K": config.cols, "RANK": columns, "COUNT": layout.count} | {
        "SHARED": shared, "SPLIT": layout.split, "SCALED": scaled, "DROPS": dropout > 0, "PRECISION": precision(dtype)
    }  # fmt: skip


def outer_form(
    layout: Layout, scaled: bool, dropout: float, dtype: torch.dtype, most: int = MOST_AT_ONCE
) -> tuple[SkinnyConfig, dict]:
    """The same of a pass that makes dA and dB; ``most``: columns in one program."""
    columns = min(most, columns_of(layout.rank))
    full = precision(dtype) == "ieee"
    config = WIDE if full or dropout else config_for(OUTER, columns * layout.count)
    return config, {"BLOCK_M": config.rows, "BLOCK_N": config.cols, "RANK": columns, "COUNT": layout.count} | {
        "SPLIT": layout.split, "SCALED": scaled, "DROPS": dropout > 0, "PRECISION": precision(dtype),
    }  # fmt: skip


class Shrinking(NamedTuple):
    """What is settled of a launch that makes t and the parts of B, or du and the parts of A."""

    run: Prepared
    out_size: tuple[int, int]
    parts_size: tuple[int, int]


@lru_cache(KEPT)
def _shrink(
    layout: Layout, rows: int, widths: tuple[int, ...], strides: tuple[int, ...], forward: bool, lengths: tuple[int, ...],
    factors: tuple[float, ...], others: tuple[float, ...], scaled: bool, dropout: float, with_rows: bool, arrivals: int,
    device, dtype, *_,
) -> Shrinking:  # fmt: skip
    """``widths``, ``strides``: of the large operands; ``lengths``: elements of the other adapter matrices."""
    rank, count, padded = layout.rank, layout.count, layout.padded
    config, form = shrink_form(layout, forward, scaled, dropout, dtype)
    parts_programs = sum(cdiv(n, PARTS_BLOCK.value) for n in lengths)
    row_blocks = cdiv(rows, config.rows) if with_rows else 0
    if forward:
        small, out, size = (1, widths[0]), (padded, rows * padded), (count * rows, padded)
        n_all = sum(lengths) // rank
        bases = tuple(sum(lengths[:j]) // rank * padded for j in range(count))
        place, parts_size = (rank, padded, rank), (n_all, padded)
    else:
        width = lengths[0] // rank
        small, out, size = (rank, 1), (count * padded, padded), (rows, count * padded)
        bases = tuple(j * padded * width for j in range(count))
        place, parts_size = (lengths[0], 0, lengths[0]), (count * padded, width)
    grid = (parts_programs + row_blocks, cdiv(rank, form["RANK"]) if with_rows else 1)
    run = Prepared(
        "lora_linear (shrink)" if forward else "lora_linear backward (shrink)",
        lora_shrink_kernel,
        device,
        grid,
        (*fill(strides, 0), *fill(widths, 0), *fill(factors, 0.0), rows, rank, *small, dropout, *out)
        + (*fill(lengths, 0), *fill(bases, 0), *fill(others, 0.0), *place, parts_programs, row_blocks, arrivals),
        form | {"OVERLAP": overlap_meta(device)["OVERLAP"]} | options_of(config),
    )
    return Shrinking(run, size, parts_size)


def _run_shrink(
    xs: list[Tensor], smalls: list[Tensor], others: list[Tensor], layout: Layout, forward: bool, factors: list[float],
    scalings: list[float], scale: Tensor | None, dropout: float, seeds: Tensor | None, with_rows: bool,
    arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = xs[0]
    widths, strides = tuple([x.shape[1] for x in xs]), tuple([x.stride(0) for x in xs])
    smalls, others = [t.contiguous() for t in smalls], [t.contiguous() for t in others]
    run, out_size, parts_size = _shrink(
        layout, x.shape[0], widths, strides, forward, tuple([t.numel() for t in others]), tuple(factors), tuple(scalings),
        scale is not None, dropout, with_rows, 0 if arrived is None else arrived.numel(), x.device, x.dtype, smalls[0].dtype,
    )  # fmt: skip
    out, parts = layout.buffer(x, *out_size), layout.buffer(x, *parts_size)
    unused = out
    run(
        *three(xs), *three(smalls), *three(others), unused if scale is None else scale, out, parts,
        unused if seeds is None else seeds, unused if arrived is None else arrived,
    )  # fmt: skip
    return out, parts


@lru_cache(KEPT)
def _parts(
    layout: Layout, ns: tuple[int, ...], width: int, scalings: tuple[float, ...], works: int, device, *_
) -> Prepared:
    length, rank = layout.rank * width, layout.rank
    a_programs = layout.count * cdiv(length, PARTS_BLOCK.value)
    b_programs = sum(cdiv(n * rank, PARTS_BLOCK.value) for n in ns)
    numbers = (*fill(scalings, 0.0), *fill(ns, 0), width, rank, layout.padded, layout.count * rank, a_programs, works)
    meta = {"SPLIT": layout.split, "OVERLAP": overlap_meta(device)["OVERLAP"]}
    return Prepared("lora_linear (parts)", lora_parts_kernel, device, (a_programs + b_programs,), numbers, meta)


def make_parts(
    x: Tensor, many_a: list[Tensor], many_b: list[Tensor], scalings: list[float], layout: Layout, work: Tensor
) -> tuple[Tensor, Tensor]:
    """(A of all as rows hi and, below all of those, lo; s B of all as :func:`make_t`); ``work``: set to zero."""
    ns, width = tuple([b.shape[0] for b in many_b]), many_a[0].shape[1]
    many_a, many_b = ([t.contiguous() for t in group] for group in (many_a, many_b))
    a = x.new_empty((layout.count * layout.rank * (2 if layout.split else 1), width))
    low = layout.buffer(x, sum(ns), layout.padded)
    run = _parts(layout, ns, width, tuple(scalings), work.numel(), x.device, x.dtype, many_a[0].dtype)
    run(*three(many_a), *three(many_b), a, low, work)
    return a, low


def make_t(
    x: Tensor, many_a: list[Tensor], many_b: list[Tensor], scalings: list[float], layout: Layout, dropout: float = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(t_j = drop_j(x) A_j^T one below another (count * M, padded), s_j B_j likewise (N of all, padded)), as parts."""
    count, cublas = layout.count, by_cublas(layout, dropout, x.device, x.dtype)
    # cuBLAS sums in another order where they lie otherwise
    many_a = [a.contiguous() for a in many_a]
    factors = [1.0 / (1.0 - dropout)] * count
    xs, given = [x] * count, (factors, scalings, None, dropout, seeds, not cublas)
    t, low = _run_shrink(xs, many_a, many_b, layout, True, *given)
    if cublas:
        for j, a in enumerate(many_a):
            put_parts(layout.of_t(t, j), x, a.T, layout)
    return t, low


def make_du(
    dys: list[Tensor], many_a: list[Tensor], many_b: list[Tensor], scalings: list[float], layout: Layout,
    scale: Tensor | None, arrived: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(du_j = s_j (k_j dy_j) B_j beside each other (M, count * padded), A_j below each other (count * padded, K)), as parts.

    ``scale``: DoRA's k (N of all,). ``arrived``: set to zero.
    """
    cublas, many_b = by_cublas(layout, 0.0, dys[0].device, dys[0].dtype), [b.contiguous() for b in many_b]
    du, a = _run_shrink(
        dys, many_b, many_a, layout, False, scalings, [1.0] * layout.count, scale, 0.0, None, not cublas, arrived
    )
    if cublas:
        scales = scale.split([dy.shape[1] for dy in dys]) if scale is not None else [None] * layout.count
        for j, (dy, b, s, k) in enumerate(zip(dys, many_b, scalings, scales)):
            b = b.float() * s if k is None else b.float() * (s * k[:, None])
            put_parts(layout.of_du(du, j), dy, b, layout)
    return du, a


def make_a(dys: list[Tensor], many_a: list[Tensor], many_b: list[Tensor], layout: Layout, cleared: Tensor) -> Tensor:
    """A_j below each other as :func:`make_du`; ``cleared``: set to zero."""
    ones = [1.0] * layout.count
    return _run_shrink(dys, many_b, many_a, layout, False, ones, ones, None, 0.0, None, False, cleared)[1]


def put_parts(out: Tensor, x: Tensor, small: Tensor, layout: Layout) -> None:
    """x small as parts, by cuBLAS; ``small`` (columns of x, R)."""
    if not layout.split:
        torch.mm(x, small.to(x.dtype), out=out)
        return
    hi = small.to(x.dtype)
    store_parts(
        out, joined_parts(product32(x, torch.cat([hi, (small - hi.float()).to(x.dtype)], dim=1)), layout), layout
    )
