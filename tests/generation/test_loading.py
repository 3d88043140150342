"""Checkpoints that are generated from: found and checked first, then loaded as they are, merged and patched."""

import json
import re

import pytest
import tiny_checkpoints
import torch
from PIL import Image
from transformers import Mistral3ForConditionalGeneration

from m3kernels import is_patched
from m3kernels.models.generation.loading import default_device, find, load
from m3kernels.models.generation.prompt import GenerationError
from m3kernels.models.ministral3 import AdapterError, CheckpointError
from m3kernels.parallel import ParallelError

IDS = torch.arange(100, 140)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_hugging_face_checkpoint_is_loaded_as_it_is():
    found = find(tiny_checkpoints.checkpoint())
    model = load(found)
    assert found.notices == () and found.config.text.max_positions == 128
    assert is_patched(model) and not model.training and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), logits(tiny_checkpoints.hugging_face()), rtol=1e-4, atol=1e-4)
    assert load(found, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_come_from_the_native_checkpoint(tmp_path):
    steps = tmp_path / "steps"
    tiny_checkpoints.copy(tiny_checkpoints.native(), steps / "step-000002")
    changed = tiny_checkpoints.copy(tiny_checkpoints.native(), steps / "step-000010")
    (steps / "step-000020").mkdir()
    found = find(tiny_checkpoints.checkpoint(), checkpoint_path=steps)
    assert found.folder == changed and any("step-000020 is not complete" in notice for notice in found.notices)
    assert torch.equal(
        logits(load(found)),
        logits(load(find(tiny_checkpoints.checkpoint(), checkpoint_path=tiny_checkpoints.native()))),
    )
    # only tokenizer and config are needed beside it
    bare = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert torch.equal(
        logits(load(find(bare, checkpoint_path=tiny_checkpoints.native()))),
        logits(load(find(tiny_checkpoints.checkpoint()))),
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_merged_as_peft_merges_it(dora):
    from peft import PeftModel

    found = find(tiny_checkpoints.checkpoint(), adapter=tiny_checkpoints.adapter(dora=dora))
    model = load(found)
    assert model.adapters is None and found.notices == () and is_patched(model)
    hf = Mistral3ForConditionalGeneration.from_pretrained(tiny_checkpoints.checkpoint())
    theirs = logits(PeftModel.from_pretrained(hf, tiny_checkpoints.adapter(dora=dora)).merge_and_unload().eval())
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - logits(tiny_checkpoints.hugging_face())).abs().max() > 0.1


def test_an_adapter_of_another_base_is_told():
    notices = find(tiny_checkpoints.checkpoint(), adapter=tiny_checkpoints.adapter(base="mistralai/Other-3")).notices
    assert notices == ("the adapter was trained on mistralai/Other-3; it fits tiny by its shapes",)


def test_adapters_of_other_shapes_are_refused_before_a_weight_is_read(tmp_path):
    from safetensors.torch import load_file, save_file

    other = tiny_checkpoints.copy(tiny_checkpoints.adapter(), tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    wide = {n: torch.zeros(2, 99) if "layers.0.self_attn.q_proj.lora_A" in n else t for n, t in tensors.items()}
    save_file(wide, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is \[2, 99\], the model's is \[2, 32\]: another base model"):
        find(tiny_checkpoints.checkpoint(), adapter=other)
    deep = {n.replace("layers.1.", "layers.7."): t for n, t in tensors.items()}
    save_file(deep, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="layers.7"):
        find(tiny_checkpoints.checkpoint(), adapter=other)
    with pytest.raises(CheckpointError, match="holds no adapter_model.safetensors"):
        find(tiny_checkpoints.checkpoint(), adapter=tiny_checkpoints.checkpoint())


def test_wrong_checkpoints_are_refused(tmp_path):
    for given, reason in [
        ({"hf_model_path": tmp_path / "none"}, "does not exist"),
        ({"hf_model_path": tmp_path}, "holds no checkpoint"),
        (
            {"hf_model_path": tiny_checkpoints.checkpoint(), "checkpoint_path": tmp_path},
            "holds no checkpoint, nor a complete iter_N",
        ),
        ({"hf_model_path": tiny_checkpoints.checkpoint(), "checkpoint_path": tmp_path / "x"}, "x does not exist"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            find(**given)
    other = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 9
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"another model.*num_hidden_layers \(9 there, 2 in"):
        find(other, checkpoint_path=tiny_checkpoints.native())
    with pytest.raises(CheckpointError, match="does not hold the model of its config.json; missing"):
        find(other)
    half = tiny_checkpoints.copy(tiny_checkpoints.checkpoint(), tmp_path / "half")
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        find(half)
    with pytest.raises(ParallelError, match="tp=3 does not divide"):
        find(tiny_checkpoints.checkpoint(), tp=3)


@pytest.mark.parametrize("kind, flag", [("model", "--hf-model-path"), ("adapter", "--adapter")])
def test_folders_of_a_finetune_say_where_its_model_is(kind, flag, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-000010"
    step.mkdir(parents=True)
    (step / "__0_0.distcp").touch()
    name = "config.json" if kind == "model" else "adapter_config.json"
    (tmp_path / "run" / kind).mkdir()
    (tmp_path / "run" / kind / name).write_text("{}")
    for path in (step, step.parent, tmp_path / "run"):
        with pytest.raises(CheckpointError, match=f"whose {kind} is {re.escape(str(tmp_path))}.*give that as {flag}"):
            find(tiny_checkpoints.checkpoint(), checkpoint_path=path)


def test_devices():
    assert default_device("cpu") == torch.device("cpu")
    with pytest.raises(GenerationError, match="allowed: auto, cuda, cpu"):
        default_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(GenerationError, match="sees no GPU"):
            default_device("cuda")


def test_an_image_is_seen():
    """The whole way from a picture to logits, beside Hugging Face's model."""
    prompt = tiny_checkpoints.chat().prompt("A", [Image.effect_noise((60, 90), 80).convert("RGB")])
    ids, pixels = torch.tensor([prompt.tokens]), torch.from_numpy(prompt.images[0])[None]
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]])}
    with torch.no_grad():
        ours, theirs = (
            load(find(tiny_checkpoints.checkpoint()))(**inputs).logits,
            tiny_checkpoints.hugging_face()(**inputs).logits,
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
