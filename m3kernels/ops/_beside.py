"""Two kernels on one GPU at once, for Hopper (sm_90a), in Gluon: a few programs stream, the product has the rest.

A pass over a large operand waits for memory, the product for its tensor cores. One multiprocessor draws up to a twentieth of
what the memory gives: a dozen of them make t = x A^T while the others multiply, and multiply after that. The product takes its
tiles from a counter, whenever a multiprocessor comes free, and waits for the rows of t that a tile adds at its end.

Whole tiles seldom come out even: the last of them are cut into pieces of their sums, so that all multiprocessors end
together. Each piece leaves its share in fp32; as soon as all have, each adds up some of the columns, in the order of the pieces.

``p_work``: int32, set to zero by a kernel before both: the next unit (a tile or a piece), then for every tile of rows how many
of its makers have written theirs, then for each warpgroup of every tile in pieces how many it has.
"""

from collections.abc import Callable
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from m3kernels.ops._common import cdiv

READY = gl.constexpr(1)
TOLD = gl.constexpr(2)  # tiles that the loader may be ahead
BLOCK_M = gl.constexpr(128)  # rows of a tile
TOGETHER = gl.constexpr(16)  # tiles of rows side by side, which share what they read of b in the cache


@gluon.jit
def _fence_for_copies():
    """Orders this thread's reads and writes of global memory with those of the copy engine."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def rows_written(p_ready):
    """Counts a warpgroup's stores among a tile's of rows."""
    _fence_for_copies()
    gl.thread_barrier()
    gl.atomic_add(p_ready, 1, sem="release", scope="gpu")


@gluon.jit
def await_count(p_count, count):
    while gl.atomic_add(p_count, 0, sem="acquire", scope="gpu") < count:
        pass


@gluon.jit
def await_rows(p_ready, makers):
    """Returns when all makers of a tile of rows have written it; for the copy engine's reads, too."""
    await_count(p_ready, makers)
    _fence_for_copies()


