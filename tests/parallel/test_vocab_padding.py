"""A vocabulary that ranks do not divide, padded: the model without padding, to the last step of training and on the disk."""

import pytest
import torch
import vocab_jobs as jobs
from hf_folders import save, tensors
from model_jobs import TEXT
from pool import run

from m3kernels.models.ministral3 import ConfigError, Ministral3
from models import FP32, FP64, VOCAB, assert_same

LAYOUTS = [(2, 1, 2), (4, 1, 4), (2, 2, 8), (1, 2, 8), (4, 1, 64), (1, 1, 8)]


@pytest.mark.parametrize(
    "kind, tied, tp, dp, multiple",
    [("text", True, *layout) for layout in LAYOUTS]
    + [("text", False, *layout) for layout in LAYOUTS[2:]]
    + [("vlm", False, *layout) for layout in LAYOUTS[:2]],
)
def test_training(kind, tied, tp, dp, multiple):
    """Up to 64: the last of four ranks has 64 rows of 256, all of them padding."""
    for one, many, zero in run(tp * dp, jobs.train, kind, tied, tp, dp, multiple):
        assert many["logits"].shape[-1] == VOCAB and zero
        assert_same(many, one, FP64)


@pytest.mark.interpreter
@pytest.mark.parametrize("tp, dp, multiple", [(1, 1, 8), (2, 1, 8)])
def test_with_kernels(tp, dp, multiple):
    args = (tp, dp, multiple, True, torch.float32)
    for one, many, zero in run(tp * dp, jobs.train, "text", True, *args, timeout_s=300):
        assert zero
        assert_same(many, one, 4 * FP32)


@pytest.mark.parametrize("size", ["3b", "8b"])
@pytest.mark.parametrize("tp, dp", [(1, 1), (4, 1), (2, 2), (1, 2)])
def test_read_with_padding_and_saved_without(tmp_path, size, tp, dp):
    folder = save(tmp_path / "hf", size, dtype=torch.float32, **{**TEXT, "vocab_size": VOCAB})
    whole = Ministral3.from_pretrained(folder)
    with torch.no_grad():
        logits = whole(input_ids=jobs.text_batch(whole)["input_ids"]).logits
    want = {name: p.detach() for name, p in whole.named_parameters()}
    for state, zero, rows in run(tp * dp, jobs.read_and_save, str(folder), str(tmp_path / "out"), tp, dp):
        assert zero and rows == 152
        assert_same({"": state.pop("logits")}, {"": logits}, 4 * FP32)
        assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
    held, source = tensors(tmp_path / "out"), tensors(folder)
    assert held.keys() == source.keys() and all(torch.equal(held[name], source[name]) for name in held)
    Ministral3.from_pretrained(tmp_path / "out")


def test_padding_has_no_ids():
    assert (
        run(2, jobs.refused_id, 2)
        == [
            f"vocab_parallel_embedding: an id lies outside [0, {VOCAB}): found 11 to 151; check the tokenizer's vocabulary"
        ]
        * 2
    )


def test_a_new_model_has_padding_of_zeros(tmp_path):
    folder = save(tmp_path / "hf", "8b")
    with pytest.raises(ConfigError, match="pad_vocab_to is 0; allowed: 1"):
        Ministral3.from_pretrained(folder, pad_vocab_to=0)
    model = Ministral3(Ministral3.from_pretrained(folder, pad_vocab_to=8).config)
    for table in (model.get_input_embeddings(), model.lm_head):
        assert table.weight.shape[0] == 152 and not table.weight[VOCAB:].any() and table.weight[:VOCAB].any()
