"""Result files, README's tables, docs/benchmarks.md and its plots that are made of them, and the targets (no GPU)."""

import sys
from pathlib import Path

import pytest
from bench_rows import decode_row, host_row, op_row, timed_row, train_row, write_file

from m3kernels.bench import report, report_draw, report_plots, results, targets
from m3kernels.bench.cases import BOTH
from m3kernels.bench.rows import number, sources

LOSS = {"op": "linear_cross_entropy", "label": "8192x131072 h4096 trained", "direction": BOTH}
ALL_KINDS = [
    timed_row("eager", 0.4),
    timed_row("liger", 0.05, status="WRONG", reason="y: error 0.5 | 3 <b>", graph_ms=None, python_ms=None),
    timed_row("m3kernels", 0.04),
    timed_row("eager", 0.8, label="32768x5120"),
    timed_row("m3kernels", 0.16, label="32768x5120"),
    timed_row("fa4", 0.9, op="attention", label="causal B4 S4096 32/8x128", flops=5e11, bytes=0),
    op_row("eager", None, **LOSS) | {"python_ms": 50.0, "peak_bytes": 12 << 30, "graph_reason": "not tried"},
    op_row("m3kernels", None, **LOSS) | {"python_ms": 39.0, "peak_bytes": 1 << 30, "limit_ms": 37.05},
    {"kind": "error", "op": "rotary", "label": "S9", "reason": "KeyError: 'seq'"},
    host_row("eager", 40.0),
    host_row("m3kernels", 20.0),
    host_row("hf", 300.0, what="decoder layer"),
    host_row("quack", None, status="missing", reason="No module named 'quack'"),
    train_row("hf", 229.0),
    train_row("hf+liger", 207.0, status="WRONG", reason="loss error 0.4"),
    train_row("m3kernels", 170.0),
    train_row("m3kernels+fa4", 160.0, peak_gib=19.0),
    train_row(
        "hf", None, seq=32768, status="oom", reason="OutOfMemoryError", peak_gib=None, loss=None, loss_error=None
    ),
    train_row("m3kernels", 2900.0, seq=32768, tokens_per_s=11299.0, peak_gib=None, mfu=None),
    train_row("all", None, mode="dora", status="skipped", reason="the time was over", weights_gib=None, mfu=None),
    decode_row("hf", 34.7),
    decode_row("hf+compile", None, status="skipped", reason="time is over", peak_gib=None, logits_error=None),
    decode_row("m3kernels", 3.0, ttft_ms=None),
]


def line_of(text: str, begins: str) -> list[str]:
    """The cells of the one table line that begins so."""
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {begins}")]
    return [c.strip() for c in line.strip("|").split(" |")]


def in_folder(monkeypatch, folder: Path) -> Path:
    """A tree with an empty README and docs for the report to write into."""
    monkeypatch.setattr(report, "ROOT", folder)
    (folder / "docs").mkdir()
    for name in report.GRIDS:
        (folder / "docs" / f"{name}.md").write_text(f"<!-- {name} -->\n<!-- /{name} -->")
    (folder / "docs" / "generation.md").write_text("<!-- decode -->\n<!-- /decode -->")
    readme = folder / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    return readme


def test_readme_docs_and_plots_are_what_the_newest_result_files_give():
    found = sources()
    if not found:
        pytest.skip("no result file under bench/results yet: m3kernels bench on a GPU writes one")
    assert report.differences(found) == [], "run m3kernels bench report"


def test_report_shows_missing_and_wrong_peers(tmp_path):
    rows = [
        op_row("eager", 0.4),
        op_row("torch.compile", None, status="failed", reason="RuntimeError: no"),
        op_row("liger", None, status="WRONG", reason="y: error 0.5"),
        op_row("torch", 0.05),
        op_row("quack", None, status="missing", reason="ImportError"),
        op_row("m3kernels", 0.04),
    ]
    found = sources(write_file(tmp_path, rows))
    text = report.readme_section(found)
    line = next(x for x in text.splitlines() if x.startswith("| RMSNorm"))
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[:4] == ["RMSNorm 8192x4096, forward", "0.400", "failed", "WRONG"]
    assert cells[4:7] == ["0.050 (F.rms_norm)", "**0.040**", "75 %"]
    assert "not importable: QuACK." in text and "NVIDIA H200" in text and "abc" in text
    page = report.page(found)
    for reason in ("failed: RuntimeError: no", "WRONG: y: error 0.5", "missing: ImportError"):
        assert f"| {reason} |" in page


