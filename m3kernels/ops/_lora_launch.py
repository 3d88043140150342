"""Launchers of the low-rank products, and the choice between our kernels and cuBLAS for each."""

from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class Layout:
    """How parts lie: ``width`` columns for one projection (3 x rank where ``split``), ``padded`` to 16 bytes."""

    rank: int
    split: bool
    count: int

    @classmethod
    def of(cls, x: Tensor, a: Tensor, count: int) -> "Layout":
        return cls(a.shape[0], a.dtype == torch.float32 and x.dtype != torch.float32, count)

    @property
    def width(self) -> int:
        return self.rank * (3 if self.split else 1)

    @property
    def padded(self) -> int:
        return cdiv(self.width, 8) * 8

    def buffer(self, like: Tensor, *size: int) -> Tensor:
        # what lies between the parts is multiplied with other padding: it must be finite
        make = torch.empty if self.padded == self.width else torch.zeros
        return make(size, dtype=like.dtype, device=like.device)

    def parts(self, t: Tensor) -> list[Tensor]:
        """Each projection's columns."""
        return [t[:, j * self.padded : j * self.padded + self.width] for j in range(self.count)]


def config_for(table: dict[int, SkinnyConfig], columns: int) -> SkinnyConfig:
    return next(config for most, config in table.items() if columns <= most)


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def columns_of(rank: int) -> int:
    """The columns that a kernel computes for ``rank``: tensor cores take 16 at least."""
    return max(16, next_power_of_2(rank))


def three(tensors: list[Tensor]) -> list[Tensor]:
    """As many as a kernel takes; the last one again where there are fewer."""
    return [*tensors, *(tensors[-1:] * (MOST - len(tensors)))]


def sizes(tensors: list[Tensor]) -> list[int]:
    """N of each projection (its last dimension), 0 where there is none."""
    return [t.shape[-1] for t in tensors] + [0] * (MOST - len(tensors))


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


