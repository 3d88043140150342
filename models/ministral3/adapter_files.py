"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, with transformers' names."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from m3kernels.models.ministral3.adapted import (
    AdaptedLinear,
    AdapterConfig,
    AdapterError,
    adapted_layers,
    check_adapted,
)
from m3kernels.models.ministral3.files import (
    CODES,
    DTYPES,
    CheckpointError,
    Entry,
    Header,
    file_order,
    listing,
    read_header,
    read_json,
    write_safetensors,
    write_text,
)
from m3kernels.models.ministral3.layout import check_space, empty
from m3kernels.models.ministral3.merging import LORA_A, LORA_B, MAGNITUDE, is_adapter
from m3kernels.models.ministral3.shards import local_slices, part_of
from m3kernels.models.ministral3.state import StateDict
from m3kernels.models.ministral3.weights import EMBEDDING, HEAD, disk_name, runtime_name

if TYPE_CHECKING:
    from m3kernels.models.ministral3.model import Ministral3

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# ours, PEFT's
SUFFIXES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
# what every release of PEFT since 0.18 knows, and we write
WRITTEN = ("peft_type", "bias", "fan_in_fan_out", "init_lora_weights", "rank_pattern", "alpha_pattern")
# of PEFT's LoraConfig: values under which a file holds what we compute; the first is the default
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian"),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file: its name there and the parameter it is."""

    stored: str
    name: str


def save_adapter(
    model: "Ministral3",
    folder: str | os.PathLike,
    *,
    base_name_or_path: str | None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters, and modules that are trained whole beside them, as PEFT's ``save_pretrained`` does.

    ``PeftModel.from_pretrained`` puts them on transformers' model of the same weights. Every rank of a sharded model calls
    this; the first one writes and none returns before the folder is there. A model that is whole is saved by the rank
    that calls.

    Args:
        folder: appears when it is complete; a failure leaves what stood there.
        base_name_or_path: what PEFT is to load the adapters onto, a folder or a Hub id.
        dtype: of the file; the parameters' own by default.
        overwrite: replace an adapter that stands there.

    Raises:
        AdapterError: no adapters, or parts of a module trained that PEFT's format has no place for.
        CheckpointError: the folder is not free, its disk too small, or a dtype that safetensors has no name for.
    """
    check_adapted(model)
    names = dict(model.named_parameters()).keys()
    wholes = trained_whole(model)
    text_only = model.config.vision is None
    stored = {n: _stored_name(n, text_only) for n in names if is_adapter(n) or _inside(n, wholes)}
    state = model.state_dict()
    tensors = StateDict({name: state[name] for name in stored})
    config = _peft_config(model, [_hf_name(n, text_only) for n in wholes], base_name_or_path)
    rows = model.config.text.vocab_size

    def write() -> None:
        _write(Path(folder).expanduser().resolve(), tensors, stored, config, rows, dtype, overwrite)

    tensors.led(write) if tensors.sharded else write()


def _write(
    target: Path,
    tensors: StateDict,
    stored: Mapping[str, str],
    config: dict,
    vocab_size: int,
    dtype: torch.dtype | None,
    overwrite: bool,
) -> None:
    dtypes = {name: dtype or tensors.dtype(name) for name in tensors.names}
    if odd := {str(d) for d in dtypes.values() if d not in CODES}:
        raise CheckpointError(f"adapters in {listing(odd)} are not saved; allowed: {', '.join(DTYPES)}")
    # the file has no rows for the vocabulary's padding
    cut = {n: (slice(0, vocab_size),) if n in (EMBEDDING, HEAD) else None for n in tensors.names}
    shapes = {n: (vocab_size, *tensors.shape(n)[1:]) if cut[n] else tensors.shape(n) for n in tensors.names}
    entries = {stored[n]: Entry(CODES[dtypes[n]], shapes[n]) for n in tensors.names}
    order = file_order(entries, {name: entry.dtype for name, entry in entries.items()})
    header = Header({name: entries[name] for name in order}, {"format": "pt"})
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{target} is not empty: choose another folder, or pass overwrite=True")
        if not (target / CONFIG).exists():
            raise CheckpointError(f"{target} holds no {CONFIG}, so it is no adapter: overwrite=True would delete it")
    check_space(target, header.nbytes)
    half = target.with_name(target.name + ".tmp")
    if half.exists() and {path.name for path in half.iterdir()} - {CONFIG, WEIGHTS, WEIGHTS + ".tmp", CONFIG + ".tmp"}:
        raise CheckpointError(f"{half} is in the way and is no interrupted save: move it")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    runtime = {peft: name for name, peft in stored.items()}
    try:
        read = ((name, tensors.read(runtime[name], cut[runtime[name]], dtypes[runtime[name]])) for name in order)
        write_safetensors(half / WEIGHTS, header, read)
        write_text(half / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        empty(target)
        half.rename(target)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise


def _hf_name(name: str, text_only: bool) -> str:
    """A module's name in transformers' model, whose language model stands alone where there is no vision tower."""
    return disk_name(name, True) if text_only else name


def _stored_name(name: str, text_only: bool) -> str:
    module, _, part = _hf_name(name, text_only).rpartition(".")
    return f"{PREFIX}{module}.{SUFFIXES.get(part, part)}"


def _inside(name: str, modules: list[str]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def trained_whole(model: "Ministral3") -> list[str]:
    """The largest modules that are trained whole beside the adapters, as PEFT's ``modules_to_save`` has them.

    Raises:
        AdapterError: a module of which some parameters are trained and others are not, or adapted; a tied embedding.
    """
    if model.config.tied and model.lm_head.weight.requires_grad:
        raise AdapterError(
            "the embedding is trained and is the head, too; PEFT would load it into the embedding alone: freeze it, or "
            "save the whole model with save_pretrained"
        )
    found: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        parameters = list(module.parameters())
        trained = [p.requires_grad for p in parameters]
        adapted = any(isinstance(inner, AdaptedLinear) for inner in module.modules())
        if name and parameters and all(trained) and not adapted and type(module) is not nn.ModuleList:
            found.append(name)
            return
        own = {part: p for part, p in module.named_parameters(recurse=False) if not is_adapter(part)}
        if odd := [part for part, p in own.items() if p.requires_grad]:
            raise AdapterError(
                f"{name}.{odd[0]} is trained beside an adapter or a frozen parameter of its module; PEFT's format has "
                "adapters and whole modules: train all of the module without an adapter, or freeze it"
            )
        for part, child in module.named_children():
            visit(f"{name}.{part}".lstrip("."), child)

    visit("", model)
    return found


def _peft_config(model: "Ministral3", modules_to_save: list[str], base: str | None) -> dict:
    """What PEFT's ``LoraConfig`` is made from again."""
    config, text_only = model.adapters, model.config.vision is None
    return {key: allowed[0] for key, allowed in PLAIN.items() if key in WRITTEN} | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.dora,
        "use_rslora": False,
        # full names: a bare one would be found in the vision tower as well
        "target_modules": [_hf_name(name, text_only) for name in adapted_layers(model)],
        "modules_to_save": modules_to_save or None,
    }


