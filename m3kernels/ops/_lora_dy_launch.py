"""The launch of :mod:`m3kernels.ops._lora_dy_hopper`: how many programs, with how many columns each, and whether they make dA."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from m3kernels.ops._beside import BLOCK_M, LEAST, LEAST_SHARED, PIECES, TILE, Cut, best_cut, finished, lateness
from m3kernels.ops._common import cdiv, next_power_of_2, sm_count
from m3kernels.ops._linear_hopper import BLOCK_N
from m3kernels.ops._linear_launch import Matrix
from m3kernels.ops._lora_dy_hopper import Y_TILE, lora_dy_kernel
from m3kernels.ops._lora_dy_sums import COLS, ROWS, unit_rows
from m3kernels.ops._lora_launch import MOST, Layout, fill, three
from m3kernels.ops._prepared import KEPT, Prepared

SHARED = 220 * 1024  # bytes of tiles
MOST_STAGES = 10
MOST_RANK = 64
# by columns of B and blocks: microseconds that a program takes for 64 rows, beside a product; measured: docs/adapters.md
ROW_TILE = {
    16: {2: 0.83, 4: 1.4, 6: 2.1, 8: 2.7, 12: 3.05, 16: 4.0},
    32: {2: 1.3, 4: 1.9, 6: 2.5, 8: 3.0},
    64: {2: 2.4, 4: 2.8},
}
# the same for three projections at once, whose du are summed: how much longer
OF_THREE = {16: 1.0, 32: 1.1, 64: 1.3}
# programs: each hands on a du of its own
FEW = {16: 16, 32: 16, 64: 24}
X_RANK = 16  # up to which they make dA, too
# microseconds that 64 rows take of it, for each block of x, for each projection; bytes of x in one by a kernel after the product
X_TILE, X_BLOCK, X_SMALL, AFTER = 0.1, 0.1, 0.05, 2.0e6
X_LEAST = 15.0  # that it must gain
# by columns of B: how many shares of the rows are tried; microseconds that adding up those of dB takes
SHARES, SUMMED_UP = {16: (4,), 32: (2,), 64: (2, 3, 4)}, 4.0
# a product's tile from which on cutting the last ones was seen to gain, with the pass over dy alone beside it
LONG = 100.0


class Pass(NamedTuple):
    """The launch and its sizes.

    ``parts``: numbers of du and dB in the making; ``arrivals``, ``work``: counters, its own and those that the product has too;
    ``cut`` of that product; ``tiles`` of rows; ``makes_da``: nothing else has to.
    """

    run: Prepared
    parts: int
    arrivals: int
    work: int
    cut: Cut
    tiles: int
    makes_da: bool


class Form(NamedTuple):
    """Columns of a power of 2, blocks of 128 columns of dy and of x (0: not dA) of one program, stages of those and of t.

    ``shares``: programs that have the same columns of dy, each every so many tiles of rows.
    """

    rank: int
    blocks: int
    x_blocks: int
    stages: int
    t_stages: int
    shares: int = 1

    @classmethod
    def of(cls, layout: Layout, blocks: int, x_blocks: int = 0) -> "Form | None":
        rank, parts = max(16, next_power_of_2(layout.rank)), 2 if layout.split else 1
        t_stages = 2 * layout.count + 2 if x_blocks else 3
        free = SHARED - 2 * rank * (parts * (blocks * COLS.value + t_stages * ROWS.value) + 2 * ROWS.value)
        stages = min(MOST_STAGES, free // (2 * ROWS.value * COLS.value))
        fits = blocks in ROW_TILE[rank] and stages >= 3 and (not x_blocks or rank <= X_RANK)
        return cls(rank, blocks, x_blocks, stages, t_stages) if fits else None

    def lanes(self, ns: tuple[int, ...]) -> list[int]:
        """Programs side by side over the columns of each gradient."""
        return [cdiv(n, COLS.value * self.blocks) for n in ns]

    def programs(self, ns: tuple[int, ...]) -> int:
        return self.shares * sum(self.lanes(ns))

    def makers(self, layout: Layout) -> int:
        """Stores of du of 128 rows that are counted."""
        return layout.count * BLOCK_M.value // unit_rows(self.rank, layout.count)

    def slabs(self, ns: tuple[int, ...]) -> int:
        """Numbers of dB in the making."""
        return self.programs(ns) * self.blocks * COLS.value * self.rank if self.shares > 1 else 0

    def tiles(self) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
        return tuple(
            gl.NVMMASharedLayout.get_default_for([n, self.rank], gl.bfloat16) for n in (ROWS.value, COLS.value)
        )

    def stripes(self, width: int) -> int:
        """Of x, for a program each."""
        return cdiv(width, COLS.value * self.x_blocks) if self.x_blocks else 0

    def busy(self, rows: int, width: int, layout: Layout, ns: tuple[int, ...]) -> float:
        """Microseconds beside a product."""
        small = X_SMALL * layout.count * (2 if layout.split else 1)
        of_dy = ROW_TILE[self.rank][self.blocks] * (1.75 if layout.split else 1.0)
        of_dy *= OF_THREE[self.rank] if layout.count == MOST else 1.0
        of_x = (X_TILE + X_BLOCK * self.x_blocks + small) * cdiv(self.stripes(width), self.programs(ns))
        own = ROWS.value * self.shares
        return cdiv(rows, own) * of_dy + cdiv(rows, ROWS.value) * of_x + (SUMMED_UP if self.shares > 1 else 0.0)


def best(
    layout: Layout, rows: int, ns: tuple[int, ...], width: int, sms: int, over_x: bool = True
) -> tuple[Form, Cut] | None:
    """The form with which all ends first, and the product's cut; ``width``: of x, which it may go over as well."""
    m_tiles, n_tiles, tile = cdiv(rows, BLOCK_M.value), cdiv(width, BLOCK_N.value), TILE * sum(ns)

    def end(form: Form) -> tuple[float, Cut]:
        into = PIECES if tile >= LONG or form.x_blocks else ()
        if form.shares > 1:
            into = PIECES[:1] if layout.count == MOST else PIECES
        busy = form.busy(rows, width, layout, ns)
        least = LEAST_SHARED if form.shares > 1 else LEAST
        ends, cut = best_cut(busy, form.programs(ns), m_tiles * n_tiles, tile, sms, form.makers(layout), into, least)
        return ends + (0.0 if form.x_blocks else 2 * rows * width / AFTER), cut

    def with_lateness(form: Form) -> tuple[float, int]:
        programs, busy = form.programs(ns), form.busy(rows, width, layout, ns)
        late = lateness(m_tiles, n_tiles, tile, sms - programs, lambda tiles: busy * tiles / m_tiles)
        return finished(busy, programs, m_tiles * n_tiles, tile, sms) + late, programs

    def few(form: Form | None) -> bool:
        """Not more parts of du than pay; all programs must be there at once, beside another stream's as well."""
        return form is not None and sum(form.lanes(ns)) <= FEW[form.rank] and form.programs(ns) <= sms // 2

    forms = [form for blocks in ROW_TILE[16] if (form := Form.of(layout, blocks))]
    whole = list(filter(few, forms)) or [form for form in forms[-1:] if form.programs(ns) <= sms // 2]
    if not whole:
        return None
    found = min(whole, key=with_lateness)
    ends, cut = end(found)
    # two 16-bit parts of du for each tile: what more than these takes was slower
    tried = [(2, 2), (4, 2)] if layout.split else [(b, x) for b in sorted({2, 4, found.blocks}) for x in (2, 4)]
    bound = ends - X_LEAST
    for blocks, x_blocks in tried if over_x else ():
        form = Form.of(layout, blocks, x_blocks)
        if not few(form):
            continue
        sooner, its_cut = end(form)
        if sooner < bound:
            found, bound, cut = form, sooner, its_cut
    if found.x_blocks or not may_share(layout):
        return found, cut

    def by_work(form: Form) -> tuple[float, float]:
        """When all ends, then what the pass takes from what else runs."""
        return end(form)[0], form.busy(rows, width, layout, ns) * form.programs(ns)

    shared = [form._replace(shares=n) for form in whole for n in SHARES[form.rank] if n <= m_tiles]
    shared = min(filter(few, shared), key=by_work, default=found)
    sooner, its_cut = end(shared)
    return (shared, its_cut) if sooner <= ends else (found, cut)


def may_share(layout: Layout) -> bool:
    """Whether programs may share columns: with two 16-bit parts of du, or at small ranks of several layers, it was slower."""
    return not layout.split and (layout.count == 1 or layout.rank > X_RANK)


@lru_cache(KEPT)
def prepared(
    layout: Layout, rows: int, ns: tuple[int, ...], width: int, stride: int, scalings: tuple[float, ...], scaled: bool,
    over_x: bool, dtype: torch.dtype, adapters: torch.dtype, device: torch.device,
) -> Pass | None:  # fmt: skip
    """None where this kernel does not take the pass: ranks over 64, columns that the engine cannot copy.

    ``width``, ``stride``: of x; ``over_x``: it may make dA.
    """
    if layout.rank > MOST_RANK or dtype not in (torch.bfloat16, torch.float16) or any(n % 8 for n in (*ns, width)):
        return None
    if stride % 8 or not stride:
        return None
    if layout.split and layout.rank % 8:
        return None
    found = best(layout, rows, ns, width, sm_count(device), over_x)
    if found is None:
        return None
    form, cut = found
    lanes, parts = form.lanes(ns), 2 if layout.split else 1
    row_tiles = 2 * cdiv(rows, BLOCK_M.value)
    t_tile, b_tile = form.tiles()
    t_of = lambda j, part: Matrix(
        rows, layout.rank, layout.padded, (ROWS.value, form.rank), t_tile,
        j * rows * layout.padded + part * layout.rank,
    )  # fmt: skip
    ys = [Matrix(rows, n, n, (ROWS.value, COLS.value), Y_TILE.value) for n in ns]
    his, los = ([t_of(j, part) for j in range(layout.count)] for part in (0, parts - 1))
    total, du_stride = sum(lanes), layout.count * layout.padded
    x = Matrix(rows, width, stride, (ROWS.value, COLS.value), Y_TILE.value)
    du = Matrix(rows, du_stride, du_stride, (ROWS.value, form.rank), t_tile)
    slabs_at = total * row_tiles * ROWS.value * form.rank
    begins = [sum(lanes[:1]), sum(lanes[:2])]
    begins = [begin if j + 1 < layout.count else total for j, begin in enumerate(begins)]
    run = Prepared(
        "lora_linear backward (dy)",
        lora_dy_kernel,
        device,
        (form.programs(ns),),
        (
            *fill(scalings, 0.0),
            *fill(ns, 0),
            rows,
            row_tiles,
            width,
            layout.rank,
            layout.padded,
            du_stride,
            layout.count,
            form.stripes(width),
        )
        + (*begins, *fill(tuple(lanes), 0), total, form.shares, slabs_at),
        {"RANK": form.rank, "BLOCKS": form.blocks, "X_BLOCKS": form.x_blocks, "JOINT": layout.count, "PARTS": parts}
        | {"SCALED": scaled, "SHARED": form.shares > 1, "STAGES": form.stages, "T_STAGES": form.t_stages}
        | {"T_TILE": t_tile, "B_TILE": b_tile}
        | {"num_warps": 4, "maxnreg": 128, "launch_pdl": True},
        (*three(ys), *three(his), *three(los), x, du, *[None] * 10),
    )
    return Pass(
        run,
        slabs_at + form.slabs(ns),
        layout.count * row_tiles // 2 + (2 * total if form.shares > 1 else 0),
        cut.work(rows),
        cut,
        row_tiles // 2,
        form.x_blocks > 0,
    )


def of_adapters(
    plan: Pass, dys: list[Tensor], x: Tensor, t: Tensor, many_b: list[Tensor], scale: Tensor | None, layout: Layout, da: Tensor,
    db: Tensor, work: Tensor, arrived: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """du (M, count * padded) as parts, and what this pass still reads when the product beside it begins to write.

    Writes db, and da if ``plan.makes_da``. ``scale``: DoRA's (N of all,), of B's rows; ``work`` and ``arrived``: set to zero by
    the kernel before this one.
    """
    part = t.new_empty(plan.parts, dtype=torch.float32)
    du = layout.buffer(t, dys[0].shape[0], layout.count * layout.padded)
    plan.run(
        *three(dys),
        *three([t]),
        *three([t]),
        x,
        du,
        *three(many_b),
        part if scale is None else scale,
        part,
        du,
        db,
        da,
        work,
        arrived,
    )
    return du, part
