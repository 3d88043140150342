"""``pytest bench/``: the op benchmark under pytest-benchmark, its GPU played by the CPU's clock."""

import contextlib

import pytest
import torch

from m3kernels.bench import measure, peers
from m3kernels.bench.spec import Case

under_pytest = pytest.importorskip("m3kernels.bench.test_ops", reason="needs pytest-benchmark")
CASE = Case("swiglu", "8x16", {"rows": 8, "width": 16})


class CpuGpu:
    def __init__(self, device):
        self.device, self.stream, self.flushed = torch.device("cpu"), None, 0

    def peak_bytes(self, trial):
        trial.run()
        return 7

    def flush_l2(self):
        self.flushed += 1


class Benchmark:
    """What pytest-benchmark's fixture is asked for."""

    def pedantic(self, run, setup, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            setup()
            run()
        self.rounds = rounds


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(measure, "Gpu", CpuGpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    under_pytest.prepared.cache_clear()


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_a_peer_is_checked_then_timed(on_cpu, direction):
    benchmark = Benchmark()
    under_pytest.test_op(benchmark, CASE, direction, peers.OURS)
    assert benchmark.rounds >= 10 and benchmark.group == f"swiglu 8x16 {direction}"
    passes = {"forward": 3, "backward": 5, "forward+backward": 8}[direction]
    assert benchmark.extra_info == {"peak_bytes": 7, "bytes": 2 * 8 * 16 * passes, "flops": 0}


def test_a_wrong_peer_fails_and_a_missing_one_skips(on_cpu, monkeypatch):
    def absent(shape, given):
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    monkeypatch.setitem(peers.PEERS["swiglu"], "liger", absent)
    with pytest.raises(pytest.skip.Exception, match="liger_kernel"):
        under_pytest.test_op(Benchmark(), CASE, "forward", "liger")
    monkeypatch.setitem(peers.PEERS["swiglu"], "liger", lambda shape, given: lambda t: (t["gate"] * t["up"],))
    with pytest.raises(pytest.fail.Exception, match="WRONG"):
        under_pytest.test_op(Benchmark(), CASE, "forward", "liger")


def test_every_peer_of_every_case_is_a_test():
    assert len(under_pytest.ROWS) == len(set((c.op, c.label, d, p) for c, d, p in under_pytest.ROWS)) > 100


def test_tests_are_chosen_by_op():
    """``-k rms_norm``, as the file's docstring says."""
    mark = next(m for m in under_pytest.test_op.pytestmark if m.name == "parametrize")
    assert {mark.kwargs["ids"](case).split()[0] for case, _, _ in under_pytest.ROWS} == set(under_pytest.OPS)
