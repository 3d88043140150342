"""t = x A^T of all layers of one input in one pass over x, for Hopper (sm_90a), in Gluon.

A few programs make all columns of t for 128 rows each, in the order in which the product wants them, while the product
already runs on the other multiprocessors (:mod:`m3kernels.ops._beside`). One warp loads up to 200 KB ahead; two warpgroups
have 64 rows each. fp32 adapters beside 16-bit activations stand as rows hi and, below all of those, lo; t leaves as
[hi | lo | hi].
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m3kernels.ops._beside import BLOCK_M, ONE, READY, Cut, rows_written, streams
from m3kernels.ops._common import cdiv, next_power_of_2, sm_count
from m3kernels.ops._linear_hopper import BLOCK_N, CONSUMERS, ROWS
from m3kernels.ops._linear_launch import Matrix
from m3kernels.ops._lora_launch import Layout
from m3kernels.ops._prepared import KEPT, Prepared

LOADED = 200 * 1024  # bytes of tiles
MOST_STAGES = 10
MOST_COLUMNS = 256  # of t
# columns of t in one pass, and how many more may stand beside those; of more, each layer reads x from the cache again
AT_ONCE, REST = 128, 64
NARROW = 32  # rows of A up to which fewer, larger tiles are faster


@gluon.jit
def _produce(d_x, small, d_rest, memory, m_tiles, k_tiles, passes, columns, COLUMNS: gl.constexpr, REST: gl.constexpr,
             PARTS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    # A's parts come from the kernel before this one, which also cleared what the product counts by
    gdc_wait()
    gdc_launch_dependents()
    s_x, s_a, s_rest, full, empty = memory
    BLOCK_K: gl.constexpr = d_x.block_type.shape[1]
    loaded: gl.constexpr = CONSUMERS * d_x.block_type.nbytes + PARTS * small[0].block_type.nbytes
    count = 0
    for m in range(gl.program_id(0), m_tiles, gl.num_programs(0)):
        for i in range(0, passes * k_tiles):
            slot, k, a_row = count % STAGES, i % k_tiles * BLOCK_K, i // k_tiles * columns
            mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), loaded + (d_rest.block_type.nbytes if REST else 0))
            for c in gl.static_range(CONSUMERS):
                row = m * BLOCK_M + c * ROWS
                tma.async_copy_global_to_shared(d_x, [row, k], full.index(slot), s_x.index(slot * CONSUMERS + c))
            for p in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(small[p], [a_row, k], full.index(slot), s_a.index(slot * PARTS + p))
            if REST:
                tma.async_copy_global_to_shared(d_rest, [COLUMNS, k], full.index(slot), s_rest.index(slot))
            count += 1


@gluon.jit
def _write(acc, p_t, row, first, j, columns, rows, RANK: gl.constexpr, PADDED: gl.constexpr, PARTS: gl.constexpr):
    """Columns of t from ``first`` on, of projection j and those after it."""
    layout: gl.constexpr = acc.type.layout
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    o_c = first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    mask = (o_m < rows - row)[:, None] & (o_c < columns)[None, :]
    # t_j lies below t_(j - 1)
    o_t = ((row + o_m) * PADDED)[:, None] + ((o_c // RANK + j) * (rows * PADDED) + o_c % RANK)[None, :]
    hi = acc.to(p_t.dtype.element_ty)
    gl.store(p_t + o_t, hi, mask=mask)
    if PARTS == 2:
        gl.store(p_t + o_t + RANK, (acc - hi.to(gl.float32)).to(hi.dtype), mask=mask)
        gl.store(p_t + o_t + 2 * RANK, hi, mask=mask)


@gluon.jit
def _consume(p_t, p_work, memory, m_tiles, k_tiles, passes, columns, rows, which: gl.constexpr, RANK: gl.constexpr,
             PADDED: gl.constexpr, COLUMNS: gl.constexpr, REST: gl.constexpr, PARTS: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    s_x, s_a, s_rest, full, empty = memory
    count = 0
    for m in range(gl.program_id(0), m_tiles, gl.num_programs(0)):
        row = m * BLOCK_M + which * ROWS
        for j in range(0, passes):
            acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
            if REST:
                rest = gl.zeros([ROWS, REST], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16]))
            for i in range(0, k_tiles):
                slot = count % STAGES
                mbarrier.wait(full.index(slot), count // STAGES & 1)
                x = s_x.index(slot * CONSUMERS + which)
                for p in gl.static_range(PARTS):
                    acc = warpgroup_mma(x, s_a.index(slot * PARTS + p).permute((1, 0)), acc, is_async=True)
                if REST:
                    rest = warpgroup_mma(x, s_rest.index(slot).permute((1, 0)), rest, is_async=True)
                    acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
                else:
                    acc = warpgroup_mma_wait(PARTS, deps=(acc,))
                # the products before these have been read
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=i > 0)
                count += 1
            if REST:
                acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
            _write(acc, p_t, row, 0, j, columns, rows, RANK, PADDED, PARTS)
            if REST:
                _write(rest, p_t, row, COLUMNS, j, columns, rows, RANK, PADDED, PARTS)
        rows_written(p_work + READY + m)


@gluon.jit(do_not_specialize=["m_tiles", "k_tiles", "passes", "columns", "rows"])
def lora_x_kernel(
    d_x, d_a_hi, d_a_lo, d_rest, p_t, p_work, m_tiles, k_tiles, passes, columns, rows,
    RANK: gl.constexpr, PADDED: gl.constexpr, COLUMNS: gl.constexpr, REST: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, X_TILE: gl.constexpr, A_TILE: gl.constexpr, REST_TILE: gl.constexpr,
):  # fmt: skip
    BLOCK_K: gl.constexpr = d_x.block_type.shape[1]
    s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], X_TILE)
    s_a = gl.allocate_shared_memory(d_x.dtype, [STAGES * PARTS, COLUMNS, BLOCK_K], A_TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    s_rest = s_a
    if REST:
        s_rest = gl.allocate_shared_memory(d_x.dtype, [STAGES, REST, BLOCK_K], REST_TILE)
    memory, small = (s_x, s_a, s_rest, full, empty), (d_a_hi, d_a_lo)
    # named: a number written into the lists below is no constexpr
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (p_t, p_work, memory, m_tiles, k_tiles, passes, columns, rows, upper, RANK, PADDED, COLUMNS, REST,
                        PARTS, STAGES)),
            (_consume, (p_t, p_work, memory, m_tiles, k_tiles, passes, columns, rows, lower, RANK, PADDED, COLUMNS, REST,
                        PARTS, STAGES)),
            (_produce, (d_x, small, d_rest, memory, m_tiles, k_tiles, passes, columns, COLUMNS, REST, PARTS, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


class Form(NamedTuple):
    """Passes over x and columns of t of one; columns in a tile (a power of 2) and beside it; k of both; stages."""

    passes: int
    columns: int
    tile: int
    rest: int
    k: int
    stages: int

    @classmethod
    def of(cls, layout: Layout) -> "Form | None":
        """None: more columns of t than this kernel makes."""
        columns, parts = layout.count * layout.rank, 2 if layout.split else 1
        rest = REST if AT_ONCE < columns <= AT_ONCE + REST and parts == 1 else 0
        together = columns <= AT_ONCE + rest
        columns = columns if together else layout.rank
        tile = AT_ONCE if rest else max(16, next_power_of_2(columns))
        k = 128 if tile * parts <= NARROW else 64
        stages = min(MOST_STAGES, LOADED // (2 * k * (BLOCK_M.value + tile * parts + rest)))
        if tile > MOST_COLUMNS or stages < 2:
            return None
        return cls(1 if together else layout.count, columns, tile, rest, k, stages)

    def layouts(self) -> tuple[gl.NVMMASharedLayout, ...]:
        """Of tiles of x, of A and of A's rows beside those."""
        rows = ROWS.value, self.tile, self.rest or self.tile
        return tuple(gl.NVMMASharedLayout.get_default_for([n, self.k], gl.bfloat16) for n in rows)

    def rate(self, layout: Layout) -> float:
        """Bytes of x a microsecond in one multiprocessor, whose way to the cache carries A as well."""
        columns = self.tile * (2 if layout.split else 1) + self.rest
        return ONE * BLOCK_M.value / (BLOCK_M.value + columns) / self.passes * (0.75 if layout.split else 1.0)