def as_parts(
    x: Tensor,
    many_a: list[Tensor],
    many_b: list[Tensor],
    scalings: list[float],
    layout: Layout,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(A of all (count * padded, K), s B of all (N of all, padded), each row times ``scale`` where given) as parts.

    Either list may be empty.
    """
    total = sum(b.shape[0] for b in many_b)
    a = layout.buffer(x, len(many_a) * layout.padded, x.shape[1])
    low = layout.buffer(x, total, layout.padded)
    many_a, many_b = ([t.contiguous() for t in many] for many in (many_a, many_b))
    a_blocks = cdiv(layout.rank * x.shape[1], 1024) if many_a else 0
    launch(
        "lora_linear (parts)",
        lora_parts_kernel,
        (a_blocks * len(many_a) + cdiv(total * layout.rank, 1024),),
        *(*three(many_a or many_b), *three(many_b or many_a), low if scale is None else scale, a, low),
        *(*scalings, *[0.0] * (MOST - len(scalings)), *sizes([b.T for b in many_b])),
        *(x.shape[1], layout.rank, layout.padded, a_blocks, len(many_a)),
        **{"BLOCK": 1024, "SPLIT": layout.split, "SCALED": scale is not None},
    )
    return a, low


def shrink(x: Tensor, a: Tensor, layout: Layout, dropout: float, seeds: Tensor | None) -> Tensor:
    """t = drop(x) A^T of all projections (M, count * padded)."""
    rank, count, split = layout.rank, layout.count, layout.split
    t = layout.buffer(x, x.shape[0], count * layout.padded)
    groups = count if dropout else 1
    columns = rank * (count // groups)
    if _by_cublas(x, dropout) or (columns > 64 and x.is_cuda and not split and not dropout):
        if layout.padded == rank:
            return torch.mm(x, a.T, out=t)
        for j, part in enumerate(layout.parts(t)):
            part.copy_(x @ a[j * layout.padded :][:rank].T)
        return t
    if columns > MAX_RANK:  # three of large rank
        groups, columns = count, rank
    config = config_for(SHRINK, columns_of(columns))
    if columns_of(columns) <= 128 and not _has_room(x.device):
        config = SMALL
    launch(
        "lora_linear (shrink)",
        lora_shrink_kernel,
        (groups, cdiv(x.shape[0], config.rows)),
        *(x, a, t, t if seeds is None else seeds, x.stride(0), a.stride(0), t.stride(0)),
        *(*x.shape, columns, rank, layout.padded, dropout),
        **{"BLOCK_M": config.rows, "BLOCK_K": config.cols, "RANK": columns_of(columns), "SPLIT": split},
        **{"DROPS": dropout > 0, "PRECISION": precision(x), "num_warps": config.warps, "num_stages": config.stages},
    )
    return t


def _by_cublas(x: Tensor, dropout: float) -> bool:
    """fp32 is cuBLAS's: our kernels would add nothing but another order of sums."""
    return x.dtype == torch.float32 and x.is_cuda and not dropout


def _one_pass(
    ys: list[Tensor], low: Tensor, t: Tensor, layout: Layout, du: Tensor | None, dbs: list[Tensor], scalings: list[float],
    scale: Tensor | None = None, dropout: float = 0.0, seeds: Tensor | None = None,
) -> None:  # fmt: skip
    """du = y low where it is given and db = scaling * scale * drop(y)^T t of each, reading y once for each 64 of the rank."""
    rows, split = ys[0].shape[0], layout.split
    ns, total = sizes(ys), sum(y.shape[1] for y in ys)
    for first in range(0, layout.rank, MOST_AT_ONCE):
        here = min(MOST_AT_ONCE, layout.rank - first)
        columns = columns_of(here)
        fast = not dropout and precision(ys[0]) == "tf32"
        config = GRADS.get((columns, split), WIDE) if fast else WIDE
        if config is not WIDE and not _has_room(ys[0].device):
            config = SMALL
        blocks = sum(cdiv(n, config.cols) for n in ns)
        per_sm = 2 if config.cols < 512 else 1
        shares = min(cdiv(rows, config.rows), max(1, cdiv(per_sm * sm_count(ys[0].device), blocks)))
        each = cdiv(cdiv(rows, shares), config.rows) * config.rows
        shares = cdiv(rows, each)
        part_db = t.new_empty((shares, total, columns), dtype=torch.float32)
        part_du = part_db if du is None else t.new_empty((blocks, rows, columns), dtype=torch.float32)
        launch(
            "lora_linear backward",
            lora_grads_kernel,
            (blocks, shares),
            *(*three(ys), low[:, first:], t[:, first:], part_du, part_db, t if seeds is None else seeds),
            *(*ns, rows, low.stride(0), t.stride(0), layout.padded, here, layout.rank, each, dropout),
            **{"BLOCK_M": config.rows, "BLOCK_N": config.cols, "RANK": columns, "WITH_DU": du is not None},
            **{"SPLIT": split, "DROPS": dropout > 0, "PRECISION": precision(ys[0])},
            **{"num_warps": config.warps, "num_stages": config.stages},
        )
        du_programs = 0 if du is None else cdiv(rows, 32)
        outs = [db[:, first:] for db in dbs]
        launch(
            "lora_linear backward (sum)",
            lora_sum_kernel,
            (du_programs * len(ys) + cdiv(total, 32),),
            *(part_du, part_db, part_db if du is None else du[:, first:], *three(outs)),
            *(part_db if scale is None else scale, *scalings, *[0.0] * (MOST - len(scalings)), *ns),
            *(rows, 0 if du is None else du.stride(0), *outs[0].stride(), layout.padded, here, layout.rank),
            *(shares, du_programs, len(ys)),
            **{"BLOCK": 32, "BLOCK_N": config.cols, "RANK": columns, "SPLIT": split, "SCALED": scale is not None},
            num_warps=2,
        )


def du_and_dbs(
    dys: list[Tensor],
    low: Tensor,
    t: Tensor,
    layout: Layout,
    dbs: list[Tensor],
    scalings: list[float],
    scale: Tensor | None,
) -> Tensor:
    """du = dy low of all projections (M, count * padded); writes db = scaling * scale * dy^T t (N, R) of each.

    ``low`` holds the scaling (and DoRA's ``scale`` (N of all,)) already.
    """
    rank, split = layout.rank, layout.split
    du = layout.buffer(t, t.shape[0], t.shape[1])
    if not t.is_cuda or ((columns_of(rank), split) in GRADS and not _by_cublas(t, 0.0)):
        _one_pass([dy.contiguous() for dy in dys], low, t, layout, du, dbs, scalings, scale)
        return du
    start = 0
    for dy, part, t_j, db, scaling in zip(dys, layout.parts(du), layout.parts(t), dbs, scalings):
        end = start + dy.shape[1]
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
        db.copy_(found.mul_(scaling) if scale is None else found.mul_(scaling * scale[start:end, None]))
        start = end
    return du


def das_of(x: Tensor, du: Tensor, layout: Layout, like: Tensor, dropout: float, seeds: Tensor | None) -> list[Tensor]:
    """dA = du^T drop(x) (R, K) of each projection."""
    rank, count = layout.rank, layout.count
    if dropout:
        das = [like.new_empty((rank, x.shape[1])) for _ in range(count)]
        one = Layout(rank, layout.split, 1)
        for j, (da, part) in enumerate(zip(das, layout.parts(du))):
            _one_pass([x.contiguous()], x, part, one, None, [da.T], [1 / (1 - dropout)], None, dropout, seeds[j:])
        return das
    # one product for all: x is read once
    if layout.split:
        found = product32(du.T, x).view(count, layout.padded, -1)
        return [one[:rank] + one[rank : 2 * rank] for one in found]
    return [one[:rank].clone() for one in torch.mm(du.T, x).view(count, layout.padded, -1)]


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


def dora_grads(dy: Tensor, out: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dz = scale * dy, the sum over rows of dy * out in fp32)."""
    rows, cols = dy.shape
    dz = torch.empty((rows, cols), dtype=dy.dtype, device=dy.device)
    blocks = cdiv(cols, 256)
    each = cdiv(cdiv(rows, max(1, 4 * sm_count(dy.device) // blocks)), 16) * 16
    parts = dy.new_empty((cdiv(rows, each), cols), dtype=torch.float32)
    launch(
        "dora_linear backward",
        dora_grad_kernel,
        (blocks, parts.shape[0]),
        *(dy, out, scale, dz, parts, dy.stride(0), out.stride(0), rows, cols, each),
        **{"BLOCK_M": 16, "BLOCK_N": 256},
    )
    return dz, parts.sum(0)