def adapter_of(folder: str | os.PathLike) -> tuple[AdapterConfig, list[str]]:
    """What :func:`add_adapters` takes to make room for an adapter that was saved: its config, and names of its layers.

    Raises:
        CheckpointError: no adapter is there, or it is damaged.
        AdapterError: one that is not of the kinds that are computed here.
    """
    folder = Path(folder).expanduser()
    adapters, _, config = _read(folder)
    header = read_header(folder / WEIGHTS).entries
    ranks = {header[t.stored].shape[0] for t in adapters if t.name.endswith(LORA_A)}
    if len(ranks) != 1:
        raise AdapterError(f"{folder} has adapters of ranks {sorted(ranks)}; allowed: one rank for all layers")
    (rank,) = ranks
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    dtype = DTYPES[next(header[t.stored].dtype for t in adapters)]
    made = AdapterConfig(rank, scaling * rank, config.get("lora_dropout", 0.0), bool(config.get("use_dora")), dtype)
    return made, list(dict.fromkeys(t.name.rpartition(".")[0] for t in adapters))


@torch.no_grad()
def load_adapter(model: "Ministral3", folder: str | os.PathLike) -> None:
    """Reads adapters that PEFT or :func:`save_adapter` has written into those of the model, and modules saved whole.

    The model may be sharded in any way; each rank reads its own part. It has adapters of the file's rank, scaling and layers
    (``add_adapters(model, *adapter_of(folder))``); dropout and dtypes stay the model's.

    Raises:
        CheckpointError: no adapter is there, or it is damaged.
        AdapterError: the file's adapters are of another rank, scaling or kind, or for other layers; nothing was changed.
    """
    folder = Path(folder).expanduser()
    tensors = check_adapter(model, folder)
    state = model.state_dict(keep_vars=True)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for tensor in tensors:
            _read_into(state[tensor.name], file, tensor.stored)


