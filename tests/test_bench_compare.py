"""``m3kernels bench compare``: what fails, what is only said, and what is refused (no GPU)."""

import argparse
from pathlib import Path

import pytest
from bench_rows import decode_row, host_row, timed_row, train_row, write_file

from m3kernels.bench import compare, results

BASE = [
    timed_row("eager", 0.4),
    timed_row("liger", 0.05),
    timed_row("m3kernels", 0.04),
    timed_row("m3kernels", 0.16, label="32768x5120", error_over_eager=0.7),
    host_row("eager", 40.0),
    host_row("m3kernels", 20.0),
    train_row("hf", 229.0),
    train_row("m3kernels", 170.0),
    decode_row("hf", 34.7),
    decode_row("m3kernels", 3.0, ttft_ms=30.0, graphs=1, cudagraph_skips=0),
]
OURS, SMALLER, HOST, TRAIN, DECODE = 2, 3, 5, 7, 9


def changed(index: int | None = None, **values) -> list[dict]:
    return [row | values if i == index else dict(row) for i, row in enumerate(BASE)]


@pytest.fixture
def run(tmp_path, capsys):
    """Compares BASE with new rows; (exit code, output)."""

    def run(rows: list[dict], *options: str, base: list[dict] = BASE, **header) -> tuple[int, str]:
        old = write_file(tmp_path, base, "h/base.jsonl")
        new = write_file(tmp_path, rows, "h/new.jsonl", **header)
        code = compare.main([str(old), str(new), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_equal_files_pass(run):
    code, text = run(BASE)
    assert code == 0 and "0 rows failed; 5 are in both files" in text and "FAIL" not in text
    assert "noise: the peers' times moved by +0.0 % (median of 5 rows" in text


SLOWER = {
    "op": changed(OURS, graph_ms=0.044, graph_p20=0.0435, graph_p80=0.0445),
    "host": changed(HOST, us=30.0, p20=28.0, p80=32.0),
    "train, no spread": changed(TRAIN, ms=180.0),
    "decode": changed(DECODE, ms_per_token=3.3, p20=3.25, p80=3.35),
}
WORSE = {
    "memory of an op": (changed(OURS, peak_bytes=70 << 20), "memory: 0.0625 to 0.0684 GiB"),
    "memory of a model": (changed(TRAIN, peak_gib=21.5), "memory: 20.0 to 21.5 GiB"),
    "error of an op": (changed(SMALLER, error_over_eager=1.02), "error: error_over_eager 0.7 to 1.02"),
    "error of a model": (changed(DECODE, logits_error=8e-3), "error: logits_error 0.002 to 0.008"),
    "WRONG": (
        changed(OURS, status="WRONG", reason="y: error 0.5", graph_ms=None),
        "status: ok before, now WRONG: y: error 0.5",
    ),
    "failed": (changed(TRAIN, status="failed", reason="RuntimeError", ms=None), "now failed: RuntimeError"),
    "missing": (changed(HOST, status="missing", reason="", us=None), "now missing"),
    "out of memory": (changed(TRAIN, status="oom", reason="OutOfMemoryError", ms=None), "now oom"),
    "error no longer known": (changed(OURS, error_over_eager=None), "now unknown"),
    "first token": (changed(DECODE, ttft_ms=60.0), "first token: 30.0 to 60.0 ms"),
    "traced again": (changed(DECODE, graphs=4), "compiled: graphs 1 to 4"),
    "no graph": (changed(OURS, graph_ms=None, graph_reason="cudaErrorX"), "graph: no longer captured (cudaErrorX)"),
}


@pytest.mark.parametrize("how", sorted(SLOWER))
def test_a_slowdown_beyond_limit_and_spread_fails(run, how):
    code, text = run(SLOWER[how])
    assert code == 1 and "1 rows failed" in text
    failing = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert len(failing) == 1 and failing[0].endswith("slower") and "m3kernels" in failing[0]
    # the worst one comes first, under the heading
    lines = text.splitlines()
    assert lines.index(failing[0]) == next(i for i, line in enumerate(lines) if "change" in line) + 1
    assert run(SLOWER[how], "--fail-over", "60%")[0] == 0


@pytest.mark.parametrize("how", sorted(WORSE))
def test_what_is_worse_in_another_way_fails(run, how):
    rows, words = WORSE[how]
    code, text = run(rows)
    assert code == 1 and words in text and "1 rows failed" in text


def test_a_slowdown_within_the_spread_is_said_and_passes(run):
    code, text = run(changed(HOST, us=21.5, p20=19.0, p80=24.0))
    assert code == 0 and "+7.5 %" in text and "slower, but within the spread" in text


def test_small_changes_pass(run):
    better = changed(OURS, graph_ms=0.03, graph_p20=0.029, graph_p80=0.031, peak_bytes=1 << 20)
    assert run(better)[0] == 0
    assert run(changed(SMALLER, error_over_eager=0.99))[0] == 0, "still no worse than eager"
    assert run(changed(DECODE, logits_error=4e-3))[0] == 0, "below half of its bound"
    tiny = changed(OURS, peak_bytes=1024), changed(OURS, peak_bytes=512 << 10)
    assert run(tiny[1], base=tiny[0])[0] == 0, "less than the allocator's rounding"


def test_the_peers_drift_alone_is_noise(run):
    rows = [
        row if row["peer"] == "m3kernels" else row | {"graph_ms": 0.6, "graph_p20": 0.6, "us": 90.0} for row in BASE
    ]
    rows[1] |= {"status": "WRONG", "reason": "y", "graph_ms": None}
    code, text = run(rows[:-2] + rows[-1:])
    assert code == 0 and "FAIL" not in text and "(median of 3 rows, from +0.0 % to +125.0 %)" in text
    assert "peer RMSNorm 8192x4096, forward, Liger: ok, now WRONG y" in text
    assert "of the peers 1 rows vanished and 0 are new" in text
    assert run(rows, "--peer", "liger")[0] == 1


def test_a_vanished_row_fails_and_a_new_one_is_listed(run):
    added = timed_row("m3kernels", 0.1, label="1x1")
    code, text = run([row for i, row in enumerate(BASE) if i != OURS] + [added])
    assert code == 1 and "FAIL vanished: RMSNorm 8192x4096, forward, m3kernels (not in NEW)" in text
    assert "new: RMSNorm 1x1, forward, m3kernels (ok)" in text
    broken = {"kind": "error", "op": "rms_norm", "label": "32768x5120", "reason": "OutOfMemoryError"}
    code, text = run([row for i, row in enumerate(BASE) if i != SMALLER] + [broken])
    assert code == 1 and "(the whole cell: OutOfMemoryError)" in text


def test_a_cell_that_broke_or_was_skipped_says_why_its_rows_are_gone(run):
    rest = [row for i, row in enumerate(BASE) if i not in (TRAIN - 1, TRAIN)]
    code, text = run([*rest, train_row("all", None, status="skipped", reason="the time was over")])
    assert code == 1 and "batch 1, m3kernels (the whole cell: the time was over)" in text
    assert run(BASE, base=[*rest, train_row("all", None, status="oom")])[0] == 0


def test_rows_that_were_not_to_be_measured_do_not_fail(run):
    ops_only = [row for row in BASE if row["kind"] == "row"]
    code, text = run(ops_only, suites=["ops"])
    assert code == 0 and "vanished: 3B text, full, S 4096, batch 1, m3kernels (its suite was not run)" in text
    code, text = run([row for i, row in enumerate(BASE) if i != SMALLER], quick=True)
    assert code == 0 and "(a --quick run measures fewer)" in text and "--quick differs: False, now True" in text
    code, text = run(ops_only, suites=["ops", "host", "train", "decode"])
    assert code == 1 and "3 rows failed" in text, "a suite that ran and gave nothing"


def test_other_versions_are_said_and_other_gpus_refused(run):
    code, text = run(BASE, versions={"torch": "2.12.0", "triton": "3.6.0", "transformers": "5.17.0"})
    assert code == 0 and "torch differs: 2.11.0, now 2.12.0" in text
    code, text = run(BASE, gpu="NVIDIA H100 80GB HBM3")
    assert code == 2 and "--force" in text and "NVIDIA H200" in text
    code, text = run(BASE, "--force", gpu="NVIDIA H100 80GB HBM3")
    assert code == 0 and "GPU differs" in text


def test_without_a_base_it_is_the_newest_full_one_of_the_same_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    new = write_file(tmp_path, BASE, "h200/d.jsonl", date="2026-08-09T00:00:00+00:00")
    assert compare.main([str(new)]) == 2 and "name a BASE" in capsys.readouterr().err
    write_file(tmp_path, BASE, "h200/a.jsonl", date="2026-08-01T00:00:00+00:00")
    wanted = write_file(tmp_path, BASE, "h200/b.jsonl", date="2026-08-02T00:00:00+00:00")
    write_file(tmp_path, BASE, "h200/c.jsonl", date="2026-08-03T00:00:00+00:00", quick=True)
    write_file(tmp_path, BASE, "h100/a.jsonl", date="2026-08-04T00:00:00+00:00", gpu="NVIDIA H100")
    write_file(tmp_path, BASE[:4], "h200/e.jsonl", date="2026-08-05T00:00:00+00:00")
    assert compare.main([str(new)]) == 0
    assert f"BASE {wanted}" in capsys.readouterr().out


@pytest.mark.parametrize("text, share", [("5%", 0.05), ("0.05", 0.05), (" 12.5% ", 0.125), ("0", 0.0), ("150%", 1.5)])
def test_thresholds(text, share):
    assert compare.threshold(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["5", "-1%", "five", "", "%", "nan", "inf"])
def test_thresholds_that_could_mean_anything_are_refused(text, tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="5% or 0.05"):
        compare.threshold(text)
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--fail-over", text, str(tmp_path / "a"), str(tmp_path / "b")])


def test_what_cannot_be_read_is_refused(tmp_path, capsys):
    good = write_file(tmp_path, BASE, "h/good.jsonl")
    bad: dict[str, Path] = {name: tmp_path / f"{name}.jsonl" for name in ("absent", "broken", "headless")}
    bad["broken"].write_text('{"kind": "header"}\n{"kind":\n{"kind": "row"}\n')
    bad["headless"].write_text('{"kind": "row"}\n')
    bad["fieldless"] = write_file(tmp_path, [{"kind": "row", "op": "rms_norm"}], "h/fieldless.jsonl")
    for name, path in bad.items():
        for files in ((good, path), (path, good)):
            assert compare.main([*map(str, files)]) == 2, name
    assert capsys.readouterr().err.count("m3kernels bench compare: ") == 2 * len(bad)


def test_files_without_a_common_row_are_refused(run):
    code, text = run([host_row("m3kernels", 2.0)], base=BASE[:4], suites=["host"])
    assert code == 2 and "have no row in common" in text


def test_a_peer_that_no_row_has_is_refused(run):
    code, text = run(BASE, "--peer", "M3kernels")
    assert code == 2 and "no row of peer M3kernels; there are" in text


def test_files_may_stand_on_both_sides_of_an_option(tmp_path, capsys):
    old, new = write_file(tmp_path, BASE, "h/base.jsonl"), write_file(tmp_path, BASE, "h/new.jsonl")
    assert compare.main([str(old), "--force", str(new)]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(old), str(new), str(new)])
    assert "one or two files" in capsys.readouterr().err