def test_report_marks_python_times_coarse_peers_and_memory(tmp_path):
    rows = [
        op_row("eager", None, **LOSS) | {"python_ms": 50.0, "peak_bytes": 12 << 30},
        op_row("cce", None, **LOSS, error_over_eager=7.4) | {"python_ms": 160.0, "status": "imprecise"},
        op_row("m3kernels", None, **LOSS) | {"python_ms": 39.0, "peak_bytes": 1 << 30, "limit_ms": 37.05},
    ]
    text = report.readme_section(sources(write_file(tmp_path, rows)))
    line = next(x for x in text.splitlines() if x.startswith("| linear"))
    assert "50.0†" in line and "160† ≈7× (CCE)" in line and "**39.0†**" in line and "1.00 GiB (eager 12.0)" in line


def test_reading_survives_a_timeout_and_refuses_other_files(tmp_path):
    path = write_file(tmp_path, [op_row("eager", 0.4), op_row("m3kernels", 0.1)])
    path.write_text(path.read_text()[:-20])
    assert [r["peer"] for r in results.read(path)[1]] == ["eager"]
    path.write_text('{"kind": "row"}\n')
    with pytest.raises(ValueError, match="not a header"):
        results.read(path)


def test_newest_goes_by_the_date_in_the_header(tmp_path):
    assert results.newest(tmp_path) is None
    write_file(tmp_path, [], "z/2026-08-01-a.jsonl")
    later = write_file(tmp_path, [], "a/2026-08-01-b.jsonl", date="2026-08-01T12:00:00+00:00")
    assert results.newest(tmp_path) == later


def test_each_section_takes_the_newest_file_that_holds_its_rows(tmp_path, monkeypatch):
    write_file(tmp_path, ALL_KINDS, "h/all.jsonl")
    later = write_file(
        tmp_path, [host_row("eager", 40.0)], "h/host.jsonl", date="2026-09-01T00:00:00+00:00", quick=True
    )
    newest = results.newest
    monkeypatch.setattr(results, "newest", lambda kind=None: newest(tmp_path, kind))
    found = sources()
    assert {suite: source.name for suite, source in found.items()} == {
        "ops": "h/all.jsonl",
        "host": "h/host.jsonl",
        "train": "h/all.jsonl",
        "decode": "h/all.jsonl",
    }
    assert found["host"].path == later and len(found["ops"].rows) == 8 and len(found["ops"].broken) == 1
    assert "2026-09-01, commit abc, `h/host.jsonl`, a `--quick` run" in report.page(found)


def test_a_page_of_every_kind_hides_nothing(tmp_path):
    found = sources(write_file(tmp_path, ALL_KINDS))
    page, readme = report.page(found), report.readme_section(found)
    assert "WRONG: y: error 0.5 \\| 3 &lt;b>" in page and "- not measured: rotary S9: KeyError: 'seq'" in page
    assert "WRONG: loss error 0.4" in page and "oom: OutOfMemoryError" in page and "skipped: time is over" in page
    assert "skipped: the time was over" in page and "bounds: loss 0.002, grad norm 0.02." in page
    assert "No device time of eager: not tried." in page and "missing: No module named 'quack' (QuACK rms norm)" in page
    assert "None" not in page and "None" not in readme and "nan" not in page
    # what we do not have yet is in the page only
    assert "attention" in page and "attention" not in readme
    assert line_of(readme, "3B text, full, S 4096")[1:] == [
        "229",
        "WRONG",
        "–",
        "**160** (m3kernels + FA4)",
        "1.43×",
        "19.0 (20.0)",
    ]
    assert line_of(readme, "3B text, full, S 32768")[1:6] == ["oom", "–", "–", "**2900**", "–"]
    assert line_of(readme, "3B decode")[1:6] == ["34.7", "–", "skipped (HF + torch.compile)", "**3.00**", "11.57×"]
    assert line_of(page, "rms norm | forward")[2:] == ["40.0 (36.0–44.0)", "missing", "20.0 (18.0–22.0)"]
    assert line_of(page, "decoder layer")[2:] == ["300 (270–330)", "–", "–"]
    for text in (page, readme):
        assert "Liger has no Ministral 3 patch" in text and "by hand" in text


