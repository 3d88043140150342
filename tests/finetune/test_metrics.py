"""metrics.jsonl, the console, the plot."""

import io
import json

import pytest

from m3kernels.models.finetune import metrics

VALUES = {"loss": 1.25, "lr": 1e-4, "grad_norm": 2.0, "tokens_per_s": 12345.6, "padding": 0.02, "data_wait": 0.01}


def test_rows_of_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / metrics.METRICS
    first = metrics.JsonLines(path)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": float(step)})
    first.write(3, {"valid_loss": 9.0})
    first.write(3, {"sample": "a", "given": "b"})
    first.write(4, {"valid_loss": 8.0})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
        file.write("\n")
    second = metrics.JsonLines(path)
    second.write(3, {"resumed_from": 3})
    second.write(4, {"loss": 40.0})
    second.close()
    rows = metrics.read_metrics(path)
    assert [(r["step"], r["loss"]) for r in rows if "loss" in r] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [r["sample"] for r in rows if "sample" in r] == ["a"]
    assert [(r["step"], r["valid_loss"]) for r in rows if "valid_loss" in r] == [(3, 9.0)]


def test_every_row_is_on_disk_at_once(tmp_path):
    lines = metrics.JsonLines(tmp_path / "m.jsonl")
    lines.write(1, VALUES)
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, **VALUES}
    lines.close()


def test_lines_of_a_console_that_is_no_terminal():
    stream = io.StringIO()
    console = metrics.Console(total=25, first=0, interval=10, stream=stream)
    for step in range(1, 26):
        console.step(step, VALUES)
    console.say("said")
    console.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/25", "10/25", "20/25", "25/25"] and lines[-1] == "said"
    assert "loss 1.2500" in lines[0] and "12,346 tok/s" in lines[0] and lines[3].endswith("0:00:00 left")


def test_what_a_person_watches():
    text = metrics.step_text(VALUES | {"mfu": 0.415, "memory_gib": 61.25, "data_wait": 0.4})
    for part in ("MFU 42%", "61.2 GiB", "unused 2%", "waiting for data 40%"):
        assert part in text, text
    assert "waiting" not in metrics.step_text(VALUES)


def test_smoothing_is_unbiased():
    assert metrics.smoothed([3.0] * 5) == pytest.approx([3.0] * 5)


def test_plot_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, board = metrics.JsonLines(tmp_path / metrics.METRICS), metrics.TensorBoard(str(tmp_path / "tb"), 0)
    for step in range(1, 5):
        for sink in (lines, board):
            sink.write(step, {"loss": 1 / step, "lr": 1e-4, "note": "text"})
    lines.write(4, {"valid_loss": 0.3, "valid_accuracy": 0.5, "valid_exact": 0.25})
    for sink in (lines, board):
        sink.close()
    assert metrics.plot(tmp_path).stat().st_size > 10_000
    read = EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    assert [e.step for e in read.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in read.Scalars("loss")] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
