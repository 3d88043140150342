"""How many programs stream beside a product: the model, on any machine whose Triton has Gluon for Hopper."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from m3kernels.ops import _beside as beside  # noqa: E402
from m3kernels.ops import _lora_dy_launch as dy_pass  # noqa: E402
from m3kernels.ops._lora_dy_sums import MOST_SHARES  # noqa: E402
from m3kernels.ops._lora_launch import Layout  # noqa: E402

SMS = 132


def simulated(busy, programs, lengths):
    """The counter's own order: each multiprocessor takes the next tile or piece when it is free."""
    free = [busy] * programs + [0.0] * (SMS - programs)
    for length in lengths:
        first = min(range(SMS), key=free.__getitem__)
        free[first] += length
    return max(free)


@pytest.mark.parametrize("tiles", [132, 384, 512, 768, 1001])
@pytest.mark.parametrize(("busy", "programs"), [(10.0, 4), (33.0, 12), (50.0, 16), (95.0, 7), (400.0, 3)])
def test_the_end_is_that_of_a_counter(tiles, busy, programs):
    assert beside.finished(busy, programs, tiles, 33.0, SMS) == pytest.approx(simulated(busy, programs, [33.0] * tiles))


@pytest.mark.parametrize("pieces", beside.PIECES)
@pytest.mark.parametrize("tiles", [131, 132, 384, 512, 768, 1001])
@pytest.mark.parametrize(("busy", "programs"), [(10.0, 4), (33.0, 12), (211.0, 36), (95.0, 7), (700.0, 3)])
def test_pieces_end_as_the_counter_has_them(tiles, busy, programs, pieces):
    """Whole tiles, then pieces, by a counter: the model is off by less than a piece, beside what pieces cost."""
    tile = 70.0
    end, whole = beside.finished_in_pieces(busy, programs, tiles, tile, SMS, pieces)
    piece, left = tile / pieces + beside.HANDED, (tiles - whole) * pieces
    last = simulated(busy, programs, [tile] * whole + [piece] * left)
    assert end - beside.PASSED * left == pytest.approx(last, abs=piece)


def test_rows_that_come_late_cost_what_the_product_waits():
    # 16 tiles of rows are taken at once; the first are wanted when the first tile ends
    end = lambda tiles: 10.0 * tiles
    assert beside.lateness(16, 8, 33.0, 128, end) == 160.0 - 33.0
    # the second sixteen, after 16 x 8 tiles: in the second wave
    assert beside.lateness(32, 8, 33.0, 128, lambda tiles: 2.0 * tiles) == 0.0
    assert beside.lateness(32, 8, 33.0, 128, lambda tiles: 0.0 if tiles <= 16 else 100.0) == 100.0 - 66.0


@pytest.mark.parametrize("tokens", [1, 300, 4096, 8192, 100_000])
@pytest.mark.parametrize(
    ("ns", "width"), [((3072,), 4096), ((4096, 1024, 1024), 3072), ((14336, 14336), 4096), ((8,), 64)]
)
def test_programs_never_fill_the_gpu(tokens, ns, width):
    """All of a pass must be there at once, whatever another stream runs: at most half of the multiprocessors."""
    units = -(-tokens // 128)
    n_tiles = sum(-(-n // 256) for n in ns)
    programs = beside.streams(units, 256 * width, beside.ONE, n_tiles, width, SMS)
    assert 1 <= programs <= min(units, SMS // 2)
    for rank, dtype in ((16, torch.bfloat16), (64, torch.bfloat16), (16, torch.float32)):
        layout = Layout.of(torch.empty(1, 8, dtype=torch.bfloat16), torch.empty(rank, 8, dtype=dtype), len(ns))
        form, cut = dy_pass.best(layout, tokens, ns, width, SMS)
        assert form.shares <= MOST_SHARES.value
        assert form.programs(ns) <= SMS // 2 and cut.whole + cut.cut == units * -(-width // 256)
        # a piece without a step would release memory that nothing has loaded
        assert cut.pieces <= -(-sum(ns) // 64)


def test_a_pass_that_needs_more_programs_is_not_taken():
    layout = Layout.of(torch.empty(1, 8, dtype=torch.bfloat16), torch.empty(64, 8, dtype=torch.bfloat16), 1)
    assert dy_pass.best(layout, 4096, (40_000,), 4096, SMS) is None
    assert dy_pass.best(layout, 4096, (32_768,), 4096, SMS) is not None


def test_a_cut_must_gain_more_than_the_model_knows():
    """24 tiles of 199 us are left over: four pieces of each end 127 us sooner. 32 of 33 us would gain nothing."""
    end, cut = beside.best_cut(179.0, 36, 384, 199.0, SMS, 4)
    assert cut == beside.Cut(4, 360, 24, 4) and end < beside.finished(179.0, 36, 384, 199.0, SMS) - 100
    assert cut.units() == 360 + 96 and cut.work(4096) == 1 + 32 + 48
    assert beside.best_cut(154.0, 12, 512, 33.0, SMS, 2)[1] == beside.Cut(2, 512, 0, 1)
    # eight of 30 us gain 5: enough where the model is known to be that near
    assert beside.best_cut(27.0, 24, 512, 30.0, SMS, 2)[1] == beside.Cut(2, 512, 0, 1)
    assert beside.best_cut(27.0, 24, 512, 30.0, SMS, 2, least=4.0)[1] == beside.Cut(2, 504, 8, 4)


@pytest.mark.parametrize(
    ("width", "ns", "rank", "dtype", "form"),
    [
        # of docs/adapters.md: what was fastest of the forms that were measured, or within 2 % of it
        (4096, (3072,), 16, torch.bfloat16, (12, 0, 4)),
        (9216, (3072,), 16, torch.bfloat16, (4, 4, 1)),
        (3072, (4096, 1024, 1024), 16, torch.bfloat16, (4, 0, 1)),
        (3072, (9216, 9216), 16, torch.bfloat16, (12, 0, 1)),
        (4096, (4096, 1024, 1024), 16, torch.bfloat16, (4, 0, 1)),
        (4096, (4096,), 16, torch.bfloat16, (16, 0, 4)),
        (4096, (14336, 14336), 16, torch.bfloat16, (16, 2, 1)),
        (4096, (3072,), 16, torch.float32, (2, 2, 1)),
        (3072, (4096, 1024, 1024), 16, torch.float32, (4, 2, 1)),
        (4096, (3072,), 64, torch.bfloat16, (4, 0, 4)),
        (3072, (4096, 1024, 1024), 64, torch.bfloat16, (4, 0, 3)),
        (3072, (9216, 9216), 64, torch.bfloat16, (4, 0, 1)),
        (9216, (3072,), 64, torch.bfloat16, (4, 0, 2)),
        (4096, (4096,), 64, torch.bfloat16, (4, 0, 3)),
    ],
)
def test_forms_are_those_that_were_measured(width, ns, rank, dtype, form):
    layout = Layout.of(torch.empty(1, 8, dtype=torch.bfloat16), torch.empty(rank, 8, dtype=dtype), len(ns))
    found, _ = dy_pass.best(layout, 4096, ns, width, SMS)
    assert (found.blocks, found.x_blocks, found.shares) == form
    # with dropout x is not what dA is made of
    assert dy_pass.best(layout, 4096, ns, width, SMS, over_x=False)[0].x_blocks == 0
