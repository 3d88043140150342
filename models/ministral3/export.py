"""What an export writes: the plan of every file, made and checked before anything is written."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from m3kernels.models.ministral3 import fp8
from m3kernels.models.ministral3.files import CODES, DTYPES, CheckpointError, Entry, Header, file_order, listing
from m3kernels.models.ministral3.layout import (
    SCALES_FILE,
    Layout,
    config_text,
    find_native,
    index_text,
    new_layout,
    read_layout,
)
from m3kernels.models.ministral3.state import StateDict
from m3kernels.models.ministral3.weights import (
    HEAD,
    SCALES,
    Checkpoint,
    expected_shapes,
    is_scale,
    runtime_name,
    shape_errors,
)

FLOATS = [dtype for dtype in CODES if dtype != torch.float8_e4m3fn]
# keys of config.json that say how a checkpoint was saved, not what model it is
SAVING = ("dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path")


class Weights(Protocol):
    """Tensors by runtime name: a ``Checkpoint``, or a model's state dict in memory."""

    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor: ...


def read_as(weights: Weights, name: str, dtype: torch.dtype, index: tuple[slice, ...] | None = None) -> Tensor:
    """A tensor in ``dtype``; CheckpointError where a value does not fit into float16's range."""
    tensor = weights.read(name, index, dtype)
    if dtype == torch.float16 and torch.isinf(tensor).any() and not torch.isinf(weights.read(name, index)).any():
        raise CheckpointError(f"{name} holds values beyond float16's 65504: choose bfloat16 or float32")
    return tensor


@dataclass(frozen=True)
class Plan:
    """Files of a Hugging Face checkpoint that is to be written, and where their tensors come from.

    Attributes:
        files: header of each file; ``index`` and ``config`` are the texts beside them (``index`` None: single file).
        scales: FP8 scales that are written, by runtime name; empty unless FP8 is written.
        others: folders whose tokenizer, processor and generation files are copied, later ones over earlier ones.
        notices: what the person who exports should know; grows while tensors are made.
    """

    weights: Weights
    files: dict[str, Header]
    index: str | None
    config: str
    scales: dict[str, Tensor]
    block: tuple[int, int]
    others: list[Path]
    notices: list[str] = field(default_factory=list)

    def tensors(self, file: str) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, tensor) in the order of the file, one at a time."""
        remade: dict[str, Tensor] = {}
        for name, entry in self.files[file].entries.items():
            runtime = runtime_name(name)
            if runtime.endswith("_scale_inv"):
                weight = runtime.removesuffix("_scale_inv")
                if runtime not in remade:
                    self._quantize(weight, remade)
                yield name, remade.pop(runtime)
            elif is_scale(runtime):
                yield name, self.scales[runtime]
            elif entry.dtype == "F8_E4M3":
                yield name, self._quantize(runtime, remade)
            else:
                yield name, self._read(runtime, entry)

    def _quantize(self, name: str, remade: dict[str, Tensor]) -> Tensor:
        """The E4M3 weight; its scale is put into ``remade``."""
        scale = self.scales[name + "_scale_inv"]
        quantized, remade[name + "_scale_inv"], outgrown = fp8.quantize(self.weights.read(name), scale, self.block)
        notice = f"{name} has outgrown its FP8 scale, which was made anew"
        if outgrown and notice not in self.notices:
            self.notices.append(notice)
        return quantized

    def _read(self, name: str, entry: Entry) -> Tensor:
        rows = slice(0, entry.shape[0]) if entry.shape and entry.shape != self.weights.shape(name) else None
        return read_as(self.weights, name, DTYPES[entry.dtype], rows and (rows,))


Source = str | os.PathLike | Mapping[str, Tensor] | nn.Module | StateDict


def plan_export(
    source: Source,
    hf_model: str | os.PathLike | None = None,
    *,
    to_fp8: bool = False,
    strict: bool = True,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plans the export of a native checkpoint (or the folder of its steps), a model or a state dict.

    Args:
        source: what is exported.
        hf_model: a Hugging Face checkpoint (folder or Hub id) whose layout, dtypes and config are written; by default
            what ``m3kernels.json`` of a native checkpoint keeps of its source, and the layout that transformers
            itself writes for a native model that came with a config.
        to_fp8: quantise what the layout has in FP8 against its scales; otherwise that is written in the layout's
            other dtype, without scales and without ``quantization_config``.
        strict: False leaves out what is missing or unknown, with a notice.
        dtype: of all tensors that are not quantised; by default the layout's, a model's own where it brings none.

    Raises:
        CheckpointError: no layout is known; tensors are missing, unknown or of another shape; FP8 was asked for and
            the layout has none; a dtype that safetensors has no name for.
    """
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype {dtype} is none of {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}")
    reference = None if hf_model is None else Checkpoint.open(hf_model)
    notices: list[str] = []
    if isinstance(source, (str, os.PathLike)):
        folder, notices = find_native(Path(source).expanduser())
        weights = Checkpoint.open(folder)
        kept = read_layout(folder)
    else:
        weights = source if isinstance(source, StateDict) else StateDict(source)
        folder, kept = None, None
    if reference:
        reference.check()
        layout = Layout.of(reference)
    elif kept:
        layout = kept
    elif folder is None and weights.config is not None:
        layout = new_layout(weights)
    else:
        raise CheckpointError(
            f"the layout to write is not known ({folder or 'a model'} brings no m3kernels.json): give --hf-model"
        )
    if to_fp8 and not layout.is_fp8:
        raise CheckpointError("--fp8 needs the scales of an FP8 checkpoint: import from one, or give one as --hf-model")
    scales = _scales(reference, folder) if to_fp8 else {}
    if dtype is not None:
        layout = layout.cast(dtype)
    config = _config(layout, None if folder is None else weights.config, reference is not None, to_fp8, notices)
    files = _files(weights, layout, json.loads(config), to_fp8, strict, notices)
    changed = {f: list(h.entries.items()) for f, h in files.items()} != {
        f: list(h.entries.items()) for f, h in layout.files.items()
    }
    index = index_text(files) if changed and layout.index else layout.index
    block = (json.loads(layout.config).get("quantization_config") or {}).get("weight_block_size") or fp8.BLOCK
    others = [other for other in (reference and reference.folder, folder) if other]
    if not others and weights.folder is not None and weights.folder.is_dir():
        others = [weights.folder]
    return Plan(weights, files, index, config, scales, tuple(block), others, notices)


