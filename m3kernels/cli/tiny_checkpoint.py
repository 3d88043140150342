"""A tiny Ministral 3 checkpoint with random weights and Mistral's tokenizer, for trying commands without a download."""

import json
from pathlib import Path

import torch

from m3kernels.cli.demo_data import write_tokenizer
from m3kernels.cli.demo_model import ModelSize, build_model, model_config

# the whole of Mistral's vocabulary would be most of a tiny model
VOCAB, SPECIAL = 2000, 1000


def write(
    folder: str | Path,
    *,
    vocab: int = VOCAB,
    size: ModelSize = ModelSize(hidden=64, intermediate=128, vision_hidden=32, vision_heads=2, vision_intermediate=64),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    says_text: bool = False,
) -> Path:
    """Weights, config and ``tekken.json`` as a released checkpoint has them.

    Args:
        vocab: rows of the embedding: 1,000 control tokens and the first of Mistral's others, all 256 bytes among them.
        says_text: draw the rows of control tokens small, or half of what it generates would be these.
    """
    folder = Path(folder)
    model = build_model(model_config(vocab, size), seed=seed, device="cpu", dtype=dtype)
    if says_text:
        with torch.no_grad():
            for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                table[:SPECIAL] *= 0.1
    model.save_pretrained(folder)
    write_tokenizer(folder / "tekken.json")
    tekken = json.loads((folder / "tekken.json").read_text(encoding="utf-8"))
    if vocab < tekken["config"]["default_vocab_size"]:
        tekken["config"]["default_vocab_size"] = vocab
        tekken["vocab"] = tekken["vocab"][: vocab - SPECIAL]
        (folder / "tekken.json").write_text(json.dumps(tekken, ensure_ascii=False), encoding="utf-8")
    return folder