@lru_cache(KEPT)
def prepared(
    layout: Layout, rows: int, width: int, stride: int, ns: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Prepared, Cut] | None:
    """The launch and the cut of the product beside it, or None where this kernel does not take the pass; ``ns``: its columns."""
    form = Form.of(layout)
    # the copy engine reads rows that begin at 16-byte marks, each at its own
    if form is None or width % 8 or stride % 8 or not stride or dtype not in (torch.bfloat16, torch.float16):
        return None
    if layout.count * rows * layout.padded >= 2**31:
        return None
    parts, of_all, (x_tile, a_tile, rest_tile) = 2 if layout.split else 1, layout.count * layout.rank, form.layouts()
    m_tiles, n_tiles = cdiv(rows, BLOCK_M.value), sum(cdiv(n, BLOCK_N.value) for n in ns)
    small = [Matrix(of_all, width, width, (form.tile, form.k), a_tile, p * of_all * width) for p in range(parts)]
    rest = Matrix(of_all, width, width, (form.rest or form.tile, form.k), rest_tile)
    programs = streams(m_tiles, BLOCK_M.value * width * 2, form.rate(layout), n_tiles, width, sm_count(device))
    run = Prepared(
        "lora_linear (x)",
        lora_x_kernel,
        device,
        (programs,),
        (m_tiles, cdiv(width, form.k), form.passes, form.columns, rows),
        {"RANK": layout.rank, "PADDED": layout.padded, "COLUMNS": form.tile, "REST": form.rest, "PARTS": parts}
        | {
            "STAGES": form.stages,
            "X_TILE": x_tile,
            "A_TILE": a_tile,
            "REST_TILE": rest_tile,
            "num_warps": 4,
            "maxnreg": 168,
            "launch_pdl": True,
        },
        (Matrix(rows, width, stride, (ROWS.value, form.k), x_tile), small[0], small[-1], rest, None, None),
    )
    return run, Cut(CONSUMERS.value, m_tiles * n_tiles, 0, 1)


def t_of(run: Prepared, x: Tensor, a: Tensor, work: Tensor, layout: Layout) -> Tensor:
    """t (count * M, padded) of A's parts, right after the kernel that wrote them, cleared ``work`` and let this one begin."""
    t = layout.buffer(x, layout.count * x.shape[0], layout.padded)
    run(x, a, a, a, t, work)
    return t
