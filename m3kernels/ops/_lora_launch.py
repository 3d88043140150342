"""Launchers of the low-rank products, and the choice between our kernels and cuBLAS for each."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class SkinnyConfig:
    """Rows and columns of the large operand's tile, warps, load stages."""

    rows: int
    cols: int
    warps: int
    stages: int


# by columns of t in one program
SHRINK = {64: SkinnyConfig(64, 128, 4, 4), 128: SkinnyConfig(64, 64, 8, 3), 512: SkinnyConfig(16, 32, 8, 2)}
GRADS = {16: SkinnyConfig(64, 512, 8, 2), 64: SkinnyConfig(64, 256, 8, 2), 128: SkinnyConfig(32, 128, 8, 2)}
# above, two cuBLAS products read dy twice and are faster than one pass (r 64: 188 us for 218, 8192 x 14336)
ONE_PASS_RANK = 32
MAX_RANK = 512


def config_for(table: dict[int, SkinnyConfig], columns: int) -> SkinnyConfig:
    return next(config for most, config in table.items() if columns <= most)


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def columns_of(rank: int) -> int:
    """The columns that a kernel computes for ``rank``: tensor cores take 16 at least."""
    return max(16, next_power_of_2(rank))


def product32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def as_parts(x: Tensor, out: Tensor, part_stride: int, scale: float, split: bool) -> None:
    """Writes scale * x into ``out``, as [hi | hi | lo] where ``split``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    launch(
        "lora_linear (parts)",
        lora_parts_kernel,
        (cdiv(x.numel(), 1024),),
        *(x, out, x.stride(0), out.stride(0), part_stride, *x.shape, scale),
        **{"BLOCK": 1024, "SPLIT": split},
    )


def shrink(
    x: Tensor,
    a: Tensor,
    t: Tensor,
    rank: int,
    count: int,
    padded: int,
    split: bool,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """t = drop(x) A^T for ``count`` projections of one rank, whose parts begin every ``padded`` columns of t and rows of a."""
    groups = count if dropout else 1
    columns = rank * (count // groups)
    if columns > 64 and not split and not dropout and padded == rank:
        torch.mm(x, a.T, out=t)
        return
    if columns > MAX_RANK:  # three of large rank
        groups, columns = count, rank
    config = config_for(SHRINK, columns_of(columns))
    launch(
        "lora_linear (shrink)",
        lora_shrink_kernel,
        (groups, cdiv(x.shape[0], config.rows)),
        *(x, a, t, t if seed is None else seed, x.stride(0), a.stride(0), t.stride(0)),
        *(*x.shape, columns, rank, padded, dropout),
        **{"BLOCK_M": config.rows, "BLOCK_K": config.cols, "RANK": columns_of(columns), "SPLIT": split},
        **{"DROPS": dropout > 0, "PRECISION": precision(x), "num_warps": config.warps, "num_stages": config.stages},
    )


def _one_pass(
    y: Tensor, b: Tensor, t: Tensor, rank: int, split: bool, du: Tensor | None, db: Tensor, scaling: float,
    dropout: float = 0.0, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes du = y b where it is given, and db = scaling * drop(y)^T t, reading y once for every 128 of the rank."""
    rows, cols = y.shape
    most = max(GRADS)
    for first in range(0, rank, most):
        here = min(most, rank - first)
        columns = columns_of(here)
        config = config_for(GRADS, columns)
        blocks = cdiv(cols, config.cols)
        each = cdiv(cdiv(rows, max(1, sm_count(y.device) // blocks)), config.rows) * config.rows
        part_db = y.new_empty((cdiv(rows, each), cols, columns), dtype=torch.float32)
        part_du = part_db if du is None else y.new_empty((blocks, rows, columns), dtype=torch.float32)
        launch(
            "lora_linear backward",
            lora_grads_kernel,
            (blocks, part_db.shape[0]),
            *(y, b[:, first:], t[:, first:], part_du, part_db, t if seed is None else seed),
            *(y.stride(0), b.stride(0), t.stride(0), rows, cols, here, rank, each, dropout),
            **{"BLOCK_M": config.rows, "BLOCK_N": config.cols, "RANK": columns, "WITH_DU": du is not None},
            **{"SPLIT": split, "DROPS": dropout > 0, "PRECISION": precision(y)},
            **{"num_warps": config.warps, "num_stages": config.stages},
        )
        _add_up(part_db, db[:, first:], here, rank, scaling, False)
        if du is not None:
            _add_up(part_du, du[:, first:], here, rank, 1.0, split)


def _add_up(parts: Tensor, out: Tensor, rank: int, part: int, scale: float, split: bool) -> None:
    count, rows, columns = parts.shape
    launch(
        "lora_linear backward (sum)",
        lora_sum_kernel,
        (cdiv(rows, 32),),
        *(parts, out, *out.stride(), rows, count, rank, part, scale),
        **{"BLOCK": 32, "RANK": columns, "SPLIT": split, "num_warps": 2},
    )


def du_and_db(
    dy: Tensor, low: Tensor, t: Tensor, du: Tensor, rank: int, scaling: float, split: bool, db: Tensor
) -> None:
    """Writes du = dy low (M, parts) and db = scaling * dy^T t (N, R); ``low`` holds the scaling already."""
    if rank <= ONE_PASS_RANK or not dy.is_cuda:
        _one_pass(dy, low, t, rank, split, du, db, scaling)
    elif not split:
        torch.mm(dy, low, out=du)
        db.copy_(product32(dy.T, t).mul_(scaling))
    else:
        both = product32(dy, low[:, rank:])  # [hi | lo]
        total = both[:, :rank] + both[:, rank:]
        hi = total.to(du.dtype)
        du[:, :rank] = du[:, 2 * rank :] = hi
        du[:, rank : 2 * rank] = (total - hi.float()).to(du.dtype)
        both = product32(dy.T, t[:, : 2 * rank])
        db.copy_((both[:, :rank] + both[:, rank:]).mul_(scaling))


def da_of(x: Tensor, du: Tensor, rank: int, split: bool, dropout: float, seed: Tensor | None, da: Tensor) -> None:
    """Writes dA = du^T drop(x) (R, K) of one projection."""
    if dropout:
        _one_pass(x, x, du, rank, split, None, da.T, 1.0, dropout, seed)
        return
    found = product32(du[:, : 2 * rank if split else rank].T, x)
    da.copy_(found[:rank] + found[rank:] if split else found)


def expand(du: Tensor, a: Tensor, dx: Tensor, adds: bool, dropout: float, seed: Tensor) -> None:
    """dx (+)= drop'(du a), all parts of one projection."""
    rows, width = dx.shape
    launch(
        "lora_linear backward (dx)",
        lora_expand_kernel,
        (cdiv(width, 128), cdiv(rows, 64)),
        *(du, a, dx, seed, du.stride(0), a.stride(0), dx.stride(0), rows, width, a.shape[0], dropout),
        **{"BLOCK_M": 64, "BLOCK_K": 128, "BLOCK_R": min(64, columns_of(a.shape[0])), "ADDS": adds},
        **{"PRECISION": precision(dx), "num_warps": 8},
    )


def dora_grads(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(scale * dy, sum over rows of dy * y in fp32)."""
    rows, cols = dy.shape
    dz = torch.empty((rows, cols), dtype=dy.dtype, device=dy.device)
    blocks = cdiv(cols, 256)
    each = cdiv(cdiv(rows, max(1, 4 * sm_count(dy.device) // blocks)), 16) * 16
    parts = dy.new_empty((cdiv(rows, each), cols), dtype=torch.float32)
    launch(
        "dora_linear backward",
        dora_grad_kernel,
        (blocks, parts.shape[0]),
        *(dy, y, scale, dz, parts, dy.stride(0), y.stride(0), rows, cols, each),
        **{"BLOCK_M": 16, "BLOCK_N": 256},
    )
    return dz, parts.sum(0)
