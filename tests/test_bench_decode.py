"""The decode bench on a CPU: bytes, the check, compiled peers, and what becomes of failures."""

import json
import time

import pytest
import torch
from bench_fakes import CPU, TINY, SlowGpu, no_memory, state, without_rotary

from m3kernels.bench import decode, decode_engine, model_shapes
from m3kernels.bench.model_shapes import SIZES

CEILINGS = {"copy_bytes_s": 1e9}
DECODE = decode.Cell("tiny", 2, 20, new_tokens=12)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)


def test_a_decoded_token_of_the_3b_reads_its_weights_and_its_cache():
    """``targets.md``: 6.86 GB of weights; a position of the cache is 26 x 2 x 8 x 128 x 2 bytes."""
    empty = model_shapes.decode_bytes(SIZES["3b"], 1, 0)
    assert empty == pytest.approx(6.86e9, rel=0.001)
    assert model_shapes.decode_bytes(SIZES["3b"], 1, 1000) - empty == 1000 * 26 * 2 * 8 * 128 * 2


def decoded(monkeypatch, cell=DECODE, **options) -> dict[str, dict]:
    monkeypatch.setattr(decode, "CELLS", (cell,))
    rows = list(decode.bench_decode(SlowGpu(), CEILINGS, size=("tiny",), **options))
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
    assert all(row["status"] in decode.show(row) for row in rows if row["ms_per_token"] is None)
    return {row["peer"]: row for row in rows}


def test_decoding_runs_and_what_is_not_compiled_is_not_called_compiled(monkeypatch):
    rows = decoded(monkeypatch)
    for peer in ("hf", "m3kernels"):
        row = rows[peer]
        assert row["status"] == "ok" and row["samples"] == 3 * (12 - 1 - decode.SETTLING), row
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_token"]) and row["ttft_ms"] > 0
        assert row["bytes_per_token"] == model_shapes.decode_bytes(TINY, 2, 26) and row["bandwidth_share"] > 0
        assert row["logits_error"] <= decode.BOUND / 4 and row["argmax_agreement"] > 0.8 and row["peak_gib"] > 0
    for peer in ("hf+compile", "m3kernels+compile"):
        assert rows[peer]["status"] == "failed" and "did not compile on cpu" in rows[peer]["reason"]
        assert rows[peer]["logits_error"] <= decode.BOUND / 4 and rows[peer]["ms_per_token"] is None


def test_our_engine_is_a_peer_on_the_same_parameters(monkeypatch):
    cell = decode.Cell("tiny", 2, 20, new_tokens=80)
    row = decoded(monkeypatch, cell, peers=("m3kernels+engine",))["m3kernels+engine"]
    # bursts of eight between the first, the second and the last
    assert row["status"] == "ok" and row["samples"] == 3 * 8, row
    assert row["logits_error"] <= decode.BOUND / 4 and row["ttft_ms"] > 0 and row["ms_per_token"] > 0

    forced = decode_engine.forced_logits
    monkeypatch.setattr(decode_engine, "forced_logits", lambda g, prompts, ids: forced(g, prompts, ids.flip(0)))
    row = decoded(monkeypatch, cell, peers=("m3kernels+engine",))["m3kernels+engine"]
    assert row["status"] == "WRONG"


def test_prompts_with_an_image_and_the_tower_alone(monkeypatch):
    peers = ("m3kernels", "m3kernels+engine", "hf+compile")
    rows = decoded(monkeypatch, decode.Cell("tiny", 1, 40, new_tokens=40, images=((16, 24),)), peers=peers[:2])
    assert [row["status"] for row in rows.values()] == ["ok"] * 3 and rows["hf"]["images"] == 1, rows
    rows = decoded(monkeypatch, decode.Cell("tiny", 1, 0, new_tokens=0, images=((16, 24), (8, 16))), peers=peers)
    for peer in ("hf", *peers[:2]):
        row = rows[peer]
        assert row["status"] == "ok" and row["logits_error"] < 0.02 and row["samples"] == 3 * decode.TOWER_CALLS, row
        assert row["ttft_ms"] is row["bytes_per_token"] is None
    assert rows["hf+compile"]["status"] == "missing"


@pytest.mark.slow
def test_compiled_decoding_is_one_graph_and_leaves_no_trace(monkeypatch):
    from transformers import CompileConfig

    config = CompileConfig(mode="default", backend="aot_eager")
    config._compile_all_devices = True
    built = model_shapes.build(TINY, "text", CPU).eval()
    monkeypatch.setattr(built, "generate", lambda *a, g=built.generate, **k: g(*a, compile_config=config, **k))
    monkeypatch.setattr(decode, "build", lambda *_: built)
    before = state(built)
    rows = decoded(monkeypatch, peers=("hf+compile", "m3kernels+compile"), quick=False)
    for peer in ("hf+compile", "m3kernels+compile"):
        assert rows[peer]["status"] == "ok", rows[peer]
        assert rows[peer]["graphs"] == 1 and rows[peer]["cudagraph_skips"] == 0
    assert state(built) == before


def test_wrong_logits_are_called_wrong(monkeypatch):
    monkeypatch.setitem(decode.PEERS, "wrong", decode.Peer((without_rotary,)))
    row = decoded(monkeypatch, peers=("wrong",))["wrong"]
    assert row["status"] == "WRONG" and row["ms_per_token"] is None and row["logits_error"] > decode.BOUND


def test_decoding_without_memory_or_time_is_a_row(monkeypatch):
    monkeypatch.setitem(decode.PEERS, "greedy", decode.Peer((no_memory,)))
    assert decoded(monkeypatch, peers=("greedy",))["greedy"]["status"] == "oom"
    assert decoded(monkeypatch, deadline=time.monotonic() - 1)["all"]["status"] == "skipped"
    monkeypatch.setitem(decode.PEERS, "hf", decode.Peer((no_memory,)))
    rows = decoded(monkeypatch, peers=("m3kernels",))
    assert rows["hf"]["status"] == "oom" and rows["m3kernels"]["status"] == "failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    assert decode.main(["--quick", "--size", "3b", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