def _scales(reference: Checkpoint | None, folder: Path | None) -> dict[str, Tensor]:
    if reference:
        return {name: reference.read_scale(name) for name in reference.scales}
    path = folder / SCALES_FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: give the FP8 source as --hf-model")
    return load_file(path)


def _config(layout: Layout, own: dict | None, referenced: bool, to_fp8: bool, notices: list[str]) -> str:
    """The ``config.json`` to write: the layout's text, unless the native checkpoint's says another model."""
    kept = json.loads(layout.config)
    text = layout.config
    if own is not None:
        differing = [key for key in sorted({*kept, *own}) if _model(kept).get(key) != _model(own).get(key)]
        if differing and referenced:
            notices.append(f"config.json of --hf-model is written; the checkpoint's differs in {listing(differing)}")
            sizes = [config.get("text_config", config).get("vocab_size") for config in (own, kept)]
            if sizes[0] != sizes[1]:
                raise CheckpointError(
                    f"the checkpoint's config.json has vocab_size {sizes[0]}, that of --hf-model {sizes[1]}: "
                    "give a reference with the same vocabulary"
                )
        elif differing:
            notices.append(f"the checkpoint's own config.json is written: it was changed in {listing(differing)}")
            saving = {key: kept[key] for key in SAVING if key in kept}
            text = config_text({**{key: value for key, value in own.items() if key not in SAVING}, **saving})
    config = json.loads(text)
    if "quantization_config" in config and not to_fp8:
        del config["quantization_config"]
        notices.append("FP8 weights are written unquantised, without quantization_config (--fp8 quantises them again)")
        text = config_text(config)
    return text


def _model(config: dict) -> dict:
    """A config without what only says how it was saved, at both levels."""
    return {
        key: _model(value) if isinstance(value, dict) else value for key, value in config.items() if key not in SAVING
    }


def _files(
    weights: Weights, layout: Layout, config: dict, to_fp8: bool, strict: bool, notices: list[str]
) -> dict[str, Header]:
    """The headers to write, after checking the weights against them."""
    named = {runtime_name(name) for header in layout.files.values() for name in header.entries if not is_scale(name)}
    expected = expected_shapes(config, tied=HEAD not in named)
    found = {name: weights.shape(name) for name in weights.names}
    missing, extra = named - found.keys(), found.keys() - named
    if not strict:
        for what, names in (("missing, left out", missing), ("not in the layout, left out", extra)):
            if names:
                notices.append(f"{what}: {listing(names)}")
        expected = {name: shape for name, shape in expected.items() if name not in missing}
        found = {name: shape for name, shape in found.items() if name not in extra}
    if errors := shape_errors(found, expected, padded=True):
        raise CheckpointError("the weights do not fit the layout to write; " + "; ".join(errors))
    for name, shape in found.items():
        if shape != expected[name]:
            notices.append(f"{name}: padding stripped, {shape[0]} rows to the vocabulary's {expected[name][0]}")
    files = {}
    for file, header in layout.files.items():
        entries = {}
        for name, entry in header.entries.items():
            runtime = runtime_name(name)
            if is_scale(name):
                weight = next(runtime.removesuffix(suffix) + ".weight" for suffix in SCALES if runtime.endswith(suffix))
                if to_fp8 and weight not in missing:
                    entries[name] = entry
            elif runtime not in missing:
                dtype = layout.float_dtype if entry.dtype == "F8_E4M3" and not to_fp8 else entry.dtype
                entries[name] = Entry(dtype, expected[runtime])
        if entries:
            files[file] = Header(_ordered(entries, header), header.metadata)
    if not files:
        raise CheckpointError("nothing is left to write: the weights hold no tensor of the layout")
    return files


def _ordered(entries: dict[str, Entry], source: Header) -> dict[str, Entry]:
    """In the order of the source's file where dtypes are as there; else as safetensors orders them."""
    if all(entry.dtype == source.entries[name].dtype for name, entry in entries.items()):
        return entries
    return {name: entries[name] for name in file_order(entries, {name: e.dtype for name, e in entries.items()})}
