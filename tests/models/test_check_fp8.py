"""``m3kernels check --model`` on an FP8 checkpoint: its layers in FP8, patched, against the same weights dequantised."""

import argparse
import re

import pytest
import torch
from hf_folders import save, save_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from m3kernels.cli import check, main
from m3kernels.models.ministral3 import Ministral3
from m3kernels.parity import model as parity
from m3kernels.parity.core import relative_error
from m3kernels.patching import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def stays_fp8(monkeypatch):
    """FP8 layers without a GPU, too, where transformers would dequantise them."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)


def rows_of(folder, *more):
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    args = parser.parse_args(["--model", str(folder), "--tokens", "40", *more])
    return {row.output: row for row in check._own_model_rows(args, DEVICE)}


@pytest.mark.parametrize("scale", ["tensor", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_layers_are_the_dequantised_ones(scale, dtype, tmp_path, stays_fp8):
    rows = rows_of(save_fp8(tmp_path, scale), "--dtype", dtype)
    assert all(row.passed for row in rows.values()), rows
    # frozen in FP8; what is below them is reached through them
    assert {"logits", "loss", "d embeddings", "d norms"} <= set(rows) and not {"d attention", "d mlp"} & set(rows)


def test_a_wrong_fp8_layer_fails(tmp_path, stays_fp8, monkeypatch):
    right = fp8.fp8_linear
    monkeypatch.setattr(fp8, "fp8_linear", lambda *args, **options: 1.5 * right(*args, **options))
    rows = rows_of(save_fp8(tmp_path, "block"), "--dtype", "float32", "--no-gradients")
    assert set(rows) == {"logits", "loss"} and not rows["logits"].passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command_says_where_transformers_dequantises(tmp_path, capsys):
    given = ["--model", str(save_fp8(tmp_path, "block")), "--tokens", "40", "--small", "--dtype", "float32"]
    assert main(["check", *given, "--no-gradients"]) == 0
    said = capsys.readouterr().out
    assert "FP8 layers are not checked" in said and "0 failed" in said


@torch.no_grad()
def test_the_error_of_fp8_weights_is_printed(tmp_path, capsys):
    folder = save(tmp_path)
    rows_of(folder, "--dtype", "float32", "--no-gradients")
    said = re.search(
        r"activations in float32\) .* logits (\S+); the likeliest token stays at (\d+) of 40", capsys.readouterr().out
    )
    ids = parity.text_batch(Ministral3.from_pretrained(folder), DEVICE, 40)["input_ids"]
    plain, fp8_weights = (
        Ministral3.from_pretrained(folder, dtype=torch.float32, device=DEVICE, quantize=quantize)(ids).logits[0]
        for quantize in (None, "fp8")
    )
    assert float(said[1]) == pytest.approx(relative_error(fp8_weights, plain.double()), rel=0.01)
    assert int(said[2]) == (fp8_weights.argmax(-1) == plain.argmax(-1)).sum()


def test_wrong_scales_show_in_the_error_of_fp8_weights(monkeypatch):
    model, batch = parity.tiny_model(), parity.tiny_batch("cpu")
    before = parity.run_once(model, batch, gradients=False)["logits"]
    right, quantize = parity.fp8_weight_error(model, batch), parity.quantize_rows
    assert 1e-3 < right.logits < 0.3 and 0 < right.same <= right.tokens == 52
    assert torch.equal(parity.run_once(model, batch, gradients=False)["logits"], before)
    monkeypatch.setattr(parity, "quantize_rows", lambda weight: (quantize(weight)[0], quantize(weight)[1].roll(1)))
    wrong = parity.fp8_weight_error(model, batch)
    assert wrong.logits > 2 * right.logits and wrong.same < right.same
