"""Tiny checkpoint folders with Ministral 3's chat format: tekken.json, and the same as tokenizer.json with a template."""

import functools
import json
import tempfile
from pathlib import Path

import mistral_common
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

SPECIALS = 1000
WORDS = 4000
# Ministral 3 has these at these places, and the tool and think tokens after some that no text format uses
LATE_TOKENS = {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}
_kept = []


def write_tiny_tekken(path: Path, *, version: str = "v13") -> None:
    """mistral-common's tekken file cut to 4,000 words: a letter's id is 1000 + its byte."""
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tekken = json.loads(source.read_text(encoding="utf-8"))
    tekken["vocab"] = tekken["vocab"][:WORDS]
    tekken["config"] |= {"version": version, "num_vocab_tokens": WORDS, "default_vocab_size": SPECIALS + WORDS}
    specials = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    for rank in range(len(specials), 36):
        name = LATE_TOKENS.get(rank, f"<SPECIAL_{rank}>")
        specials.append({"rank": rank, "token_str": name, "is_control": True})
    tekken["special_tokens"] = specials
    tekken["image"] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    path.write_text(json.dumps(tekken, ensure_ascii=False), encoding="utf-8")


def write_tiny_processor(folder: Path, tekken: Path, *, template: bool = True) -> None:
    """The same tokenizer as transformers saves it, with mistral-common's own template, and a Pixtral processor's files."""
    fast = MistralConverter(str(tekken)).converted()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    if template:
        tokenizer.chat_template = convert_tokenizer_to_chat_template(str(tekken))
    tokenizer.save_pretrained(folder)
    PixtralImageProcessorPil(size={"longest_edge": 1540}, patch_size={"height": 14, "width": 14}).save_pretrained(
        folder
    )
    config = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    (folder / "processor_config.json").write_text(json.dumps(config))


@functools.cache
def mistral_folder(version: str = "v13") -> Path:
    folder = _folder()
    write_tiny_tekken(folder / "tekken.json", version=version)
    return folder


@functools.cache
def processor_folder(*, template: bool = True) -> Path:
    folder = _folder()
    write_tiny_processor(folder, mistral_folder() / "tekken.json", template=template)
    return folder


def _folder() -> Path:
    _kept.append(tempfile.TemporaryDirectory(prefix="m3kernels-data-"))
    return Path(_kept[-1].name)