def test_a_section_without_results_says_so(tmp_path):
    page = report.page(sources(write_file(tmp_path, [host_row("eager", 40.0)])))
    assert "`m3kernels bench ops` on a GPU" in page and "`m3kernels bench train` on a GPU" in page
    assert "bench host` on a GPU" not in page and "bench/train.svg" not in page and "not run" in page
    ops = report.page(sources(write_file(tmp_path, [op_row("m3kernels", None, status="failed", reason="no")])))
    assert "Speed-up over eager: no op was timed beside eager." in ops and "svg" not in ops


def test_check_notices_a_stale_readme_and_the_picture_is_deterministic(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = write_file(tmp_path / "results", [timed_row("eager", 0.4), timed_row("m3kernels", 0.04)])
    readme = in_folder(monkeypatch, tmp_path)
    assert report.main(["--check", "--file", str(path)]) == 1
    assert report.main(["--file", str(path)]) == 0
    assert report.main(["--check", "--file", str(path)]) == 0
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")
    first = (tmp_path / "docs" / "bench" / "ops-roofline.svg").read_bytes()
    assert report.main(["--file", str(path)]) == 0
    assert (tmp_path / "docs" / "bench" / "ops-roofline.svg").read_bytes() == first
    readme.write_text("no markers")
    assert report.main(["--check", "--file", str(path)]) == 2
    assert report.BEGIN in capsys.readouterr().err


def test_check_notices_every_generated_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = write_file(tmp_path / "results", ALL_KINDS)
    readme = in_folder(monkeypatch, tmp_path)
    check, docs = ["--check", "--file", str(path)], tmp_path / "docs"
    (docs / "bench").mkdir()
    (docs / "bench" / "of-old.svg").write_text("<svg/>")
    assert report.main(["--file", str(path)]) == 0 and report.main(check) == 0
    drawn = {p.stem for p in (docs / "bench").iterdir()}
    assert drawn == {plot.name for plot in report_plots.PLOTS}
    assert all(f"](bench/{name}.svg)" in (docs / "benchmarks.md").read_text() for name in drawn)

    def noticed(file: Path, text: str | None, words: str) -> None:
        before = file.read_text() if file.exists() else None
        file.unlink() if text is None else file.write_text(text)
        assert report.main(check) == 1
        assert words in capsys.readouterr().err
        file.unlink() if before is None else file.write_text(before)
        assert report.main(check) == 0

    noticed(readme, readme.read_text().replace("0.040", "0.030"), "README.md is not")
    noticed(docs / "benchmarks.md", (docs / "benchmarks.md").read_text() + "\n", "docs/benchmarks.md is not")
    noticed(docs / "bench" / "train.svg", None, "train.svg is missing")
    noticed(docs / "bench" / "train.svg", "<svg/>", "train.svg shows other results")
    noticed(docs / "bench" / "other.svg", "<svg/>", "other.svg belongs to no plot")
    path.write_text(path.read_text() + "\n")
    assert report.main(check) == 1 and "decode.svg shows other results" in capsys.readouterr().err


def test_without_matplotlib_the_texts_are_written_and_the_plots_are_not(tmp_path, monkeypatch, capsys):
    path = write_file(tmp_path / "results", ALL_KINDS)
    in_folder(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(["--file", str(path)]) == 0
    assert "were not drawn" in capsys.readouterr().err
    assert (tmp_path / "docs" / "benchmarks.md").is_file() and not (tmp_path / "docs" / "bench").exists()


def test_report_says_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    in_folder(monkeypatch, tmp_path)
    monkeypatch.setattr(results, "newest", lambda kind=None: None)
    assert report.main([]) == 2 and "run m3kernels bench on a GPU" in capsys.readouterr().err
    assert report.main(["--file", str(tmp_path / "none.jsonl")]) == 2 and "none.jsonl" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert report.main(["--file", str(tmp_path / "x.jsonl")]) == 2 and "not a header" in capsys.readouterr().err


def test_more_peers_than_colours_can_be_told_apart():
    entries = [report_draw.Entry(f"peer{i}", 1.0, "1") for i in range(9)]
    panel = report_draw.Bars("", "", [("", entries)])
    looks = report_draw.Looks([panel])
    seen = {(looks.colour(e.peer), looks.hatch(e.peer)) for e in entries}
    assert len(seen) == len(entries) and len({looks.marker(e.peer) for e in entries}) == len(entries)


def test_numbers_have_three_digits():
    assert [number(x) for x in (0, 0.99999, 0.03754, 1.5, 12.34, 999.6, 12345.6, None)] == [
        *("0", "1.00", "0.0375", "1.50", "12.3", "1,000", "12,346", "–")
    ]


def test_targets_are_judged_in_both_terms():
    """At 0.9 x the must's fraction of the limit it misses; at the must's ratio to the best named peer it holds."""
    target = targets.TARGETS[0]
    limit, best = 0.031, 0.045
    fine, slow = limit / target.must_fraction(), 0.99 * best * target.must_ms / target.peers_ms["torch"]
    rows = [op_row("torch", best), op_row("eager", 0.4), op_row("m3kernels", slow)]
    for row in rows:
        row["limit_ms"] = limit
    verdict = targets.judge(target, rows)
    assert verdict.best_peer == "torch" and verdict.ratio_holds
    assert verdict.fraction_holds == (slow <= fine)
    assert targets.judge(target, [op_row("eager", 1.0)]) is None
    wrong = targets.judge(target, [op_row("m3kernels", None, status="WRONG")])
    assert wrong.fraction_holds is None and wrong.status == "WRONG"
    assert "WRONG" in targets.table([op_row("m3kernels", None, status="WRONG")])


def test_milliseconds_count_on_an_h100_only():
    target, row = targets.TARGETS[0], op_row("m3kernels", 0.052)
    for gpu, terms in (("NVIDIA H100 80GB HBM3", ["ms", "limit"]), ("NVIDIA H200", ["limit"])):
        assert list(targets.judge(target, [row], head={"gpu": gpu}).checks) == terms
    verdict = targets.judge(target, [row], head={"gpu": "NVIDIA H100 80GB HBM3"})
    assert verdict.held("must") == ["ms"] and verdict.missed("must") == ["limit"] and "ms" in verdict.missed("goal")


def test_targets_of_models_are_judged_by_time_peer_limit_and_memory(tmp_path):
    rows = [train_row("hf", 230.0), train_row("hf+liger", 200.0), train_row("m3kernels", 170.0, peak_gib=18.0)]
    rows += [decode_row("m3kernels", None, status="WRONG", reason="logits")]
    path = write_file(tmp_path, rows, gpu="NVIDIA H100 80GB HBM3")
    head = results.read(path)[0]
    full = next(t for t in targets.MODEL_TARGETS if t.cell[3:5] == ("full", 4096))
    verdict = targets.judge(full, rows, head=head)
    assert verdict.best_peer == "hf+liger" and verdict.checks["ratio"].measured == pytest.approx(0.85)
    assert verdict.checks["ratio"].must == pytest.approx(175 / 207) and verdict.ratio_holds is False
    limit = verdict.checks["limit"]
    assert limit.measured == pytest.approx(120 / 170) and limit.must == pytest.approx(120 / 175)
    assert verdict.held("must") == ["ms", "limit"] and verdict.missed("must") == ["ratio", "memory"]
    page = report.page(sources(path))
    cells = line_of(page.partition("## Targets")[2], "3B text, full, S 4096")
    assert cells[-2] == "**MISSED** by ratio, memory; held by ms, % of limit" and cells[-1].startswith("missed")
    assert line_of(page.partition("## Targets")[2], "3B decode, batch 1, prompt 512")[3:] == [
        "WRONG",
        *"–––",
        "**MISSED**",
        "missed",
    ]
