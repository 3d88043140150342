"""Batches made by workers: the same as without, in order, and an end that names the step."""

import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from data_fakes import FakeEncoder, FakeSource, FakeStream, ids_of

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.loader import step_batches
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.run import collecting_garbage_together

LENGTHS = [3 + (7 * i) % 23 for i in range(50)]


@pytest.fixture(autouse=True)
def others():
    """Processes that are not a loader's: the pool of the distributed tests keeps its own."""
    OTHERS.clear()
    OTHERS.update(child.pid for child in multiprocessing.active_children())


OTHERS: set[int] = set()


def own_children() -> list:
    return [child for child in multiprocessing.active_children() if child.pid not in OTHERS]


def make_plan(source=None, **options) -> Plan:
    options = {"seed": 5, "global_batch_size": 8, "seq_length": 32, **options}
    return Plan(source or FakeSource(LENGTHS, images=set(range(0, 50, 2))), FakeEncoder(), **options)


def told(batch) -> tuple:
    pixels = [micro.pixel_values.sum().item() if micro.pixel_values is not None else 0 for micro in batch.micro_batches]
    return batch.step, ids_of(batch), batch.supervised, pixels, [micro.labels.tolist() for micro in batch.micro_batches]


class Broken(Plan):
    """Fails at step 3 in the way of its class."""

    def batch(self, step, rank, ranks):
        if step == 3:
            self.fail()
        return super().batch(step, rank, ranks)

    def __init__(self, fail):
        super().__init__(FakeSource(LENGTHS), FakeEncoder(), seed=5, global_batch_size=8, seq_length=32)
        self.fail = fail


def raise_ours():
    raise FinetuneError("the file is gone")


def raise_other():
    # one that cannot be pickled
    error = KeyError("column")
    error.held = lambda: None
    raise error


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def get_signals():
    # what Ctrl-C or a scheduler sends to the whole group is for the rank alone
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone = [told(b) for b in step_batches(make_plan(), 2, 9, rank=1, ranks=2, num_workers=0)]
    assert [step for step, *_ in alone] == list(range(2, 9))
    assert [told(b) for b in step_batches(make_plan(), 2, 9, rank=1, ranks=2, num_workers=workers)] == alone
    assert not own_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_later_gives_the_same_batches(workers):
    whole = [told(b) for b in step_batches(make_plan(), 0, 8, rank=0, ranks=2, num_workers=workers)]
    rest = [told(b) for b in step_batches(make_plan(), 5, 8, rank=0, ranks=2, num_workers=workers)]
    assert rest == whole[5:]
    assert list(step_batches(make_plan(), 8, 8, rank=0, ranks=2, num_workers=workers)) == []


def test_the_generator_of_dropout_is_left_alone():
    states = []
    for workers in (0, 2):
        torch.manual_seed(3)
        list(step_batches(make_plan(), 0, 3, rank=0, ranks=1, num_workers=workers))
        states.append(torch.get_rng_state())
    torch.manual_seed(3)
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_names_the_step(workers):
    for fail, kind, message in (
        (raise_ours, FinetuneError, "^the data of step 3: the file is gone$"),
        (raise_other, RuntimeError, "(?s)^the data of step 3:.*in raise_other.*KeyError: 'column'"),
    ):
        batches = step_batches(Broken(fail), 0, 6, rank=0, ranks=1, num_workers=workers)
        assert [next(batches).step for _ in range(3)] == [0, 1, 2]
        with pytest.raises(kind, match=message):
            next(batches)
    assert not own_children()


def test_the_death_of_a_worker_names_the_step():
    batches = step_batches(Broken(die), 0, 6, rank=0, ranks=1, num_workers=1, prefetch=1)
    with pytest.raises(FinetuneError, match=r"the data of step [123]: a worker process died \(.*\).*num_workers"):
        list(batches)


