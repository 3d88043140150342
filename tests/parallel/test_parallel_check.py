"""bench.parallel_check, as it runs on GPUs, here over gloo; and that it fails where training is wrong."""

import json
import math
import os
import subprocess
import sys
from unittest import mock

import check_jobs
import torch
from pool import run

from m3kernels.bench.parallel_check import Checks
from m3kernels.bench.parallel_runs import ALONE, Runs, prepare


def test_two_processes_train_as_one_does(tmp_path):
    out = tmp_path / "checks.ndjson"
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 -m m3kernels.bench.parallel_check"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command.split(), str(out), "--schemes", "lora"],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["passed"] for row in rows) and "7 of 7 passed" in done.stdout
    assert [row["what"] for row in rows if row["layout"] == "tp 1 x dp 2, kept"] == ["fp64 weights, lora"]
    for layout in ("tp 1 x dp 2", "tp 2 x dp 1"):
        found = {row["what"]: row["error"] for row in rows if row["layout"] == layout}
        assert found.keys() == {"fp64 weights, lora", "bf16 loss, lora", "bf16 grad_norm, lora"}
        # bf16 in another order of sums is never the same
        assert found["bf16 grad_norm, lora"] > 0


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
