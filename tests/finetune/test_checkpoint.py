"""Checkpoints are whole or not there, at any layout, whatever dies meanwhile."""

import checkpoint_jobs as jobs
import pytest
import torch
from pool import run

from m3kernels.models.finetune.checkpoint import complete


def same(found: dict, value: float) -> bool:
    rows = torch.arange(24.0).view(8, 3) + value
    return torch.equal(found["weights.a"], rows) and torch.equal(found["exp_avg.b"], torch.full((5,), value))


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("saved, loaded", [(1, 1), (2, 2), (2, 1), (1, 4)])
def test_round_trip_at_any_number_of_ranks(tmp_path, saved, loaded, async_save):
    drawn = run(saved, jobs.save, str(tmp_path), 5, 7.0, async_save)
    for rank, (step, found, restored, numbers) in enumerate(run(loaded, jobs.load, str(tmp_path))):
        assert step == 5 and same(found, 7.0)
        assert restored == (saved == loaded)
        if restored:
            assert numbers == drawn[rank]


def test_incomplete_ones_are_passed_over(tmp_path):
    run(1, jobs.save, str(tmp_path), 5, 5.0)
    for name in ("step-000009", "step-000008.tmp", "step-x", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step-000009" / ".metadata").write_bytes(b"")  # without run.json its writer died
    assert list(complete(tmp_path)) == [5]
    assert run(1, jobs.load, str(tmp_path))[0][0] == 5
    run(1, jobs.save, str(tmp_path), 8, 8.0)
    assert list(complete(tmp_path)) == [5, 8]


def test_a_checkpoint_that_stands_there_is_left_alone(tmp_path):
    run(1, jobs.save, str(tmp_path), 5, 5.0)
    run(1, jobs.save, str(tmp_path), 5, 6.0)
    assert same(run(1, jobs.load, str(tmp_path))[0][1], 5.0)


@pytest.mark.parametrize("how", ["little room", "one rank", "files end"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_one_before(tmp_path, how, ranks):
    for said, there, read in run(ranks, jobs.failing, str(tmp_path), how):
        assert "checkpoint of step 2" in said and "the one before it is whole" in said
        if how == "little room":
            assert "GiB are needed" in said
        if how == "one rank":
            assert f"rank {ranks - 1}: OSError: [Errno 28] No space left on device" in said
        assert "step-000002" not in there and same(read, 1.0)
    assert list(complete(tmp_path)) == [1, 3] and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_written_meanwhile_is_a_copy(tmp_path, ranks):
    for early, found in run(ranks, jobs.overwritten_while_writing, str(tmp_path)):
        assert not early and same(found, 1.0)


@pytest.mark.parametrize(
    "keep, best, left",
    [(2, 0, [4, 5]), (2, 2, [2, 4, 5]), (1, 5, [5]), (0, 0, [1, 2, 3, 4, 5]), (9, 0, [1, 2, 3, 4, 5])],
)
def test_retention(tmp_path, keep, best, left):
    (tmp_path / "step-000000.tmp").mkdir()
    assert run(1, jobs.retention, str(tmp_path), keep, best, [1, 2, 3, 4, 5]) == [left]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:06}" for step in left]


def test_incomplete_ones_do_not_count_as_kept(tmp_path):
    for step in (7, 8, 9):
        (tmp_path / f"step-{step:06}").mkdir()
    assert run(1, jobs.retention, str(tmp_path), 2, 0, [1, 2, 3]) == [[2, 3]]


def test_other_parameters_are_refused(tmp_path):
    run(1, jobs.save, str(tmp_path), 5, 5.0)
    (said,) = run(1, jobs.load_other, str(tmp_path))
    assert "holds other parameters" in said and "exp_avg.b" in said and "weights.c" in said
