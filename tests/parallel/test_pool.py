"""The harness itself: order, failures with their tracebacks, hangs, deaths, and that workers are kept."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import RankFailed, run


def place(scale):
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank() * scale, int(total), os.getpid()


def fails_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} has its reasons")
    dist.barrier()


def hangs():
    if dist.get_rank() == 1:
        time.sleep(60)


def dies():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def crashes(marks: str, times: int):
    """In native code, so many times."""
    folder = Path(marks)
    if dist.get_rank() == 1 and len(list(folder.iterdir())) < times:
        (folder / f"{os.getpid()}").touch()
        os.abort()
    dist.barrier()
    return len(list(folder.iterdir()))


def raises_unpicklable():
    class Local(Exception):
        pass

    raise Local("only here")


def threads():
    return torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_the_order_of_ranks(world_size):
    results = run(world_size, place, 10)
    assert [r[0] for r in results] == [10 * rank for rank in range(world_size)]
    assert {r[1] for r in results} == {world_size * (world_size + 1) // 2}
    assert len({r[2] for r in results} | {os.getpid()}) == world_size + 1


def test_workers_are_kept():
    first, second = run(2, place, 1), run(2, place, 1)
    assert [r[2] for r in first] == [r[2] for r in second]
    assert run(2, threads) == [1, 1]


def test_a_failure_is_the_rank_s_own_with_its_traceback():
    with pytest.raises(ValueError, match="rank 1 has its reasons") as caught:
        run(2, fails_on, 1)
    assert "in fails_on" in str(caught.value.__cause__) and "rank 1 of 2" in str(caught.value.__cause__)
    assert run(2, place, 10)[1][0] == 10


def test_an_exception_that_cannot_travel_comes_as_text():
    with pytest.raises(RankFailed, match="only here"):
        run(1, raises_unpicklable)


def test_a_hang_ends_and_shows_where():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"hangs: ranks \[1\] of 2 were not done(.|\n)*in hangs"):
        run(2, hangs, timeout_s=1.0)
    assert time.monotonic() - start < 20
    assert run(2, place, 10)[1][0] == 10


def test_a_native_crash_is_warned_of_and_tried_once_more(tmp_path):
    with pytest.warns(UserWarning, match="crashes runs once more: rank 1: the process ended with exit code -6"):
        assert run(2, crashes, str(tmp_path), 1) == [1, 1]
    for mark in tmp_path.iterdir():
        mark.unlink()
    with pytest.warns(UserWarning), pytest.raises(RankFailed, match="exit code -6"):
        run(2, crashes, str(tmp_path), 2)


def test_a_death_is_told():
    with pytest.raises(RankFailed, match="exit code 7"):
        run(2, dies)
    assert run(2, place, 10)[1][0] == 10
