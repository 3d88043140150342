"""The op benchmark for people who use pytest-benchmark.

    pytest bench/ --benchmark-group-by=group --benchmark-json=out.json [-k "rms_norm and backward"]

One test a (case, direction, peer), checked against fp64 before it is timed, from Python with a cold L2. It skips without a
GPU and for peers that are not installed. ``m3kernels bench ops`` also has device times, memory and interleaved peers.
"""

from functools import lru_cache

import pytest
import torch

from m3kernels.bench import gate, measure, ops, peers
from m3kernels.bench.cases import CASES, OPS
from m3kernels.bench.spec import Case

pytest.importorskip("pytest_benchmark", reason="pip install 'm3kernels[bench]'")
ROWS = [(c, d, p) for c in CASES for d in OPS[c.op].directions for p in peers.ORDER if p in peers.PEERS[c.op]]


@lru_cache(maxsize=1)  # tests come case by case; one case's fp64 answers are gigabytes
def prepared(case: Case, device: torch.device) -> tuple[ops.Data, ops.Contender]:
    data = ops.make_data(case, device)
    return data, ops.enter("eager", peers.PEERS[case.op]["eager"], case, data)


def contender(case: Case, direction: str, peer: str, device: torch.device) -> ops.Contender:
    """The peer, checked; skips the test where it is missing and fails it where it is wrong."""
    data, eager = prepared(case, device)
    me = eager if peer == "eager" else ops.enter(peer, peers.PEERS[case.op][peer], case, data)
    verdict = ops.verdict(me, eager, direction, OPS[case.op])
    if verdict.status == "missing":
        pytest.skip(verdict.reason)
    if verdict.status not in (gate.OK, gate.IMPRECISE):
        pytest.fail(f"{verdict.status}: {verdict.reason}")
    return me


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("case", "direction", "peer"), ROWS, ids=lambda v: f"{v.op} {v.label}" if isinstance(v, Case) else v
)
def test_op(benchmark, case, direction, peer):
    gpu = measure.Gpu(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(gpu.stream):
        me = contender(case, direction, peer, gpu.device)
        trial = ops.trial(me, case, direction)
        benchmark.group = f"{case.op} {case.label} {direction}"
        benchmark.extra_info = {"peak_bytes": gpu.peak_bytes(trial)}
        cost = OPS[case.op].cost(case.shape, direction)
        benchmark.extra_info |= {"bytes": cost.bytes, "flops": cost.flops}

        def setup() -> None:
            trial.prepare()
            gpu.flush_l2()
            torch.cuda.synchronize()

        def run() -> None:
            trial.run()
            torch.cuda.synchronize()

        benchmark.pedantic(run, setup=setup, rounds=20, warmup_rounds=3)
