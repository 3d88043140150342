"""A tiny checkpoint with Mistral's tokenizer, its native twin, adapters for it, and what Hugging Face generates with it."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import runs
import tiny_checkpoint
import torch
from data_folders import SPECIALS, write_tiny_tekken
from prompts import by_transformers
from transformers import Mistral3ForConditionalGeneration

from m3kernels.models.generation.chat import Chat
from m3kernels.models.generation.prompt import Prompt
from m3kernels.models.ministral3 import AdapterConfig, Ministral3, add_adapters, save_adapter, targets_of
from m3kernels.models.ministral3.convert import import_checkpoint

_kept = []


def _folder() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="m3kernels-generation-"))
    return Path(_kept[-1].name)


@functools.cache
def checkpoint() -> Path:
    """With the newest tokenizer's control tokens, which it hardly ever says; it has rows for 400 text tokens."""
    folder = tiny_checkpoint.write(_folder() / "tiny", vocab=runs.VOCAB, size=runs.SIZE, says_text=True)
    write_tiny_tekken(folder / "tekken.json")
    tekken = json.loads((folder / "tekken.json").read_text(encoding="utf-8"))
    tekken["vocab"] = tekken["vocab"][: runs.VOCAB - SPECIALS]
    tekken["config"] |= {"num_vocab_tokens": runs.VOCAB - SPECIALS, "default_vocab_size": runs.VOCAB}
    (folder / "tekken.json").write_text(json.dumps(tekken, ensure_ascii=False), encoding="utf-8")
    return folder


@functools.cache
def native() -> Path:
    folder = _folder() / "native"
    import_checkpoint(checkpoint(), folder)
    return folder


@functools.cache
def chat() -> Chat:
    return Chat.open(checkpoint())


@functools.cache
def hugging_face() -> Mistral3ForConditionalGeneration:
    return Mistral3ForConditionalGeneration.from_pretrained(checkpoint()).eval()


@functools.cache
def adapter(*, dora: bool = False, base: str = "tiny") -> Path:
    """One that changes what the model says."""
    model = Ministral3.from_pretrained(checkpoint())
    add_adapters(model, AdapterConfig(rank=2, alpha=4, dora=dora), targets_of(model))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1.5)
    save_adapter(model, folder := _folder() / "adapter", base_name_or_path=base)
    return folder


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def expected(prompt: Prompt, new: int) -> str:
    """Greedy text by Hugging Face's generate."""
    return chat().decode(by_transformers(hugging_face(), prompt, new, eos_token_id=2))
