"""Tiny checkpoints of Ministral 3's shapes as transformers saves them, and as Instruct's FP8 ones are."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import build, rope

FP8 = torch.float8_e4m3fn
TIED = {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True}
SHAPES = {
    "3B": ("vlm", TIED),
    "8B": ("vlm", {}),
    "14B": ("vlm", {"text": {"rope_parameters": rope(rope_theta=1e9), "num_hidden_layers": 3}}),
    "text": ("text", {}),
}
KINDS = list(SHAPES)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save(kind: str, folder: Path, shards: str = "60KB", dtype=torch.float32) -> nn.Module:
    """The model, saved to ``folder`` with a tokenizer's and a processor's file beside it."""
    name, changes = SHAPES[kind]
    model = build(name, dtype=dtype, **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 17}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return model


def fp8_checkpoint(kind: str, folder: Path, block: tuple[int, int] | None) -> dict:
    """Saves Instruct's format in one file; (E4M3 weight, fp32 scales) of the quantised weights by runtime name."""
    save(kind, folder, "1GB", torch.bfloat16)
    path, quantised = folder / "model.safetensors", {}
    tensors = load_file(path)
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if "language_model.model.layers" not in name or module.split(".")[-1] not in PROJECTIONS:
            continue
        weight, scale = quantise(tensors[name].float(), block)
        tensors |= {name: weight, f"{name}_scale_inv": scale, f"{module}.activation_scale": torch.tensor(0.37)}
        quantised[name.replace("language_model.model", "model.language_model")] = (weight, scale)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": block,
        "dequantize": False,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return quantised


def quantise(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(FP8), scale
    rows, columns = weight.shape
    grid = [-(-rows // block[0]), -(-columns // block[1])]
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = weight
    parts = padded.reshape(grid[0], block[0], grid[1], block[1])
    scale = parts.abs().amax((1, 3)) / 448
    whole = (parts / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return whole.contiguous().to(FP8), scale
