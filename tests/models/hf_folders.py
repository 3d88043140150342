"""Small Hugging Face checkpoints for the tests, saved by transformers: three sizes, three layouts, FP8."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3kernels.models.ministral3.files import CheckpointError
from m3kernels.models.ministral3.weights import INDEX, Checkpoint, runtime_name
from models import redraw, rope, text_config, vlm_config

# what tells the released sizes apart: the tie, theta, and head_dim beside hidden / heads
SIZES = {
    "3b": {"tied": True, "text": {}},
    "8b": {"tied": False, "text": {"hidden_size": 60}},
    "14b": {"tied": False, "text": {"rope_parameters": rope(rope_theta=1e9), "num_hidden_layers": 3}},
}
LAYOUTS = ("disk", "runtime", "text")
BLOCK = 32


def model(size: str = "8b", layout: str = "disk", dtype=torch.bfloat16, **text) -> nn.Module:
    """A model of a size, without a tower for the layout "text"."""
    from transformers import Ministral3ForCausalLM, Mistral3ForConditionalGeneration

    tied, text = SIZES[size]["tied"], SIZES[size]["text"] | text
    if layout == "text":
        made = Ministral3ForCausalLM(text_config(**text, tie_word_embeddings=tied))
    else:
        config = vlm_config(text={**text, "tie_word_embeddings": tied}, tie_word_embeddings=tied)
        made = Mistral3ForConditionalGeneration(config)
    return redraw(made).to(dtype).eval()


def save(folder: Path, size: str = "8b", layout: str = "disk", shard: str = "60KB", **options) -> Path:
    """What ``save_pretrained`` writes, renamed to runtime names for the layout "runtime"; with a tokenizer file."""
    model(size, layout, **options).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    if layout == "runtime":
        rewrite(folder, lambda tensors: {runtime_name(name): tensor for name, tensor in tensors.items()})
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by the name in its file."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def rewrite(folder: Path, change) -> None:
    """Replaces the tensors of each file by ``change`` of them; the index follows."""
    for path in sorted(folder.glob("*.safetensors")):
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    reindex(folder)


def reindex(folder: Path) -> None:
    """Writes the index anew from the files."""
    weight_map = {name: path.name for path in sorted(folder.glob("*.safetensors")) for name in load_file(path)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def edit_config(folder: Path, **changes) -> None:
    """Top-level keys of ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}, indent=2, sort_keys=True) + "\n")


def save_fp8(folder: Path, scale: str = "tensor", size: str = "8b") -> Path:
    """An Instruct checkpoint as released: text linears in E4M3 with scales, the rest in bf16.

    ``scale``: "tensor" (fp32 scalar), "one" (shape [1], bf16) or "block" (fp32, 32 x 32).
    """
    made = model(size, hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=6)
    made.save_pretrained(folder, max_shard_size="60KB")

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in tensors.items():
            if "language_model.model.layers" not in name or tensor.dim() < 2:
                out[name] = tensor
                continue
            weight = tensor.float()
            blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).abs().amax(dim=(1, 3))
            inverse = {
                "tensor": weight.abs().max() / 448,
                "one": (weight.abs().max() / 448).reshape(1).to(torch.bfloat16),
                "block": blocks / 448,
            }[scale]
            spread = inverse.float()
            if scale == "block":
                spread = spread.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            out[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[name + "_scale_inv"] = inverse
            out[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.37)
        return out

    rewrite(folder, quantise)
    quantization = {
        "activation_scheme": "static",
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK] if scale == "block" else None,
    }
    edit_config(folder, quantization_config=quantization)
    return folder


def load(folder: Path, dtype=torch.bfloat16) -> nn.Module:
    """What transformers reads; every name must fit."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config

    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForCausalLM if config["model_type"] == "ministral3" else AutoModelForImageTextToText
    fp8 = {}
    if quantization := config.get("quantization_config"):
        fp8 = {"quantization_config": FineGrainedFP8Config(**{**quantization, "dequantize": True})}
    made, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **fp8)
    scales = {key for key in info["unexpected_keys"] if key.endswith("_scale")}
    assert not info["missing_keys"] and not info["mismatched_keys"] and not set(info["unexpected_keys"]) - scales, info
    return made.eval()


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, so that equality is that of bits."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_identical(ours: Path, theirs: Path) -> None:
    """The same files with the same bytes."""
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    different = [p.name for p in theirs.iterdir() if p.read_bytes() != (ours / p.name).read_bytes()]
    assert not different, different


def fails(folder: Path, *says: str, check: bool = False) -> None:
    """Opening a checkpoint (``check``: comparing it with its config, too) raises an error that says all of these."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint = Checkpoint.open(folder)
        if check:
            checkpoint.check()
    for text in says:
        assert text in str(caught.value), str(caught.value)