@gluon.jit
def await_all(p_ready, tiles, makers):
    """:func:`await_rows` of all tiles, in one warp."""
    o = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for first in range(0, tiles, 32):
        missing = 1
        while missing > 0:
            ready = gl.load(p_ready + first + o, mask=first + o < tiles, other=makers, volatile=True)
            missing = gl.max(makers - ready, 0)
    gl.inline_asm_elementwise("fence.acq_rel.gpu; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    _fence_for_copies()


@gluon.jit
def new_queue():
    """Where the loader tells the warpgroups which tile is next."""
    s_tile = gl.allocate_shared_memory(gl.int32, [TOLD, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [TOLD, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [TOLD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(TOLD):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return s_tile, full, empty


@gluon.jit
def unit_of(index, whole, pieces, steps):
    """(tile, its piece, the piece's first step of ``steps``, the one after its last); a whole tile is one piece."""
    beyond = gl.maximum(index - whole, 0)
    many = gl.where(index < whole, 1, pieces)
    piece = beyond % many
    return gl.minimum(index, whole) + beyond // many, piece, piece * steps // many, (piece + 1) * steps // many


@gluon.jit
def share_offsets(rows: gl.constexpr, cols: gl.constexpr, layout: gl.constexpr):
    """Where numbers of a share lie: 8 x 8 side by side, as a warp holds them, so that it reads and writes whole lines.

    64 rows lie behind the 64 before them, and of those, 8 columns behind the 8 before.
    """
    o_m, o_n = gl.arange(0, rows, gl.SliceLayout(1, layout)), gl.arange(0, cols, gl.SliceLayout(0, layout))
    o_rows = o_m // 64 * (64 * cols) + o_m // 16 % 4 * 64 + o_m // 8 % 2 * 256 + o_m % 8 * 8
    return o_rows[:, None] + (o_n // 8 * 512 + o_n % 8)[None, :]


@gluon.jit
def next_tile(p_work):
    return gl.atomic_add(p_work, 1, sem="relaxed", scope="gpu")


@gluon.jit
def told(index, queue, taken):
    s_tile, full, empty = queue
    slot = taken % TOLD
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty.index(slot), (taken // TOLD & 1) ^ 1)
    s_tile.index(slot).store(gl.full([32], 0, gl.int32, layout) + index)
    gl.thread_barrier()
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def took(queue, taken):
    s_tile, full, empty = queue
    slot = taken % TOLD
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(slot), taken // TOLD & 1)
    index = gl.max(s_tile.index(slot).load(layout), 0)
    gl.thread_barrier()
    mbarrier.arrive(empty.index(slot), count=1)
    return index


class Cut(NamedTuple):
    """A product beside a pass: ``whole`` tiles, then ``cut`` ones in ``pieces`` each; ``makers`` of a tile of rows."""

    makers: int
    whole: int
    cut: int
    pieces: int

    def units(self) -> int:
        return self.whole + self.cut * self.pieces

    def work(self, rows: int) -> int:
        """Numbers of ``p_work``."""
        return READY.value + cdiv(rows, BLOCK_M.value) + 2 * self.cut


# of one multiprocessor and of all, bytes a microsecond; measured: docs/adapters.md
ONE, ALL = 90e3, 2.4e6
# microseconds of a product's tile for each column of its left operand
TILE = 0.0108
# what a pass may be slower than its model before the product waits for it
MARGIN = 1.1
# into how many pieces a tile may be cut; microseconds that each takes longer (5 to 9 as stamped, and more beside the kernel that
# makes dA), and what the way of all through the cache costs for each; measured, too
PIECES, HANDED, PASSED = (2, 4), 10.0, 0.15
# what a cut must gain, a fortieth at least, and where several programs share columns: such a pass is nearer to its model
LEAST, LEAST_SHARED = 10.0, 4.0


def finished(busy: float, programs: int, tiles: int, tile: float, sms: int) -> float:
    """When a product of whole ``tiles`` ends if ``programs`` multiprocessors come to it at ``busy`` and the others at once."""
    others, wave = sms - programs, cdiv(tiles, sms)
    while True:
        # moments at which a tile may end, in order
        for moment in sorted((wave * tile, busy + max(0, wave - int(busy / tile) - 1) * tile)):
            late = int(max(0.0, moment - busy) / tile + 1e-6)
            if moment >= busy and others * int(moment / tile + 1e-6) + programs * late >= tiles:
                return moment
        wave += 1


def finished_in_pieces(busy: float, programs: int, tiles: int, tile: float, sms: int, pieces: int) -> tuple[float, int]:
    """(When :func:`finished` if what whole waves leave over is cut into ``pieces``, how many tiles are not cut)."""
    # a multiprocessor that streamed may begin a last whole tile where it ends half of one after the others, or not
    return min(_in_pieces(busy, programs, tiles, tile, sms, pieces, after) for after in (0.0, 0.5))


def _in_pieces(busy, programs, tiles, tile, sms, pieces, after) -> tuple[float, int]:
    """The same where those that streamed end up to ``after`` tiles later."""
    others, whole, wave, late = sms - programs, 0, 0, 0
    while True:
        more = max(0, int(wave + 1 + after - busy / tile + 1e-6))
        if others * (wave + 1) + programs * more > tiles:
            break
        wave, late = wave + 1, more
    whole, piece = others * wave + programs * late, tile / pieces + HANDED
    left, free = (tiles - whole) * pieces, ((others, wave * tile), (programs, busy + late * tile))
    done = lambda moment: sum(many * max(0, int((moment - at) / piece + 1e-6)) for many, at in free)
    moments = sorted(at + n * piece for _, at in free for n in range(cdiv(left, others) + 1))
    end = next(moment for moment in moments if done(moment) >= left)
    return max(end, free[0][1], free[1][1]) + PASSED * left, whole


def best_cut(
    busy: float, programs: int, tiles: int, tile: float, sms: int, makers: int, into: tuple[int, ...] = PIECES,
    least: float = LEAST,
) -> tuple[float, Cut]:  # fmt: skip
    """When the product ends if it is cut as is best, and that cut; ``into``: as many pieces as any of these, or none."""
    uncut = finished(busy, programs, tiles, tile, sms)
    found = uncut, Cut(makers, tiles, 0, 1)
    for pieces in into:
        end, whole = finished_in_pieces(busy, programs, tiles, tile, sms, pieces)
        if whole < tiles and end < min(found[0], uncut - max(least, uncut / 40)):
            found = end, Cut(makers, whole, tiles - whole, pieces)
    return found


def lateness(units: int, n_tiles: int, tile: float, others: int, end: Callable[[int], float]) -> float:
    """How long the product would wait for the rows that it takes side by side; ``end``: of the first so many tiles of rows."""
    groups = range(0, units, TOGETHER.value)
    return max(0.0, *(end(min(units, m + TOGETHER.value)) - (m * n_tiles // others + 1) * tile for m in groups))


def streams(units: int, unit_bytes: int, rate: float, n_tiles: int, width: int, sms: int) -> int:
    """How many programs share ``units`` (tiles of rows), beside a product of ``n_tiles`` for each of those, ``width`` long.

    ``rate``: bytes a microsecond of one program. Cutting that product's tiles gains nothing: they are short.
    """
    tile = TILE * width

    def end(programs: int) -> tuple[float, int]:
        unit = MARGIN * unit_bytes / min(rate, ALL / programs)
        late = lateness(units, n_tiles, tile, sms - programs, lambda tiles: cdiv(tiles, programs) * unit)
        return finished(cdiv(units, programs) * unit, programs, units * n_tiles, tile, sms) + late, programs

    return min(map(end, range(1, min(units, sms // 2) + 1)))[1]
