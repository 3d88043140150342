"""A model in one process saved as a Hugging Face checkpoint: what transformers, and from_pretrained, read back."""

import copy
import dataclasses
import json

import pytest
import torch
from hf_folders import LAYOUTS, SIZES, assert_identical, edit_config, save, save_fp8, tensors
from hf_folders import load as hf_load
from native import seen

import m3kernels
from m3kernels.models.ministral3 import CheckpointError, Config, Ministral3, layout
from m3kernels.models.ministral3.files import read_header
from m3kernels.models.ministral3.weights import INDEX, SINGLE, Checkpoint
from models import assert_same, batch_for, inputs, text_config, vlm_config


def same_weights(a: Ministral3, b: Ministral3) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", LAYOUTS)
def test_both_read_what_was_saved(tmp_path, size, names):
    source = save(tmp_path / "hf", size, names)
    ours = Ministral3.from_pretrained(source, dtype=torch.float64)
    report = ours.save_pretrained(tmp_path / "out")
    assert report.notices == [] and (tmp_path / "out" / SINGLE).exists()
    hf = hf_load(tmp_path / "out", torch.float64)
    batch = inputs(batch_for(hf))
    assert_same(seen(ours, batch), seen(hf, batch), 1e-6)  # transformers' norms are fp32 in any case
    assert same_weights(Ministral3.from_pretrained(tmp_path / "out"), ours)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float64"
    held = tensors(tmp_path / "out")
    assert ("lm_head.weight" in str(list(held))) != SIZES[size]["tied"]
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "out/generation_config.json").exists()


@pytest.mark.parametrize("names", ["disk", "text"])
def test_names_are_those_that_transformers_writes(tmp_path, names):
    source = save(tmp_path / "hf", "8b", names)
    Ministral3.from_pretrained(source).save_pretrained(tmp_path / "out")
    held, want = tensors(tmp_path / "out"), tensors(source)
    assert held.keys() == want.keys() and all(torch.equal(held[name], want[name]) for name in held)


def test_files_are_split(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 60_000)
    ours = Ministral3.from_pretrained(save(tmp_path / "hf", "14b"))
    ours.save_pretrained(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "out" / INDEX).exists()
    for path in files:
        header = read_header(path)
        assert header.nbytes <= 60_000 or len(header.entries) == 1
    assert same_weights(Ministral3.from_pretrained(tmp_path / "out"), ours)
    hf_load(tmp_path / "out")


@pytest.mark.parametrize("names", LAYOUTS[:2])
def test_with_the_layout_of_a_reference(tmp_path, names):
    source = save(tmp_path / "hf", "8b", names)
    Ministral3.from_pretrained(source).save_pretrained(tmp_path / "out", source)
    assert_identical(tmp_path / "out", source)
    report = Ministral3.from_pretrained(source).save_pretrained(tmp_path / "wide", source, dtype=torch.float32)
    saved = Checkpoint.open(tmp_path / "wide")
    assert report.nbytes == sum(header.nbytes for header in saved.files.values())
    assert saved.float_dtype == torch.float32 and {saved.dtype(name) for name in saved.names} == {torch.float32}
    assert saved.files.keys() == Checkpoint.open(source).files.keys()


@pytest.mark.parametrize("referenced", [False, True])
def test_from_fp8(tmp_path, referenced):
    source = save_fp8(tmp_path / "hf")
    ours = Ministral3.from_pretrained(source)
    ours.save_pretrained(tmp_path / "out", source if referenced else None, dtype=torch.float32)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert same_weights(Ministral3.from_pretrained(tmp_path / "out", dtype=torch.bfloat16), ours)
    hf_load(tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flag", [True, False])
def test_a_model_that_was_never_read(tmp_path, kind, tied, flag):
    """From a config alone, which the model's tie overrules."""
    config = text_config(tie_word_embeddings=flag) if kind == "text" else vlm_config(tie_word_embeddings=flag)
    ours = Ministral3(Config.from_hf(config, tied=tied)).double().eval()
    ours.save_pretrained(tmp_path / "out")
    hf = hf_load(tmp_path / "out", torch.float64)
    batch = inputs(batch_for(hf))
    assert_same(seen(ours, batch), seen(hf, batch), 1e-6)
    assert same_weights(Ministral3.from_pretrained(tmp_path / "out"), ours)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [type(hf).__name__]


def test_a_patched_copy(tmp_path):
    ours = Ministral3.from_pretrained(save(tmp_path / "hf", "8b"))
    patched = copy.deepcopy(ours)
    m3kernels.patch(patched)
    patched.save_pretrained(tmp_path / "out")
    assert same_weights(Ministral3.from_pretrained(tmp_path / "out"), ours)


def test_over_its_own_source(tmp_path):
    source = save(tmp_path / "hf", "3b")
    ours = Ministral3.from_pretrained(source)
    with torch.no_grad():
        ours.lm_head.weight += 1
    with pytest.raises(CheckpointError, match="pass --overwrite|overwrite"):
        ours.save_pretrained(source)
    ours.save_pretrained(source, overwrite=True)
    assert same_weights(Ministral3.from_pretrained(source), ours)
    assert (source / "tokenizer.json").read_text() == '{"a": 1}'


def test_refusals(tmp_path):
    source = save(tmp_path / "hf", "3b")
    ours = Ministral3.from_pretrained(source)
    with pytest.raises(CheckpointError, match="dtype torch.int8 is none of"):
        ours.save_pretrained(tmp_path / "out", dtype=torch.int8)
    with pytest.raises(CheckpointError, match="keep apart"):
        ours.save_pretrained(source, source, overwrite=True)
    edited = Ministral3.from_pretrained(source)
    edited.config.hf["text_config"]["intermediate_size"] += 2
    with pytest.raises(CheckpointError, match="of another shape: .*gate_proj"):
        edited.save_pretrained(tmp_path / "out")
    edited.config = dataclasses.replace(edited.config, hf=None)
    with pytest.raises(CheckpointError, match="the layout to write is not known"):
        edited.save_pretrained(tmp_path / "out")
    ours.lm_head.weight.data.fill_(1e6)
    with pytest.raises(CheckpointError, match="beyond float16"):
        ours.save_pretrained(tmp_path / "out", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_source_that_is_gone(tmp_path):
    source = save(tmp_path / "hf", "8b")
    edit_config(source, torch_dtype="bfloat16")
    ours = Ministral3.from_pretrained(source)
    source.rename(tmp_path / "moved")
    ours.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert same_weights(Ministral3.from_pretrained(tmp_path / "out"), ours)


def test_fp64_is_lossless(tmp_path):
    ours = Ministral3(Config.from_hf(text_config())).double()
    ours.save_pretrained(tmp_path / "out")
    again = Ministral3.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float64
    assert same_weights(again, ours)
