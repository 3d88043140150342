"""The host bench and the command line of all suites (no GPU needed)."""

import json
from types import SimpleNamespace

import pytest
import torch

import m3kernels
from m3kernels.bench import host, peers, results, run
from m3kernels.bench.cases import CASES, OPS
from m3kernels.cli import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def test_every_op_and_the_layer_give_rows_that_survive_json(monkeypatch):
    monkeypatch.setattr(host, "host_us", lambda run, calls, batches: [(run(), 1.0)[1]] * batches)
    rows = list(host.bench_host(torch.device("cpu"), True, (*peers.ORDER, *host.LAYER_PEERS)))
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
    seen = {(row["what"], row["pass"], row["peer"]) for row in rows}
    assert len(seen) == len(rows)
    for what in (*host.SHAPES, host.LAYER):
        for which in (host.FORWARD, host.BOTH):
            assert {(what, which, peers.OURS), (what, which, "hf" if what == host.LAYER else "eager")} <= seen
    for row in rows:
        assert (row["us"] == 1.0) == (row["status"] == "ok") and (row["reason"] == "") == (row["status"] == "ok"), row
        assert row["peer"] in host.show(row)


def test_host_time_is_of_one_call(monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(host, "time", SimpleNamespace(perf_counter=lambda: next(clock) * 1e-6))
    assert host.host_us(lambda: None, calls=7, batches=3) == pytest.approx([1.0] * 3)


@no_gpu
@pytest.mark.parametrize("what", ["ops", "host", "train", "decode", "all"])
def test_without_a_gpu_each_says_what_it_needs(what, tmp_path, capsys):
    assert main(["bench", what, "--quick", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_wrong_choice_names_the_allowed(capsys):
    for command, allowed in ((["ops", "--op", "softmax"], "rms_norm"), (["train", "--size", "7b"], "14b")):
        with pytest.raises(SystemExit):
            main(["bench", *command])
        assert allowed in capsys.readouterr().err


def test_a_suite_that_breaks_is_a_row_and_not_the_end(monkeypatch):
    def broken(*args):
        yield {"kind": "host"}
        raise RuntimeError("no memory")

    monkeypatch.setitem(run.RUNNERS, "host", (broken, str))
    rows = list(run.guarded("host", None, None, None, 0))
    assert [row["kind"] for row in rows] == ["host", "error"] and "no memory" in rows[1]["reason"]


def test_a_peer_that_breaks_while_it_is_timed_is_a_row():
    found = {"a": [], "b": []}
    host._sample(found, lambda peer: [1.0] if peer == "a" else 1 / 0)
    host._sample(found, lambda peer: [2.0])
    rows = list(host._rows("op", host.FORWARD, found))
    assert [row["status"] for row in rows] == ["ok", "failed"] and rows[0]["us"] == 1.5


def test_no_run_overwrites_anothers_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "in_tree", lambda: True)
    head = {"kind": "header", "gpu": "NVIDIA H100", "date": "2026-11-25T10:00:00", "commit": "abc", "suites": ["ops"]}
    for name, partial in (("2026-11-25-abc-ops.jsonl", False), ("2026-11-25-abc-ops.2.jsonl", True)):
        path = results.default_path(head | {"partial": partial})
        assert path.name == name
        writer = results.Writer(path, head | {"partial": partial})
        writer.add({"kind": "row"})
        writer.close()
    # what was asked for some ops only is no state of the suite
    assert results.newest(kind="row").name == "2026-11-25-abc-ops.jsonl"


def test_an_installed_package_keeps_its_runs_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "in_tree", lambda: False)
    monkeypatch.delenv("M3K_COMMIT", raising=False)
    head = {
        "gpu": "NVIDIA H100",
        "date": "2026-11-25T10:00:00",
        "commit": results.commit(),
        "suites": list(results.SUITES),
    }
    path = results.default_path(head)
    assert path.as_posix() == f"bench-results/nvidia-h100/2026-11-25-{m3kernels.__version__}.jsonl"
    results.Writer(path, {"kind": "header"}).close()
    assert path in results.stored()


def test_the_quick_run_touches_every_op():
    assert {case.op for case in CASES if case.quick} >= set(OPS) - {"dora_linear"}
    assert set(run.PEERS) == set(run.RUNNERS)
