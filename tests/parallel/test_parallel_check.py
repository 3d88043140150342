"""bench.parallel_check, as it runs on GPUs, here over gloo; and that it fails where training is wrong."""

import json
import math
from unittest import mock

import check_jobs
import pytest
import torch
from pool import run

from m3kernels.bench.parallel_check import PRECISIONS, Checks, named
from m3kernels.bench.parallel_runs import ALONE, Runs, prepare


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, capsys):
    """What ``main`` does with its ranks, without their starts, which take a minute of two cores."""
    folder, out = tmp_path / "runs", tmp_path / "checks.ndjson"
    prepare(folder)
    runs = Runs(folder, "cpu")
    for precision in PRECISIONS:
        runs.whole("lora", precision, ALONE)
    (found, _) = run(2, check_jobs.train_everywhere, folder, "lora")
    checks = Checks(runs, out)
    for layout, exact, mixed in found:
        checks.weights("fp64 weights", "lora", named(layout), exact)
        checks.numbers("lora", named(layout), mixed)
    assert checks.status() == 0 and "6 of 6 passed" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 and all(row["passed"] for row in rows)
    for layout in ("tp 1 x dp 2", "tp 2 x dp 1"):
        errors = {row["what"]: row["error"] for row in rows if row["layout"] == layout}
        assert errors.keys() == {"fp64 weights, lora", "bf16 loss, lora", "bf16 grad_norm, lora"}
        # bf16 in another order of sums is never the same
        assert errors["bf16 grad_norm, lora"] > 0


def test_averaged_gradients_and_runs_that_fail_are_seen(tmp_path, capsys):
    folder = tmp_path / "runs"
    prepare(folder)
    runs = Runs(folder, "cpu")
    runs.whole("none", "fp64", ALONE)
    checks = Checks(runs, None)
    (name, _) = run(2, check_jobs.train, folder, 2, True)
    checks.weights("fp64 weights", "none", "tp 1 x dp 2", name)
    runs.run("broken", "none", "fp64", 1, "dataset.seq_length=1")
    checks.weights("fp64 weights", "none", "one process", "broken")
    checks.weights("fp64 weights", "none", "one process", "never begun")
    assert checks.status() == 1
    wrong, broken, missing = checks.found
    assert 1e-8 < wrong.error < 1 and broken.row()["error"] is None and missing.row()["error"] is None
    assert "dataset.seq_length is 1; allowed: from 2" in broken.note and "KeyError" in missing.note
    assert "0 of 3 passed" in capsys.readouterr().out
    # neither run in bf16 is there, which is no agreement
    checks.numbers("none", "one process", "never begun")
    assert [check.passed for check in checks.found[3:]] == [False, False]
    nan = mock.patch.object(runs, "weights", lambda name: {"a": torch.ones(2), "b": torch.tensor([math.nan, 1.0])})
    with nan:
        checks.weights("fp64 weights", "none", "one process", "one")
    assert not checks.found[-1].passed and checks.found[-1].row()["error"] is None