def check_adapter(model: "Ministral3", folder: str | os.PathLike) -> list[_Stored]:
    """The tensors of an adapter that fits the model, which may be on the meta device; raises as :func:`load_adapter`."""
    check_adapted(model)
    folder = Path(folder).expanduser()
    adapters, others, _ = _read(folder)
    saved, layers = adapter_of(folder)
    _check_fits(model, folder, saved, layers)
    state = model.state_dict(keep_vars=True)
    header = read_header(folder / WEIGHTS).entries
    for tensor in (*adapters, *others):
        if tensor.name not in state:
            raise AdapterError(
                f"{folder} has {tensor.stored}, which is no parameter of this model: load its adapters only"
            )
        want, have = tuple(state[tensor.name].shape), header[tensor.stored].shape
        padded = tensor.name in (EMBEDDING, HEAD) and have[0] == model.config.text.vocab_size and have[1:] == want[1:]
        if want != have and not padded:
            raise AdapterError(
                f"{folder}: {tensor.stored} is {list(have)}, the model's is {list(want)}: another base model"
            )
    return [*adapters, *others]


def _read_into(parameter: Tensor, file, stored: str) -> None:
    part = part_of(parameter)
    if part.numel() == 0:
        return
    index = local_slices(parameter)
    read = file.get_tensor(stored) if index is None else file.get_slice(stored)[index]
    part[: len(read)].copy_(read)
    # the file has no rows for the vocabulary's padding
    part[len(read) :].zero_()


def _check_fits(model: "Ministral3", folder: Path, saved: AdapterConfig, layers: list[str]) -> None:
    ours, own = model.adapters, list(adapted_layers(model))
    remedy = "make the adapters with add_adapters(model, *adapter_of(folder))"
    for what in ("rank", "scaling", "dora"):
        theirs, here = getattr(saved, what), getattr(ours, what)
        if not math.isclose(theirs, here, rel_tol=1e-9):
            raise AdapterError(f"{folder} has {what} {theirs}, the model's adapters {here}: {remedy}")
    missing, extra = set(own) - set(layers), set(layers) - set(own)
    if missing or extra:
        differing = f"lacks {listing(missing)}" if missing else f"has {listing(extra)} beside the model's"
        raise AdapterError(f"{folder} is for other layers: it {differing}; {remedy}")


def _read(folder: Path) -> tuple[list[_Stored], list[_Stored], dict]:
    """(tensors of adapters, other tensors, the config) of a folder that PEFT wrote, under our names."""
    if not (folder / WEIGHTS).exists():
        found = " (adapter_model.bin can run code and is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{folder} holds no {WEIGHTS}{found}: give the folder that PEFT's save_pretrained wrote")
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise CheckpointError(f"{folder / CONFIG} has lora_alpha = {config.get('lora_alpha')!r}; allowed: a number")
    for key, allowed in PLAIN.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise AdapterError(f"{folder / CONFIG} has {key} = {value!r}; allowed: {', '.join(map(repr, allowed))}")
    adapters, others = [], []
    for stored in read_header(folder / WEIGHTS).entries:
        if not stored.startswith(PREFIX):
            raise CheckpointError(f"{folder / WEIGHTS}: {stored} does not begin with {PREFIX}: PEFT did not write it")
        name = stored.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.(?:(lora_A|lora_B)\.weight|lora_magnitude_vector(?:\.weight)?)", name)
        if match is None and "lora_" in name:
            raise AdapterError(
                f"{folder / WEIGHTS} has {stored}; allowed: lora_A, lora_B and magnitudes of linear layers"
            )
        if match is None:
            others.append(_Stored(stored, runtime_name(name)))
        else:
            adapters.append(_Stored(stored, f"{runtime_name(match[1])}.{match[2] or MAGNITUDE}"))
    if not adapters:
        raise CheckpointError(f"{folder / WEIGHTS} holds no adapter")
    return adapters, others, config
