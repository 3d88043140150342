"""The attention grid: its stored file, docs/attention.md, the dispatcher's order, and the turns of its timing (no GPU)."""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from bench_rows import host_row, write_file

from m3kernels.bench import attention_grid, report, results
from m3kernels.ops import _attention_backends as backends

NEWEST = report.newest_grid("attention")
MARKERS = "<!-- attention -->", "<!-- /attention -->"


@pytest.fixture
def stored() -> dict:
    return json.loads(NEWEST.read_text())


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, without its two heading lines."""
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
    return [[[c.strip() for c in line.strip("|").split("|")] for line in block[2:]] for block in blocks]


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+.\w]+", cell.replace(",", "").removesuffix(" %"))]


def test_every_number_of_the_stored_file_is_finite(stored):
    rates, decoding, dense = tables(attention_grid.show(stored))
    assert [len(t) for t in (rates, decoding, dense)] == [len(attention_grid.cells()), len(attention_grid.CACHES), 4]
    for row in rates:
        assert all(len(numbers(cell)) == 2 for cell in row[-2:])
    cells = [cell for row in rates for cell in row[1:]] + [cell for row in decoding + dense for cell in row[1:]]
    found = [x for cell in cells for x in numbers(cell.replace("–", ""))]
    assert found and all(math.isfinite(x) and x > 0 for x in found)
    for row in stored["rows"]:
        for ms in (*row["auto"].values(), *row["auto without fa4"].values()):
            assert math.isfinite(attention_grid.over_best(ms))


def test_the_dispatchers_order_is_that_of_the_newest_file(stored):
    assert backends.table() == stored["table"], f"copy the table of {NEWEST} to m3kernels/ops/attention_table.json"


def test_a_decoding_without_a_time_gives_its_reason(stored):
    stored["decode"][0]["ms"]["m3kernels"] = "WRONG: 0.5 apart"
    stored["decode"][1]["ms"]["sdpa"] = "OutOfMemoryError: no"
    _, (first, second, *_), _ = tables(attention_grid.show(stored))
    assert first[1:4] == ["WRONG: 0.5 apart", "–", "–"] and second[4] == "OutOfMemoryError: no"


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A clone's folder with one result file of host overhead and none of attention."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "bench" / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    write_file(results.RESULTS, [host_row("eager", 40.0), host_row("m3kernels", 20.0)])
    return tmp_path


def store(found: dict, name: str, date: str) -> None:
    path = results.RESULTS / "nvidia-h100" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found | {"machine": found["machine"] | {"date": date}}))


def test_check_holds_docs_attention_to_the_newest_file(tree, stored, capsys):
    pytest.importorskip("matplotlib")
    page, by_hand = tree / "docs" / "attention.md", "before\n{}\nof old\n{}\nafter\n".format(*MARKERS)
    page.write_text(by_hand)
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    assert page.read_text() == by_hand  # no file of attention: as it was
    store(stored, "z-attention.json", "2026-11-25T00:00:00+00:00")
    assert report.main(["--check"]) == 1 and "docs/attention.md is not" in capsys.readouterr().err
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and attention_grid.show(stored) in text
    assert "](../bench/results/nvidia-h100/z-attention.json)" in text
    rate = tables(text)[0][0][1]
    page.write_text(text.replace(rate, "999 / 999"))
    assert report.main(["--check"]) == 1 and "docs/attention.md is not" in capsys.readouterr().err
    page.write_text(text)
    store(stored | {"dense": []}, "a-attention.json", "2026-11-26T00:00:00+00:00")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0 and "a-attention.json" in page.read_text()
    page.write_text("no markers")
    capsys.readouterr()
    assert report.main(["--check"]) == 2 and MARKERS[0] in capsys.readouterr().err


class Clock(float):
    def elapsed_time(self, end: float) -> float:
        return end - self


def test_every_round_has_an_order_of_its_own(monkeypatch):
    calls = []
    milliseconds = dict(zip("abc", (1e3, 2e3, 3e3)))

    def timed(run):
        run()
        return Clock(0), Clock(milliseconds[calls[-1]])

    monkeypatch.setattr(attention_grid, "_timed", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert attention_grid.medians({n: functools.partial(calls.append, n) for n in milliseconds}) == milliseconds
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert len(rounds) >= 12 and {"".join(sorted(r)) for r in rounds} == {"abc"}
    # what matters is that each follows each of the others
    assert {(a, b) for a, b in zip(calls[6:], calls[7:]) if a != b} == set(itertools.permutations("abc", 2))
