"""The op benchmark's gate, its byte counts and its rows (no GPU needed)."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from bench_fakes import SlowGpu

from m3kernels.bench import gate, measure, ops, peers, report_tables, targets
from m3kernels.bench.cases import BOTH, CASES, OPS, Case
from m3kernels.ops._triton import INTERPRET

CPU = torch.device("cpu")
compiled_only = pytest.mark.skipif(
    INTERPRET, reason="Triton's interpreter truncates bf16, so ours is off by its rounding"
)
TINY = {
    "rms_norm": Case("rms_norm", "64x256", {"rows": 64, "width": 256}),
    "add_rms_norm": Case("add_rms_norm", "64x256", {"rows": 64, "width": 256}),
    "rotary": Case(
        "rotary",
        "S64",
        {"batch": 1, "seq": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "first": 96, "llama4": (0.1, 128)},
    ),
    "swiglu": Case("swiglu", "64x256", {"rows": 64, "width": 256}),
    "linear_cross_entropy": Case(
        "linear_cross_entropy", "tiny", {"tokens": 96, "vocab": 512, "hidden": 64, "trained": True}
    ),
    "attention": Case("attention", "tiny", {"batch": 2, "seq": 48, "heads": 4, "kv_heads": 2, "head_dim": 32}),
    "lora_linear": Case("lora_linear", "tiny", {"rows": 96, "width": 64, "out": 80, "rank": 4, "dora": False}),
    "dora_linear": Case("dora_linear", "tiny", {"rows": 96, "width": 64, "out": 80, "rank": 4, "dora": True}),
    "fp8_linear": Case("fp8_linear", "tiny", {"rows": 96, "width": 160, "out": 200, "rank": 0, "dora": False}),
    "fp8_lora_linear": Case(
        "fp8_lora_linear", "tiny", {"rows": 96, "width": 160, "out": 200, "rank": 4, "dora": False}
    ),
}
# results whose wrongness each op's gate must see, one output or gradient at a time
BREAKS = {
    "one element": lambda t: t[(0,) * t.dim()].add_(8.0),
    "scaled by 1 %": lambda t: t.mul_(1.02),
    "NaN in one place": lambda t: t[(-1,) * t.dim()].fill_(math.nan),
    "zeros": lambda t: t.zero_(),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    command = [sys.executable, "-m", "m3kernels.bench.ops", "--quick", "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"M3K_COMMIT": "x"})
    assert done.returncode == 2, done.stderr
    assert "needs a CUDA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@compiled_only
@pytest.mark.parametrize("op", sorted(OPS))
def test_eager_and_ours_pass_the_gate(op):
    case = TINY[op]
    data = ops.make_data(case, CPU)
    entered = ops.contenders(case, data, (peers.OURS,))
    for direction in OPS[op].directions:
        for me in entered.values():
            verdict = ops.verdict(me, entered["eager"], direction, OPS[op])
            assert verdict.status == gate.OK, f"{me.name} {direction}: {verdict.reason}"
    assert not any(me.overwrites for me in entered.values())


@compiled_only
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_whole_case_runs_and_its_rows_survive_json(op):
    ceilings = {"copy_bytes_s": 1e9, "gemm_flops_s": {ops.GEMM_CEILING: 1e9}}
    budget = measure.Budget(seconds=0.001, rounds=2)
    # compiling is most of the time, and the same for every op
    compiled = ("torch",) if op == "rms_norm" else ()
    rows = list(ops.bench_case(TINY[op], SlowGpu(), budget, ceilings, ("eager", *compiled, "quack", peers.OURS)))
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
    assert {r["direction"] for r in rows} == set(OPS[op].directions)
    for row in rows:
        if row["peer"] == "quack":
            assert row["status"] in ("missing", "failed") and row["reason"]
            continue
        assert row["status"] == "ok" and row["python_samples"] >= 4 and row["percent_of_limit"] > 0, row
        assert row["graph_ms"] is None and row["graph_reason"]
        assert row["errors"] and set(row["errors"]) == set(row["eager_errors"])
        assert f"python {row['python_ms']:8.4f} ms" in ops.show(row)
    if op == "linear_cross_entropy":
        assert all(0.3 < r["dweight_error_over_one_gemm"] < 3 for r in rows if r["errors"])


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("how", sorted(BREAKS))
def test_a_wrong_peer_is_called_wrong(op, how):
    case = TINY[op]
    data = ops.make_data(case, CPU)
    eager = ops.enter("eager", peers.PEERS[op]["eager"], case, data)
    right = eager.function
    for broken in eager.errors:
        if how == "one element" and broken == "loss":
            continue
        me = ops.Contender(peers.OURS)
        results = ops.run_once(OPS[op], case.shape, right, eager.inputs, eager.grads)
        results[broken] = results[broken].clone()
        BREAKS[how](results[broken])
        me.errors = gate.distances(results, data.reference)
        direction = BOTH if BOTH in OPS[op].directions else "forward" if broken in OPS[op].outputs else "backward"
        verdict = ops.verdict(me, eager, direction, OPS[op])
        assert verdict.status == gate.WRONG, f"{broken}: {me.errors[broken]} beside {eager.errors[broken]}"
        assert broken in verdict.reason
        row = ops.base_row(case, direction, me, eager, None)
        assert "WRONG" in ops.show(row) and " ms" not in ops.show(row)


def test_leaving_the_softmax_out_of_the_loss_gradient_is_wrong():
    """The label's own term dominates on flat logits; the benchmark's inputs must not be that forgiving."""
    case = TINY["linear_cross_entropy"]
    data = ops.make_data(case, CPU)
    eager = ops.enter("eager", peers.PEERS[case.op]["eager"], case, data)
    label_only = -data.inputs["weight"][data.inputs["labels"]] / case.shape["tokens"]
    error = gate.distance(label_only, data.reference["dhidden"])
    assert gate.judge({"dhidden": error}, eager.errors, strict=False).status == gate.WRONG


def test_a_peer_in_between_is_imprecise_and_ours_would_be_wrong():
    eager = {"y": gate.Error(0.002, 0.004)}
    coarse = {"y": gate.Error(0.01, 0.02)}
    assert gate.judge(coarse, eager, strict=False).status == gate.IMPRECISE
    assert gate.judge(coarse, eager, strict=True).status == gate.WRONG
    assert gate.judge({"y": gate.Error(0.05, 0.1)}, eager, strict=False).status == gate.WRONG
    assert gate.judge_eager({"y": gate.Error(0.2, 0.2)}).status == gate.WRONG


def test_a_missing_or_failing_peer_gives_its_reason():
    case = TINY["swiglu"]
    data = ops.make_data(case, CPU)

    def absent(shape, given):
        raise ModuleNotFoundError("No module named 'liger_kernel'")

    def broken(shape, given):
        return lambda t: (t["gate"] @ t["up"],)

    eager = ops.enter("eager", peers.PEERS["swiglu"]["eager"], case, data)
    for build, status, text in ((absent, "missing", "liger_kernel"), (broken, "failed", "RuntimeError")):
        row = ops.base_row(case, "forward", ops.enter("liger", build, case, data), eager, None)
        assert row["status"] == status and text in row["reason"]
        assert f"{status}: " in ops.show(row)


def test_a_broken_case_is_one_line_and_not_the_end():
    case = Case("swiglu", "no width", {"rows": 64})
    (row,) = ops.guarded_case(case, SlowGpu(), measure.Budget(0.001, 2), {}, ("eager",))
    assert row["kind"] == "error" and "KeyError" in row["reason"] and "broke" in ops.show(row)


def test_inputs_that_a_peer_overwrites_are_found_and_restored():
    case = TINY["swiglu"]
    data = ops.make_data(case, CPU)

    def in_place(shape, given):
        def function(t):
            y = torch.nn.functional.silu(t["gate"]) * t["up"]
            t["up"].data.zero_()
            return (y,)

        return function

    me = ops.enter("liger", in_place, case, data)
    assert [name for name, _, _ in me.overwrites] == ["up"]
    assert torch.equal(me.inputs["up"].detach(), data.inputs["up"])


def test_an_output_in_another_dtype_is_wrong():
    case = TINY["swiglu"]
    data = ops.make_data(case, CPU)
    me = ops.enter("torch", lambda shape, given: lambda t: ((t["gate"] * t["up"]).float(),), case, data)
    assert me.status == gate.WRONG and "float32" in me.reason


def test_costs_are_the_bytes_and_flops_of_the_targets_limits():
    """``targets.md`` gives the limits' basis; these are its own round numbers in milliseconds on the H100."""
    by_key = {t.cell[1:]: t.limit_ms() for t in targets.TARGETS}
    expected = {
        ("rms_norm", "8192x4096", "forward"): 0.0444,
        ("add_rms_norm", "8192x4096", "forward"): 0.0889,
        ("rotary", "S8192 32/8x128", "backward"): 0.0569,
        ("swiglu", "8192x14336", "backward"): 0.389,
        ("linear_cross_entropy", "8192x131072 h4096 trained", BOTH): 37.7,
        ("linear_cross_entropy", "8192x131072 h4096 frozen", BOTH): 25.1,
    }
    for key, ms in expected.items():
        assert by_key[key] == pytest.approx(ms, rel=0.005), key
    assert all(t.limit_ms() <= 1.01 * t.goal_ms or t.cell[1] == "linear_cross_entropy" for t in targets.TARGETS)


def test_every_case_has_its_op_and_every_op_its_peers():
    assert {c.op for c in CASES} == set(OPS) == set(peers.PEERS) == set(report_tables.NAMES)
    assert len({(c.op, c.label) for c in CASES}) == len(CASES)
    for table in peers.PEERS.values():
        assert {"eager", peers.OURS} <= set(table) <= set(peers.ORDER)


def test_a_peer_package_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(peers.PACKAGES, "quack", ("quack-kernels", "no_such_module_here"))
    assert "no_such_module_here" in peers.peer_versions()["quack"]


def test_stats_and_budgets():
    stats = measure.Stats.of([float(i) for i in range(101)])
    assert (stats.median, stats.p20, stats.p80, stats.samples) == (50.0, 20.0, 80.0, 101)
    budget = measure.Budget(seconds=0.25, rounds=5)
    assert budget.calls_a_round(160.0, 2, 15) == 2 and budget.calls_a_round(0.04, 2, 15) == 15
