"""Adapters on a sharded model are those of one process: training, masks, kernels and files."""

import adapter_jobs as jobs
import pytest
import torch
from hf_folders import save
from model_jobs import TEXT
from native import seen
from peft_twins import in_peft
from pool import run
from safetensors.torch import load_file

from models import FP32, FP64, assert_same, batch_for, build, distance, float64_islands

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
both = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.mark.parametrize("kind, dora", [("text", False), ("text", True), ("vlm", True)])
@pytest.mark.parametrize("tp, dp", LAYOUTS)
def test_four_steps_of_adamw(kind, dora, tp, dp):
    for one, many in run(tp * dp, jobs.train, kind, dora, tp, dp):
        assert_same(many, one, FP64)


def test_copies_of_shards():
    for one, many in run(4, jobs.train, "vlm", True, 1, 2, 2):
        assert_same(many, one, FP64)


@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2), (2, 2)])
def test_a_projector_trained_whole(tp, dp):
    for one, many in run(tp * dp, jobs.train, "vlm", True, tp, dp, 1, "", "model.multi_modal_projector"):
        assert "grad model.multi_modal_projector.linear_1.weight" in one
        assert_same(many, one, FP64)


@pytest.mark.parametrize(
    "wrong, grad",
    [
        ("norms not summed", "mlp.down_proj.lora_B"),
        ("gradients not summed", "self_attn.q_proj.lora_A"),
        ("gradients not summed", "self_attn.o_proj.lora_B"),
        ("gradients not summed", "mlp.down_proj.lora_magnitude"),
    ],
)
def test_what_is_left_out_is_seen(wrong, grad):
    ((one, many), *_) = run(2, jobs.train, "text", True, 2, 1, 1, wrong, "", 1)
    name = f"grad model.language_model.layers.0.{grad}"
    assert distance(many[name], one[name]) > 1e-2


@both
@pytest.mark.parametrize("tp, mode", [(2, "none"), (4, "none"), (2, "all")])
def test_dropout_is_that_of_one_process(dora, tp, mode):
    """Column layers draw one mask on all ranks, row layers their columns of one; and again in a recompute."""
    for one, many in run(tp, jobs.with_dropout, dora, tp, mode):
        assert_same(many, one, FP64 if mode == "none" else FP32)


def test_ranks_of_a_column_layer_drop_alike_and_those_of_a_row_layer_do_not():
    (column0, row0), (column1, row1) = run(2, jobs.masks, 2)
    assert torch.equal(column0, column1)
    # of equal masks all would agree, of independent ones half
    assert 0.4 < (row0 == row1).double().mean() < 0.6
    assert abs((row0 == 0).double().mean() - 0.5) < 0.05 and set(row0.unique().tolist()) == {0.0, 2.0}


@pytest.mark.interpreter
@pytest.mark.parametrize("dora, tp, dp", [(True, 2, 1), (False, 1, 2)])
def test_with_kernels(dora, tp, dp):
    """q, k, v and gate, up go together under sharding; a row layer's DoRA norm comes from all ranks."""
    layers = [3, 1, 2, 1] * 2
    for plain, ours, taken in run(tp * dp, jobs.with_kernels, dora, tp, dp, timeout_s=300):
        assert taken == layers + [1] * 3 + layers
        assert_same(ours, plain, 10 * FP32)


@pytest.mark.parametrize("kind, dora", [("text", False), ("vlm", True)])
@pytest.mark.parametrize("tp, dp, loaded", [(1, 1, [(2, 2)]), (2, 1, [(1, 2), (4, 1)]), (2, 2, [(1, 1), (2, 1)])])
def test_files_are_those_of_one_process(kind, dora, tp, dp, loaded, tmp_path):
    run(tp * dp, jobs.save, kind, dora, tp, dp, str(tmp_path))
    one = jobs.model_of(kind, dora)
    options = {**TEXT, "tie_word_embeddings": False}
    hf = build(kind, dtype=torch.float64, **(options if kind == "text" else {"text": options}))
    theirs, batch = in_peft(hf, tmp_path / "adapter"), batch_for(hf)
    with float64_islands():
        want = seen(one.eval(), batch)["logits"]
        assert distance(seen(theirs, batch)["logits"], want) <= 1e-10
        assert distance(seen(hf, batch)["logits"], want) > 1e-2
    one.save_pretrained(tmp_path / "one")
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for folder in ("merged", "in-place"):
        assert_same(load_file(tmp_path / folder / "model.safetensors"), expected, FP64)
    for layout in loaded:
        found = run(layout[0] * layout[1], jobs.load, kind, *layout, str(tmp_path / "adapter"))
        for state in found:
            assert_same(state, {n: p.detach() for n, p in one.named_parameters()}, 0.0)


def test_a_module_trained_whole_is_saved_from_shards(tmp_path):
    run(2, jobs.save, "vlm", False, 1, 2, str(tmp_path), "model.multi_modal_projector")
    one = dict(jobs.model_of("vlm", False).named_parameters())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = {n.removeprefix("base_model.model."): t for n, t in tensors.items() if "lora" not in n}
    assert len(whole) == 4
    assert_same(whole, {name: one[name].detach() for name in whole}, 0.0)


@both
def test_adapters_start_alike_in_every_layout(dora, tmp_path):
    folder = str(save(tmp_path / "hf", "8b", dtype=torch.bfloat16, **TEXT))
    want = run(1, jobs.fresh, folder, 1, 1, dora)[0]
    assert any(distance(want[1][name], want[0][name]) > 0.5 for name in want[0])
    for tp, dp in ((2, 1), (1, 2), (2, 2), (4, 1)):
        for found in run(tp * dp, jobs.fresh, folder, tp, dp, dora):
            for got, expected in zip(found, want):
                assert_same(got, expected, 0.0)


@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2)])
def test_fp32_adapters_beside_bf16_weights(tp, dp):
    for one, many in run(tp * dp, jobs.in_bf16, tp, dp):
        assert {grad.dtype for name, grad in many.items() if name != "loss"} == {torch.float32}
        assert_same(many, one, 5e-2)
