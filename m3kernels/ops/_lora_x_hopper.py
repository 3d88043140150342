"""t = x A^T of all layers of one input in one pass over x, for Hopper (sm_90a), in Gluon.

A program makes all columns of t for 32 or 64 rows, transposed: A's few rows are the tensor cores' left operand (padded with
zeros, which the copy engine makes without reading), rows of x the right one. One warp loads up to 200 KB ahead. fp32 adapters
beside 16-bit activations stand as rows hi and, half the height below, lo; t leaves as [hi | lo | hi].
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m3kernels.ops._common import cdiv, next_power_of_2, sm_count
from m3kernels.ops._linear_hopper import Matrix
from m3kernels.ops._lora_launch import Layout
from m3kernels.ops._prepared import KEPT, Prepared

BLOCK_K = gl.constexpr(128)
LOADED = 200 * 1024  # bytes of tiles
MOST_STAGES = 8
HIGHEST = 256  # rows of A, all parts of all layers


@gluon.jit
def _produce(d_x, d_a, s_x, s_a, full, empty, row, k_tiles, STAGES: gl.constexpr):
    # A's parts come from the kernel before this one
    gdc_wait()
    gdc_launch_dependents()
    for i in range(0, k_tiles):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(slot), d_x.block_type.nbytes + d_a.block_type.nbytes)
        tma.async_copy_global_to_shared(d_x, [row, i * BLOCK_K], full.index(slot), s_x.index(slot))
        tma.async_copy_global_to_shared(d_a, [0, i * BLOCK_K], full.index(slot), s_a.index(slot))


@gluon.jit
def _consume(p_t, s_x, s_a, full, empty, row, k_tiles, rows, columns, rank, padded, ROWS: gl.constexpr, HEIGHT: gl.constexpr,
             STAGES: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    acc = gl.zeros([HEIGHT, ROWS], gl.float32, layout)
    for i in range(0, k_tiles):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        acc = warpgroup_mma(s_a.index(slot), s_x.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # the product before this one has been read
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    high: gl.constexpr = HEIGHT // 2 if SPLIT else HEIGHT
    out: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    if SPLIT:
        pairs: gl.constexpr = gl.BlockedLayout([1, 4, 2], [4, 8, 1], [4, 1, 1], [2, 1, 0])
        hi, lo = gl.convert_layout(acc.reshape([2, high, ROWS]).permute((1, 2, 0)), pairs).split()
        t = gl.convert_layout(hi + lo, out)
    else:
        t = gl.convert_layout(acc, out)
    o_c, o_m = gl.arange(0, high, gl.SliceLayout(1, out)), row + gl.arange(0, ROWS, gl.SliceLayout(0, out))
    mask = (o_c < columns)[:, None] & (o_m < rows)[None, :]
    # t_j lies below t_(j - 1)
    o_t = ((o_c // rank)[:, None].to(gl.int64) * rows + o_m[None, :]) * padded + (o_c % rank)[:, None]
    hi = t.to(p_t.dtype.element_ty)
    gl.store(p_t + o_t, hi, mask=mask)
    if SPLIT:
        gl.store(p_t + o_t + rank, (t - hi.to(gl.float32)).to(hi.dtype), mask=mask)
        gl.store(p_t + o_t + 2 * rank, hi, mask=mask)


@gluon.jit(do_not_specialize=["k_tiles", "rows", "columns", "rank", "padded"])
def lora_x_kernel(
    d_x, d_a, p_t, k_tiles, rows, columns, rank, padded,
    ROWS: gl.constexpr, HEIGHT: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, X_TILE: gl.constexpr,
    A_TILE: gl.constexpr,
):  # fmt: skip
    s_x = gl.allocate_shared_memory(d_x.dtype, [STAGES, ROWS, BLOCK_K], X_TILE)
    s_a = gl.allocate_shared_memory(d_x.dtype, [STAGES, HEIGHT, BLOCK_K], A_TILE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    row = gl.program_id(0) * ROWS
    gl.warp_specialize(
        [
            (
                _consume,
                (p_t, s_x, s_a, full, empty, row, k_tiles, rows, columns, rank, padded, ROWS, HEIGHT, STAGES, SPLIT),
            ),
            (_produce, (d_x, d_a, s_x, s_a, full, empty, row, k_tiles, STAGES)),
        ],
        [1],
        [40],
    )


class Form(NamedTuple):
    """Rows of x in a tile, rows of A (zeros included), stages."""

    rows: int
    height: int
    stages: int

    @classmethod
    def of(cls, layout: Layout, rows: int, sms: int) -> "Form | None":
        """None: more columns of t than this kernel makes."""
        height = max(64, next_power_of_2(layout.count * layout.rank) * (2 if layout.split else 1))
        tile = 64 if cdiv(rows, 64) >= sms - 4 and height < HIGHEST else 32
        return cls(tile, height, min(MOST_STAGES, LOADED // (256 * (tile + height)))) if height <= HIGHEST else None

    def tiles(self) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
        return tuple(
            gl.NVMMASharedLayout.get_default_for([n, BLOCK_K.value], gl.bfloat16) for n in (self.rows, self.height)
        )


@lru_cache(KEPT)
def prepared(
    layout: Layout, rows: int, width: int, stride: int, dtype: torch.dtype, device: torch.device
) -> tuple | None:
    """(launch, rows of A's parts, row where lo begins), or None where this kernel does not take the pass."""
    form = Form.of(layout, rows, sm_count(device))
    # the copy engine reads rows that begin at 16-byte marks, each at its own
    if form is None or width % 8 or stride % 8 or not stride or dtype not in (torch.bfloat16, torch.float16):
        return None
    x_tile, a_tile = form.tiles()
    high = form.height // 2 if layout.split else 0
    columns = layout.count * layout.rank
    run = Prepared(
        "lora_linear (x)",
        lora_x_kernel,
        device,
        (cdiv(rows, form.rows),),
        (cdiv(width, BLOCK_K.value), rows, columns, layout.rank, layout.padded),
        {"ROWS": form.rows, "HEIGHT": form.height, "STAGES": form.stages, "SPLIT": layout.split, "X_TILE": x_tile}
        | {"A_TILE": a_tile, "num_warps": 4, "maxnreg": 168, "launch_pdl": True},
        (
            Matrix(rows, width, stride, (form.rows, BLOCK_K.value), x_tile),
            Matrix(high + columns, width, width, (form.height, BLOCK_K.value), a_tile),
            None,
        ),
    )
    return run, high + columns, high


def t_of(plan: tuple, x: Tensor, a: Tensor, layout: Layout) -> Tensor:
    """t (count * M, padded) of A's parts, right after the kernel that wrote them and let this one begin."""
    t = layout.buffer(x, layout.count * x.shape[0], layout.padded)
    plan[0](x, a, t)
    return t