def test_a_signal_to_the_whole_group_leaves_workers_at_work():
    steps = [batch.step for batch in step_batches(Broken(get_signals), 0, 6, rank=0, ranks=1, num_workers=2)]
    assert steps == list(range(6))


def test_hundreds_of_forwards_a_step_need_few_open_files():
    """A file for each tensor would be over 1,500 in two batches; the worker would then hang, not fail."""
    plan = make_plan(
        FakeSource([4] * 300, images=set(range(300))), pack=False, global_batch_size=256, micro_batch_size=1
    )
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        batches = list(step_batches(plan, 0, 3, rank=0, ranks=1, num_workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(batch.micro_batches) for batch in batches] == [256] * 3
    assert told(batches[2]) == told(plan.batch(2, 0, 1))


def test_too_little_shared_memory_names_the_step(monkeypatch):
    def full(tensor):
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(FinetuneError, match=r"the data of step 0: .* MiB of shared memory .*--shm-size"):
        next(step_batches(make_plan(), 0, 3, rank=0, ranks=1, num_workers=1))
    assert next(step_batches(make_plan(), 0, 3, rank=0, ranks=1, num_workers=0)).step == 0


def test_closing_ends_the_workers():
    batches = step_batches(make_plan(), 0, 10**6, rank=0, ranks=1, num_workers=2)
    next(batches)
    assert len(own_children()) == 2
    began = time.monotonic()
    batches.close()
    assert not own_children() and time.monotonic() - began < 5


ORPHANS = """
import multiprocessing, os, signal, sys
sys.path[:0] = {path!r}
from test_loader import make_plan, step_batches
batches = step_batches(make_plan(), 0, 10**6, rank=0, ranks=1, num_workers=2)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_rank_end_too():
    code = ORPHANS.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=300)
    children = [int(pid) for pid in ran.stdout.split()]
    assert ran.returncode == -signal.SIGKILL and len(children) == 2
    deadline = time.monotonic() + 20
    while alive := [pid for pid in children if Path(f"/proc/{pid}/cmdline").is_file()]:
        assert time.monotonic() < deadline, f"workers {alive} are still there"
        time.sleep(0.2)


def test_a_stream_is_read_by_one_worker_in_order():
    def stream():
        return make_plan(FakeStream(FakeSource(LENGTHS)))

    alone = [told(b) for b in step_batches(stream(), 1, 5, rank=0, ranks=1, num_workers=0)]
    assert [told(b) for b in step_batches(stream(), 1, 5, rank=0, ranks=1, num_workers=4)] == alone
    batches = step_batches(stream(), 0, 5, rank=0, ranks=1, num_workers=4)
    next(batches)
    assert len(own_children()) == 1
    batches.close()


def test_a_plan_can_be_sent_to_a_worker():
    """Where processes are not forked, as by default from Python 3.14 on."""
    for source in (None, FakeStream(FakeSource(LENGTHS))):
        plan = make_plan(source)
        plan.batch(0, 0, 1)
        assert told(pickle.loads(pickle.dumps(plan)).batch(2, 0, 1)) == told(plan.batch(2, 0, 1))


class WantsGarbageCollected(FakeSource):
    def __getitem__(self, i: int) -> dict:
        assert gc.isenabled()
        return super().__getitem__(i)


def test_workers_collect_garbage_where_their_rank_does_not():
    batches = step_batches(make_plan(WantsGarbageCollected(LENGTHS)), 0, 2, rank=0, ranks=1, num_workers=1)
    with collecting_garbage_together():
        assert not gc.isenabled() and len(list(batches)) == 2
    assert gc.isenabled() and not gc.get_freeze_count()


def test_evaluation_by_workers():
    wanted = [told(b) for b in make_plan(shuffle=False).eval_batches(99, 1, 2)]
    assert len(wanted) == 7
    assert [told(b) for b in make_plan(shuffle=False).eval_batches(99, 1, 2, num_workers=2)] == wanted
