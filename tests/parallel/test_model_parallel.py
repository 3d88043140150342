"""The sharded model is the whole one: every layout against one process in fp64."""

import itertools

import model_jobs as jobs
import pytest
import torch
from hf_folders import save
from pool import run

from models import FP32, FP64, assert_same, distance

LAYOUTS = [(tp, dp) for tp, dp in itertools.product((1, 2, 4), (1, 2)) if tp * dp > 1]


@pytest.mark.parametrize(
    "kind, tied, tp, dp", [("vlm", False, *layout) for layout in LAYOUTS] + [("text", True, 2, 1), ("text", True, 2, 2)]
)
def test_four_steps_of_adamw(kind, tied, tp, dp):
    for one, many in run(tp * dp, jobs.train, kind, tied, tp, dp):
        assert_same(many, one, FP64)


def test_copies_of_shards():
    for one, many in run(4, jobs.train, "vlm", False, 1, 2, 2):
        assert_same(many, one, FP64)


@pytest.mark.parametrize("freeze", ["vision_tower", "language_model", "layers", "multi_modal_projector"])
@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2)])
def test_frozen_parts(freeze, tp, dp):
    for one, many in run(tp * dp, jobs.train, "vlm", False, tp, dp, 1, freeze):
        assert_same(many, one, FP64)


@pytest.mark.parametrize("patched", [False, True], ids=["eager", "patched"])
@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2)])
def test_recompute_gives_the_same_bits(tp, dp, patched):
    for found in run(tp * dp, jobs.recomputed, tp, dp, patched):
        for mode in ("cheap", "attention", "all"):
            assert_same(found[mode], found["none"], 0.0)


@pytest.mark.interpreter
@pytest.mark.parametrize("tp, dp", [(2, 2)])
def test_with_kernels(tp, dp):
    """In the interpreter, or by the references; on the CPU in fp32, where rounding of other orders of sums is left."""
    for one, many in run(tp * dp, jobs.train, "vlm", False, tp, dp, 1, "", True, torch.float32, 2, timeout_s=300):
        assert_same(many, one, 4 * FP32)


def test_a_whole_parameter_whose_gradient_is_not_summed_is_seen():
    ((one, many), *_) = run(2, jobs.train, "vlm", False, 2, 1, 1, "", False, torch.float64, 1, True)
    for name in ("layers.0.input_layernorm.weight", "layers.1.post_attention_layernorm.weight"):
        name = f"grad model.language_model.{name}"
        assert distance(many[name], one[name]) > 1e-2


def test_whole_parameters_are_summed_in_one_collective():
    for together, apart in run(2, jobs.reductions):
        # two norms a layer, and the last
        assert apart - together == 4


@pytest.mark.parametrize("size, tp, dp", [("3b", 1, 2), ("3b", 2, 2), ("14b", 4, 1), ("14b", 2, 2)])
def test_weights_are_read_into_shards(tmp_path, size, tp, dp):
    from m3kernels.models.ministral3 import Ministral3

    folder = save(tmp_path / "hf", size, dtype=torch.float32, **jobs.TEXT)
    one = Ministral3.from_pretrained(folder, dtype=torch.float64)
    want = {name: p.detach() for name, p in one.named_parameters()}
    batch = jobs.text_batch(one)
    with torch.no_grad():
        want["logits"] = one(input_ids=batch["input_ids"]).logits
    parts = run(tp * dp, jobs.load_sharded, str(folder), tp, dp)
    for state, here, total in parts:
        assert_same(state, want, FP64)
        assert total == sum(p.numel() for p in one.parameters())
        # norms and vision are whole over tp
        assert here <= total / dp


@pytest.mark.parametrize("saved, loaded", [((2, 2), (1, 2)), ((2, 1), (4, 1)), ((1, 2), (2, 2))])
def test_checkpoints_load_in_another_layout(tmp_path, saved, loaded):
    folder = str(save(tmp_path / "hf", "3b", dtype=torch.float32, **jobs.TEXT))
    run(saved[0] * saved[1], jobs.save_dcp, folder, str(tmp_path / "dcp"), *saved)
    want, _, _ = run(2, jobs.load_sharded, folder, 2, 1)[0]
    want.pop("logits")
    for state in run(loaded[0] * loaded[1], jobs.load_dcp, folder, str(tmp_path / "dcp"), *loaded):
        assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)


@pytest.mark.parametrize("tp", [2, 4])
def test_caches(tp):
    for whole, parts in run(tp, jobs.cached, tp):
        assert distance(parts, whole) <= FP64


@pytest.mark.parametrize(
    "tp, text, message",
    [
        (8, {}, "tp=8 does not divide the 4 key-value heads; allowed: 1, 2, 4"),
        (4, {"vocab_size": 151}, "pad it to 152 rows with Ministral3.from_pretrained(..., pad_vocab_to=4)"),
        (4, {"intermediate_size": 82}, "intermediate_size 82"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tp, text, message):
    assert message in run(tp, jobs.errors, tp, text)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("tp", [2, 4])
def test_bfloat16_on_a_gpu(tp):
    """Splitting adds the rounding of partial sums, no more: each tensor stays within twice the error of one process."""
    for found in run(tp, jobs.on_a_gpu, tp, timeout_s=200):
        worse = {name: errors for name, errors in found.items() if not errors[1] <= 2 * errors[0] + 2e-3}
        assert not worse, worse


@pytest.mark.gpu
@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("kind, tied", [("text", True), ("vlm", False)])
def test_four_steps_over_nccl(kind, tied, tp, dp):
    if torch.cuda.device_count() < tp * dp:
        pytest.skip(f"needs {tp * dp} GPUs")
    found = run(tp * dp, jobs.train, kind, tied, tp, dp, 1, "", False, torch.float64, 4, False, "cuda", backend="nccl")
    for one, many in found:
        assert_same(many, one, FP64)
