"""bench.parallel and its parts, without GPUs: what a trace shows, which cells can run, what the table says."""

import json
import math
from types import SimpleNamespace

import pytest
import recipe_jobs
import torch
from pool import run

from m3kernels.bench import overlap, parallel, parallel_recipes

ROW = {
    "size": "8b", "tp": 1, "seq": 4096, "mode": "full", "peer": "m3kernels", "batch": 1, "recompute": "none", "dp": 1,
    "ms": 350.0, "tokens_per_s_gpu": 11700.0, "peak_gib": 35.0, "loss": 12.6, "grad_norm": 25.5, "gpu": "H100",
    "torch": "2.11.0", "nccl": "2.28.9",
}  # fmt: skip


def event(name: str, begin: float, duration: float, kind: str = "kernel") -> dict:
    return {"name": name, "ts": begin, "dur": duration, "cat": kind}


def test_shares_of_a_trace():
    events = [
        event("gemm", 0, 4000),
        event("ncclDevKernel_AllGather", 3000, 3000),
        event("norm", 5000, 500),
        event("ncclDevKernel_ReduceScatter", 5500, 1500),
        event("gemm", 10000, 1000),
        # ranges and copies stand beside kernels
        event("nccl:all_gather", 0, 11000, "gpu_user_annotation"),
        {"name": "process_name", "ph": "M"},
    ]
    assert overlap.shares(events) == {
        "device_ms": 11.0, "nccl_ms": 4.0, "nccl_hidden_ms": 1.5, "idle_ms": 3.0, "kernels": 5
    }  # fmt: skip
    assert overlap.shares([events[-1]]) == {}


def test_spans_agree_with_a_count_of_milliseconds():
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[tuple[int, int]]:
        begins = torch.randint(0, 90, (12,), generator=generator).tolist()
        return [(b, b + n) for b, n in zip(begins, torch.randint(1, 9, (12,), generator=generator).tolist())]

    for _ in range(20):
        a, b = drawn(), drawn()
        in_a, in_b = ({t for begin, end in spans for t in range(begin, end)} for spans in (a, b))
        assert overlap.length(overlap.united(a)) == len(in_a)
        assert overlap.length(overlap.common(overlap.united(a), overlap.united(b))) == len(in_a & in_b)


@pytest.mark.parametrize(
    "change, ranks, reason",
    [
        ({}, 2, ""),
        ({"tp": 2}, 3, "tp 2 does not divide 3"),
        ({"peer": "hf tp_plan", "tp": 2}, 2, ""),
        ({"peer": "hf tp_plan", "tp": 2}, 4, "tp must be 4"),
        ({"peer": "hf+liger"}, 2, ""),
        ({"peer": "hf+liger", "tp": 2}, 2, "no tensor parallelism"),
        ({"peer": "hf+liger", "mode": "lora"}, 2, "all weights"),
    ],
)
def test_cells_that_cannot_run_say_why(change, ranks, reason):
    fields = ("size", "tp", "seq", "mode", "peer", "batch", "recompute")
    said = parallel.Cell(**{name: (ROW | change)[name] for name in fields}).why_not(ranks)
    assert reason in said and bool(said) == bool(reason)


def test_the_table_has_efficiency_overlap_and_old_files(tmp_path):
    old = {key: value for key, value in ROW.items() if key not in ("mode", "peer")}
    traced = {"nccl_ms": 40.0, "nccl_hidden_ms": 10.0, "idle_ms": 5.0}
    rows = [old, ROW | traced | {"tp": 2, "tokens_per_s_gpu": 9360.0}, ROW | {"failed": "out of memory at 78.1 GiB"}]
    rows += [ROW | traced | {"peer": "hf+liger", "dp": 2}, ROW | traced | {"mode": "lora", "nccl_ms": 0.0}]
    file = tmp_path / "rows.ndjson"
    file.write_text("\n".join(map(json.dumps, rows)))
    page = parallel.with_table(f"a{parallel.BEGIN}old{parallel.END}b", [file])
    lines = [line for line in page.splitlines() if line.startswith("| 8b")]
    assert [line.split(" | ")[5] for line in lines] == ["100 %", "80 %", "–", "100 %"]
    assert "| – | – | 35.0 |" in lines[0] and "| 40 ms, 25 % | 5 ms |" in lines[1] and "| – | 5 ms |" in lines[3]
    assert page.startswith("a<!-- gpus -->") and page.endswith("<!-- /gpus -->b") and "8b, 4096 x 1, lora" in lines[3]


def test_a_recipe_that_was_stopped_has_no_speed(tmp_path, monkeypatch):
    """A time limit's SIGTERM ends a run well, with a file of fewer steps."""
    alone = {"get_world_size": lambda: 1, "get_rank": lambda: 0, "barrier": lambda: None}
    monkeypatch.setattr(parallel_recipes, "dist", SimpleNamespace(**alone))
    monkeypatch.setattr(parallel_recipes, "write_shapes", lambda *_: None)
    monkeypatch.setattr(parallel_recipes, "finetune", lambda _: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr(parallel_recipes, "read_metrics", lambda _: [{"loss": 1.0}])
    row = parallel_recipes.run(parallel_recipes.Recipe.of("3b-lora"), tmp_path, 2)
    assert row["not_run"] == "stopped after 1 of 2 steps" and "ms" not in row


@pytest.mark.slow
def test_recipes_run_at_their_tensor_parallelism(tmp_path):
    """Tiny models in the place of the 8B and 14B: full at tp 2, and LoRA; tp 4 does not divide two processes."""
    (rows, layouts), _ = run(2, recipe_jobs.train, tmp_path, ("8b-none", "8b-lora", "14b-none"))
    full, lora, refused = rows
    assert (full["tp"], full["dp"], lora["tp"], lora["dp"]) == (2, 1, 1, 2)
    assert layouts == ["data parallel 1 x tensor parallel 2", "data parallel 2 x tensor parallel 1"]
    for row in (full, lora):
        # the loss of a guess among as many tokens
        assert row["first_loss"] == pytest.approx(math.log(131072), abs=0.2) and row["tokens"] > 32 * 100
        assert row["optimizer"] == "adamw" and row["precision"] == "bf16_mixed" and "waits for data" in row["shown"]
    assert refused["not_run"] == "tp 4 does not divide 2 processes" and "not run: tp 4" in refused["shown"]
    assert not list(tmp_path.rglob("step-*"))
