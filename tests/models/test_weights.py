"""Checkpoints as they are in the wild, under transformers' runtime names: layouts, parts, FP8, and every error."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from checkpoints import KINDS, fp8_checkpoint, save
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from m3kernels.models.ministral3 import hub, weights
from m3kernels.models.ministral3._files import CheckpointError
from m3kernels.models.ministral3.weights import Checkpoint, check_complete, expected_shapes

UP = "model.language_model.layers.1.mlp.up_proj.weight"


def runtime_state(model) -> dict:
    return {weights.runtime_name(name): value for name, value in model.state_dict().items()}


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["60KB", "1GB"])
def test_every_tensor_under_its_runtime_name(kind, shards, tmp_path):
    model = save(kind, tmp_path, shards)
    state = runtime_state(model)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.tied == (kind == "3B")
    if checkpoint.tied:
        del state[weights.HEAD]
    assert set(checkpoint.names) == set(state)
    for name, value in state.items():
        assert checkpoint.shape(name) == tuple(value.shape) and checkpoint.dtype(name) == value.dtype
        assert torch.equal(checkpoint.read(name), value), name
    check_complete(checkpoint)


def test_runtime_layout_on_disk(tmp_path):
    model = save("8B", tmp_path, "1GB")
    save_file({n: v.clone() for n, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.names) == set(model.state_dict())
    assert torch.equal(checkpoint.read(UP), model.state_dict()[UP])
    check_complete(checkpoint)


def test_only_the_asked_part_is_read(tmp_path, monkeypatch):
    value = runtime_state(save("14B", tmp_path))[UP]
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(weights, "safe_open", counting(weights.safe_open, whole := []))
    part = checkpoint.read(UP, (slice(3, 20), slice(5, 9)), torch.float64)
    assert torch.equal(part, value[3:20, 5:9].double())
    assert torch.equal(checkpoint.read(UP, (slice(80, None),)), value[80:])
    assert torch.equal(checkpoint.read(UP, (slice(None), slice(7))), value[:, :7])
    assert not whole
    checkpoint.read(UP)
    assert whole == [UP.replace("model.language_model", "language_model.model")]


def counting(real, whole: list):
    class Counting:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *exception):
            return self.file.__exit__(*exception)

        def get_tensor(self, name):
            whole.append(name)
            return self.opened.get_tensor(name)

        def get_slice(self, name):
            return self.opened.get_slice(name)

    return Counting


@pytest.mark.parametrize("index", [(slice(0, 999),), (slice(0, 8, 2),), (slice(0, 1),) * 3, (slice(9, 3),)])
def test_index_outside_the_tensor(index, tmp_path):
    save("8B", tmp_path)
    with pytest.raises(CheckpointError, match="up_proj"):
        Checkpoint.open(tmp_path).read(UP, index)


# blocks that divide every matrix: where they do not, transformers may derive another size than the one in the config
@pytest.mark.parametrize("block", [None, (4, 12)])
def test_fp8_is_what_transformers_dequantises(block, tmp_path):
    quantised = fp8_checkpoint("8B", tmp_path, block)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.scales) == {n.rpartition(".")[0] + end for n in quantised for end in weights.SCALES}
    from transformers import FineGrainedFP8Config

    config = FineGrainedFP8Config(dequantize=True, weight_block_size=block, modules_to_not_convert=["vision_tower"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    state = loaded.state_dict()
    assert state.keys() == set(checkpoint.names)
    for name in checkpoint.names:
        assert torch.equal(checkpoint.read(name), state[name]), name
    check_complete(checkpoint)


@pytest.mark.parametrize("block", [None, (12, 12), (32, 20)])
def test_fp8_parts_and_dtypes(block, tmp_path):
    quantised = fp8_checkpoint("8B", tmp_path, block)
    checkpoint = Checkpoint.open(tmp_path)
    weight, scale = quantised[UP]
    if block:
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[
            : weight.shape[0], : weight.shape[1]
        ]
    product = weight.float() * scale
    assert checkpoint.stored_dtype(UP) == torch.float8_e4m3fn and checkpoint.dtype(UP) == torch.bfloat16
    assert torch.equal(checkpoint.read(UP), product.bfloat16())
    assert torch.equal(checkpoint.read(UP, dtype=torch.float32), product)
    assert torch.equal(checkpoint.read(UP, (slice(5, 40), slice(13, 30))), product.bfloat16()[5:40, 13:30])
    # what a product in bf16 would have given is another tensor: the comparison above can fail
    assert not torch.equal(product.bfloat16(), weight.bfloat16() * scale.bfloat16())


def test_fp8_without_a_dtype_in_the_config_is_bf16():
    assert weights.config_dtype({}) == torch.bfloat16
    assert weights.config_dtype({"text_config": {"torch_dtype": "float16"}}) == torch.float16


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(next(n for n in t if n.endswith("scale_inv"))), "has no .*weight_scale_inv"),
        (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(())}), "lm_head.weight_scale_inv is a scale"),
        (lambda t: t.update({n: v.to(torch.uint8) for n, v in t.items() if n.endswith("scale_inv")}), "is U8"),
        (lambda t: t.update({n: v.float().to(torch.float8_e5m2) for n, v in t.items() if "norm" in n}), "F8_E5M2"),
        (lambda t: t.update({n: torch.ones(7, 5) for n in t if n.endswith("scale_inv")}), r"scales \(7, 5\)"),
    ],
)
def test_fp8_errors(change, message, tmp_path):
    fp8_checkpoint("8B", tmp_path, None)
    edit_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_truncated_and_corrupt_files_are_named(tmp_path):
    save("8B", tmp_path)
    path = tmp_path / "model-00002-of-00007.safetensors"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "is truncated"),
        (whole + b"0", "is corrupt"),
        (whole[:4], "is corrupt"),
        (b"\xff" * 8 + whole[8:], "is corrupt"),
        (whole[:8] + b"[" + whole[9:], "is corrupt"),
        (whole.replace(b'"data_offsets":[0,', b'"data_offsets":[4,'), "is corrupt"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is corrupt"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{path.name} {message}"):
            Checkpoint.open(tmp_path)


def test_index_errors(tmp_path):
    save("8B", tmp_path)
    index = tmp_path / weights.INDEX
    good = index.read_text()
    for change, message in (
        (lambda i: i["weight_map"].update(a="model-9.safetensors"), "lacks model-9.safetensors"),
        (lambda i: i["weight_map"].update({"a.b": "model-00001-of-00007.safetensors"}), "a.b in model-00001"),
        (lambda i: i["weight_map"].pop("vision_tower.ln_pre.weight"), "does not name .*vision_tower.ln_pre.weight"),
        (lambda i: i["weight_map"].update(a="../x.safetensors"), r"names \.\./x.safetensors"),
        (lambda i: i["weight_map"].update(a="x.bin"), "names x.bin"),
        (lambda i: i.pop("weight_map"), "no weight_map"),
    ):
        edit_json(index, change)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path)
        index.write_text(good)
    index.write_text(good[:50])
    with pytest.raises(CheckpointError, match="index.json is not JSON"):
        Checkpoint.open(tmp_path)


def test_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint.open(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(CheckpointError, match="only consolidated.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="pytorch_model.bin .*pickle"):
        Checkpoint.open(tmp_path)


def test_names_of_another_model(tmp_path):
    save("text", tmp_path, "1GB")
    path = tmp_path / "model.safetensors"
    edit_tensors(path, lambda t: t.update({"model.rotary.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="model.rotary.weight is none of"):
        Checkpoint.open(tmp_path)
    edit_tensors(
        path, lambda t: (t.pop("model.rotary.weight"), t.update({"language_model.model.norm.weight": torch.ones(48)}))
    )
    with pytest.raises(CheckpointError, match="are one tensor, model.language_model.norm.weight"):
        Checkpoint.open(tmp_path)


def swap_names(tensors):
    gate, up = (f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "down"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.language_model.norm.weight"),
        (
            lambda t: t.update({"model.layers.7.input_layernorm.weight": torch.ones(48)}),
            "has .*layers.7.input_layernorm",
        ),
        (
            lambda t: t.update({n: v.T.contiguous() for n, v in t.items() if "0.mlp.up" in n}),
            r"up_proj.weight \(48, 84\)",
        ),
        (swap_names, "wrong shape for .*down_proj.*gate_proj"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
    ],
)
def test_incomplete_checkpoints(change, message, tmp_path):
    save("text", tmp_path, "1GB")
    edit_tensors(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        check_complete(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    "config", [{"model_type": "llama"}, {"model_type": "mistral3", "text_config": {"model_type": "mistral"}}]
)
def test_expected_shapes_of_another_model(config):
    with pytest.raises(CheckpointError, match="is read"):
        expected_shapes(config, tied=False)


def test_where_a_checkpoint_is_not(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for model, message in (
        (str(tmp_path / "nowhere"), "does not exist"),
        ("./nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "no config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(model)
    with pytest.raises(CheckpointError, match="revision"):
        Checkpoint.open(tmp_path, revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and mistralai/none is not in the cache"):
        Checkpoint.open("mistralai/none")


@pytest.mark.parametrize(
    "name, message",
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "HF_TOKEN is not set"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_the_hub_says_no(name, message, monkeypatch):
    def refuse(*args, **options):
        error = getattr(errors, name)
        raise error.__new__(error)

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open("mistralai/none", revision="v9")


def test_a_hub_id_is_downloaded_without_the_second_copy(tmp_path, monkeypatch):
    save("text", tmp_path / "cache")
    asked = {}

    def download(model, revision, allow_patterns):
        asked.update(model=model, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("mistralai/some", "abc").names
    assert asked["model"] == "mistralai/some" and asked["revision"] == "abc"
    assert not any(shutil.fnmatch.fnmatch("consolidated.safetensors", pattern) for pattern in asked["patterns"])
    assert hub.is_path_like("a/b/c") and not hub.is_path_like("a/b")
