"""The training bench on a CPU: shapes and FLOPs, every peer's way in and out, the check, what becomes of failures.

Liger and FlashAttention-4 are played by modules of the same names that compute with torch: what is tested is the bench.
"""

import json
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from bench_fakes import CPU, TINY, SlowGpu, fake_fa4, fake_liger, no_memory, raising, state, without_rotary

import m3kernels
from m3kernels.bench import decode, measure, model_shapes, train, train_peers
from m3kernels.bench.model_shapes import SIZES
from m3kernels.patching.api import unwrap

CEILINGS = {"copy_bytes_s": 1e9, "gemm_flops_s": {train.GEMM_CEILING: 1e12}}
TEXT, VISION = train.Cell("tiny", "text", "full", 64), train.Cell("tiny", "vision", "full", 64)
ONCE = measure.Budget(seconds=0.001, rounds=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A tiny size, few steps, and neither Liger nor FA4, wherever the suite runs."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(train, "FULL", ONCE)
    for name in ("liger_kernel", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)


def model_of(cell: train.Cell) -> torch.nn.Module:
    return model_shapes.adapt(model_shapes.build(SIZES[cell.size], cell.modality, CPU), cell.mode).train()


def rows_of(monkeypatch, *cells: train.Cell, **options) -> dict[str, dict]:
    """Peer -> row of the last cell; every row must survive JSON and have its line in the log."""
    monkeypatch.setattr(train, "CELLS", cells)
    rows = list(train.bench_train(SlowGpu(), CEILINGS, size=("tiny",), **options))
    rows = [json.loads(json.dumps(row, allow_nan=False)) for row in rows]
    assert all(row["status"] in train.show(row) for row in rows if row["ms"] is None)
    return {row["peer"]: row for row in rows}


@pytest.mark.parametrize(
    ("size", "modality", "billions"),
    [
        ("3b", "text", 3.43),
        ("8b", "text", 8.49),
        ("14b", "text", 13.51),
        ("3b", "vision", 3.85),
        ("8b", "vision", 8.92),
    ],
)
def test_real_shapes_have_the_released_models_parameters(size, modality, billions):
    model = model_shapes.build(SIZES[size], modality, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (size == "3b") and model.lm_head.weight.dtype == torch.bfloat16


def test_flops_are_the_targets():
    """``targets.md``: a full step of the 3B at 4k is 84 TFLOP of GEMM and 12.5 of attention, LoRA two thirds of it."""
    full = model_shapes.step_flops(SIZES["3b"], "text", "full", 1, 4096)
    layer = 3072 * 4096 * 2 + 3072 * 1024 * 2 + 3 * 3072 * 9216
    assert full.gemm == 6 * 4096 * (26 * layer + 131072 * 3072) == pytest.approx(84e12, rel=0.005)
    # two products of half a 4096 x 4096 square for each of 32 heads of 128, and 2.5 times that for the backward
    assert full.attention == 3.5 * 26 * 32 * 2 * 2 * 128 * 4096**2 / 2 == pytest.approx(12.5e12, rel=0.005)
    lora = model_shapes.step_flops(SIZES["3b"], "text", "lora", 1, 4096)
    adapters = 16 * (2 * (3072 + 4096) + 2 * (3072 + 1024) + 3 * (3072 + 9216))
    assert lora.gemm == 4 * 4096 * (26 * layer + 131072 * 3072) + 6 * 4096 * 26 * adapters
    assert lora.gemm == pytest.approx(2 / 3 * full.gemm, rel=0.015) and lora.attention == full.attention


def test_flops_of_the_tower_go_by_patches_and_only_forward_when_frozen():
    text, both = (model_shapes.step_flops(SIZES["3b"], m, "full", 1, 4096) for m in ("text", "vision"))
    patches = 70 * 100 + 50 * 60
    layers = 24 * (4 * 1024**2 + 3 * 1024 * 4096) * patches
    projector = (1024 * 4 * 1024 + 1024 * 3072 + 3072 * 3072) * patches // 4
    assert both.gemm - text.gemm == 6 * (layers + projector) + 4 * 3 * 14 * 14 * 1024 * patches
    assert both.attention - text.attention == 3.5 * 24 * 2 * 2 * (7000**2 + 3000**2) * 1024
    text, both = (model_shapes.step_flops(SIZES["3b"], m, "lora", 1, 4096) for m in ("text", "vision"))
    assert both.gemm - text.gemm == 2 * (layers + projector) + 2 * 3 * 14 * 14 * 1024 * patches


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_a_model_has_bf16_weights_fp32_frequencies_and_is_the_same_twice(modality):
    first, second = (model_shapes.build(TINY, modality, CPU) for _ in range(2))
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    frequencies = [b for n, b in first.named_buffers() if n.endswith("inv_freq")]
    assert frequencies and {b.dtype for b in frequencies} == {torch.float32}
    with pytest.raises(RuntimeError, match="inv_freq is torch.bfloat16"):
        model_shapes.check_rotary(first.to(torch.bfloat16))
    with torch.no_grad():
        next(b for n, b in second.named_buffers() if n.endswith("inv_freq")).mul_(0.5)
    with pytest.raises(RuntimeError, match="not what transformers computes"):
        model_shapes.check_rotary(second)


def test_images_have_no_labels_and_must_fit_the_sequence():
    batch = model_shapes.make_batch(TINY, "vision", 2, 64, CPU)
    image = batch["input_ids"] == model_shapes.IMAGE_TOKEN
    assert image.sum(1).tolist() == [sum(TINY.vision.tokens())] * 2
    assert (batch["labels"][image] == -100).all() and (batch["labels"][~image] >= 0).all()
    assert batch["image_sizes"].tolist() == [[16, 24], [8, 16]] * 2 and batch["pixel_values"].shape == (4, 3, 16, 24)
    with pytest.raises(ValueError, match="more than the sequence of 8"):
        model_shapes.make_batch(TINY, "vision", 1, 8, CPU)


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_adapters_are_on_the_text_linears_alone_in_bf16(modality):
    cell = train.Cell("tiny", modality, "dora", 64)
    trained = {n: p for n, p in model_of(cell).named_parameters() if p.requires_grad}
    assert len(trained) == TINY.layers * 7 * 3 and not any("vision" in n for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    assert sum(p.numel() for n, p in trained.items() if "magnitude" not in n) == TINY.adapters()
    assert all(p.any() for p in trained.values())


CELLS = (
    TEXT,
    train.Cell("tiny", "text", "full", 64, recompute=True),
    train.Cell("tiny", "text", "dora", 64),
    train.Cell("tiny", "vision", "full", 64, recompute=True),
    train.Cell("tiny", "vision", "lora", 64),
)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.label)
def test_every_kind_of_cell_runs_and_who_is_missing_says_so(monkeypatch, cell):
    rows = rows_of(monkeypatch, cell, peers=tuple(p for p in train.PEERS if "compile" not in p or "fa4" in p))
    runs = ("hf", "m3kernels", train_peers.NATIVE)
    for peer in runs:
        row = rows[peer]
        assert row["status"] == "ok" and row["reason"] == "" and row["samples"] >= 2, row
        assert row["p20"] <= row["ms"] <= row["p80"] and row["tokens_per_s"] == pytest.approx(64e3 / row["ms"])
        assert row["mfu"] == pytest.approx(row["flops"] / (1e9 * row["ms"]))
        assert row["attention"].startswith("sdpa (" if peer == "hf" else "m3kernels")
        assert row["peak_gib"] > row["weights_gib"] > 0 and 5 < row["loss"] < 8 and row["reference"] == "hf"
        assert all(row[f"{name}_error"] <= bound / 2 for name, bound in train.BOUND.items())
    assert rows["hf"]["grad_error"] == 0 < rows["m3kernels"]["grad_error"]
    for peer in rows.keys() - set(runs):
        assert rows[peer]["status"] == "missing" and "ModuleNotFoundError" in rows[peer]["reason"]
        assert rows[peer]["ms"] is None and rows[peer]["samples"] == 0


def test_without_fa4_compiling_with_sdpa_takes_part(monkeypatch):
    assert "hf+compile" in train_peers.default_peers(quick=True)
    fake_fa4(monkeypatch)
    assert "hf+compile" not in train_peers.default_peers(quick=True)
    assert set(train_peers.QUICK) <= set(train_peers.default_peers(quick=False)) <= set(train.PEERS)


@pytest.mark.parametrize("cell", [TEXT, VISION, train.Cell("tiny", "text", "lora", 64)], ids=lambda c: c.label)
def test_peers_do_what_their_names_say_and_leave_no_trace(monkeypatch, cell):
    liger, fa4 = fake_liger(monkeypatch), fake_fa4(monkeypatch)
    model, batch = model_of(cell), model_shapes.make_batch(TINY, cell.modality, 1, cell.seq, CPU)
    truth = train.observe(model, batch)
    before = state(model)
    for peer in ("hf+liger", "hf+liger+fa4", "m3kernels", "m3kernels+fa4"):
        with train_peers.become(model, train.PEERS[peer]):
            assert state(model) != before and m3kernels.is_patched(model) == peer.startswith("m3kernels")
            own = "m3kernels" if peer == "m3kernels" else "sdpa ("
            assert train_peers.attention_of(model, 1, 64).startswith("FA4" if "fa4" in peer else own)
            errors = train.compare(train.observe(model, batch), truth)
        assert errors.verdict() == ("ok", ""), (peer, errors)
        assert state(model) == before, peer
        assert set(liger) == ({"norm", "mlp", "rope", "loss"} if "liger" in peer else set()), peer
        assert bool(fa4) == ("fa4" in peer), peer
        liger.clear()
        fa4.clear()


@pytest.mark.parametrize("cell", [TEXT, train.Cell("tiny", "vision", "dora", 64)], ids=lambda c: c.label)
def test_compiled_layers_are_whole_graphs_shared_by_all_layers(monkeypatch, cell):
    fa4 = fake_fa4(monkeypatch)
    monkeypatch.setitem(train_peers.COMPILE, "backend", "aot_eager")
    model, batch = model_of(cell), model_shapes.make_batch(TINY, cell.modality, 1, cell.seq, CPU)
    truth = train.observe(model, batch)
    before, counters = state(model), torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()
    made = counters["unique_graphs"]
    for _ in range(2):
        with train_peers.become(model, train.PEERS["hf+compile+fa4"]):
            errors = train.compare(train.observe(model, batch), truth)
        assert errors.verdict() == ("ok", ""), errors
        assert set(fa4) == {"forward", "backward"} and state(model) == before
    # the loss, a text layer (its first has an input without a gradient where the embedding is frozen), a tower layer
    assert counters["unique_graphs"] - made == (2 if cell is TEXT else 4)
    torch.compiler.reset()


def _scaled_loss(model):
    return train_peers.attribute(unwrap(model), "_loss_function", _loss(lambda loss: 1.05 * loss))


def _halved_gradients(model):
    return train_peers.attribute(unwrap(model), "_loss_function", _loss(lambda loss: loss / 2 + loss.detach() / 2))


def _infinite_loss(model):
    return train_peers.attribute(unwrap(model), "_loss_function", _loss(lambda loss: loss * float("inf")))


def _loss(change):
    from transformers.loss.loss_utils import ForCausalLMLoss

    return lambda **inputs: change(ForCausalLMLoss(**inputs))


def _labels_off_by_one(model):
    from transformers.loss.loss_utils import ForCausalLMLoss

    shifted = lambda labels, **inputs: ForCausalLMLoss(labels=labels.roll(1, -1), **inputs)
    return train_peers.attribute(unwrap(model), "_loss_function", shifted)


def _one_gradient_lost(model):
    @contextmanager
    def part():
        weight = unwrap(model).model.layers[1].mlp.down_proj.weight
        hook = weight.register_hook(torch.zeros_like)
        yield
        hook.remove()

    return part()


WRONG = {
    _scaled_loss: "loss is 0.05",
    _halved_gradients: "grad_norm is 0.5",
    _infinite_loss: "loss is inf",
    _labels_off_by_one: "grad is",
    without_rotary: "grad is",
    _one_gradient_lost: "down_proj",
}


@pytest.mark.parametrize("part", WRONG, ids=lambda part: part.__name__)
def test_a_wrong_peer_is_called_wrong_and_has_no_time(monkeypatch, part):
    monkeypatch.setitem(train.PEERS, "wrong", (part,))
    row = rows_of(monkeypatch, TEXT, peers=("wrong",))["wrong"]
    assert row["status"] == "WRONG" and WRONG[part] in row["reason"], row["reason"]
    assert row["ms"] is row["tokens_per_s"] is row["mfu"] is row["peak_gib"] is None and row["samples"] == 0
    assert "WRONG" in train.show(row) and " ms" not in train.show(row)


def test_running_out_of_memory_is_a_row(monkeypatch):
    monkeypatch.setitem(train.PEERS, "greedy", (no_memory,))
    rows = rows_of(monkeypatch, TEXT, peers=("greedy", "m3kernels"))
    assert rows["greedy"]["status"] == "oom" and "out of memory" in rows["greedy"]["reason"]
    assert rows["hf"]["status"] == rows["m3kernels"]["status"] == "ok"


def test_where_hfs_logits_do_not_fit_the_others_are_compared_by_chunks(monkeypatch):
    monkeypatch.setitem(train.PEERS, "hf", (no_memory,))
    monkeypatch.setitem(train.PEERS, "wrong", (_labels_off_by_one,))
    rows = rows_of(monkeypatch, TEXT, peers=("m3kernels", "wrong"))
    assert rows["hf"]["status"] == "oom" and rows["hf"]["loss"] is None
    assert rows["m3kernels"]["status"] == "ok" and rows["m3kernels"]["reference"] == "hf, loss by chunks"
    assert rows["wrong"]["status"] == "WRONG"


def test_the_loss_by_chunks_is_hfs(monkeypatch):
    cell = train.Cell("tiny", "vision", "full", 1100)
    model, batch = model_of(cell), model_shapes.make_batch(TINY, "vision", 2, 1100, CPU)
    truth = train.observe(model, batch)
    with train_peers.become(model, (train_peers.loss_by_chunks,)):
        errors = train.compare(train.observe(model, batch), truth)
    assert max(errors.loss, errors.grad_norm) < 1e-3 and errors.grad < 0.02, errors


def test_without_anything_of_hfs_nobody_is_timed(monkeypatch):
    monkeypatch.setitem(train.PEERS, "hf", (raising(RuntimeError("broken")),))
    rows = rows_of(monkeypatch, TEXT, peers=("m3kernels",))
    assert rows["hf"]["status"] == rows["m3kernels"]["status"] == "failed"
    assert "broken" in rows["m3kernels"]["reason"] and rows["m3kernels"]["ms"] is None


def test_a_failure_while_timing_is_a_row(monkeypatch):
    calls = []

    @contextmanager
    def late(model):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setitem(train.PEERS, "late", (late,))
    row = rows_of(monkeypatch, TEXT, peers=("late",))["late"]
    assert row["status"] == "oom" and row["ms"] is None and row["loss_error"] == 0


def test_a_model_that_does_not_fit_is_one_row_a_cell(monkeypatch):
    monkeypatch.setattr(train, "build", raising(torch.OutOfMemoryError("CUDA out of memory")))
    rows = rows_of(monkeypatch, TEXT)
    assert rows.keys() == {"all"} and rows["all"]["status"] == "oom"


def test_after_the_deadline_every_cell_is_skipped_and_said(monkeypatch):
    rows = rows_of(monkeypatch, *CELLS[:2], deadline=time.monotonic() - 1)
    assert rows.keys() == {"all"} and rows["all"]["status"] == "skipped" and rows["all"]["recompute"]


def test_cells_are_told_apart_and_the_quick_ones_are_of_the_smallest_model():
    assert len({cell.label for cell in train.CELLS}) == len(train.CELLS)
    assert len({cell.label for cell in decode.CELLS}) == len(decode.CELLS)
    assert {cell.size for cell in (*train.cells_of(("3b", "8b"), True), *decode.cells_of(("3b", "8b"), True))} == {"3b"}
    assert [c.label for c in train.cells_of(("3b",), False, "lora S8192")] == ["3b text lora S8192 recomputed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    assert train.main(["--quick", "--size", "3b", "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
