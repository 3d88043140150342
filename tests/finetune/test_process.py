"""Signals, the watch, the group of one process."""

import os
import signal
import subprocess
import sys
import time

import faults
import pytest
import torch.distributed as dist
from pool import RankFailed, run

from m3kernels.models.finetune.process import StopSignals, Watch, process_group

HANG = """
import time, sys
from pathlib import Path
from m3kernels.models.finetune.process import Watch

def stuck_in_a_collective():
    time.sleep(60)

with Watch(0.5, Path(sys.argv[1]), rank=3) as watch:
    for _ in range(4):
        time.sleep(0.2)
        watch.beat("step 7, a.jsonl:1")
    stuck_in_a_collective()
"""


def test_a_hang_ends_with_a_stack(tmp_path):
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANG, str(tmp_path / "stack")], capture_output=True, text=True)
    assert ended.returncode == 1 and time.monotonic() - began < 40
    written = (tmp_path / "stack").read_text()
    assert "rank 3, in step 7, a.jsonl:1" in written and "stuck_in_a_collective" in written
    assert "stuck_in_a_collective" in ended.stderr and "train.timeout_minutes" in ended.stderr


def test_a_watch_that_is_left_ends_nothing(tmp_path):
    with Watch(0.2, tmp_path / "stack", rank=0) as watch:
        watch.beat("x")
    time.sleep(0.6)
    assert not (tmp_path / "stack").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_wishes_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert signals.received == number.name
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one ends it
    assert signal.getsignal(number) is before
    assert f"{number.name}: saving, then exiting" in capfd.readouterr().err


@pytest.mark.parametrize(
    "first, second, repeated_s",
    [(signal.SIGTERM, signal.SIGTERM, 0), (signal.SIGINT, signal.SIGINT, 5), (signal.SIGTERM, signal.SIGINT, 5)],
)
def test_a_second_signal_ends_at_once(first, second, repeated_s):
    with pytest.raises(RankFailed, match=f"exit code -{second.value}"):
        run(1, faults.signalled, first, second, repeated_s)


def test_a_sigterm_that_two_launchers_pass_on_is_one():
    assert run(1, faults.signalled, signal.SIGTERM, signal.SIGTERM, 5) == ["SIGTERM"]


def test_a_group_of_one_process_and_one_that_is_there():
    with process_group(1.0) as process:
        assert (process.rank, process.size, process.first, dist.get_world_size()) == (0, 1, True, 1)
        with process_group(1.0) as inner:
            assert inner == process
        assert dist.is_initialized()
    assert not dist.is_initialized()
