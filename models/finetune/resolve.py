"""Checks of a configuration before anything is loaded, and where a run's files go."""

import dataclasses
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.ministral3.recompute import RUN

DEFAULT_DIR = "m3kernels_runs"
# (field, smallest value)
AT_LEAST = (
    ("train.train_iters", 1),
    ("train.global_batch_size", 1),
    ("train.micro_batch_size", 1),
    ("train.timeout_minutes", 0.01),
    ("train.max_skipped", 0),
    ("model.tensor_model_parallel_size", 1),
    ("model.replicate", 1),
    ("peft.dim", 1),
    ("optimizer.lr", 0),
    ("optimizer.min_lr", 0),
    ("optimizer.weight_decay", 0),
    ("optimizer.clip_grad", 0),
    ("scheduler.lr_warmup_iters", 0),
    ("dataset.seq_length", 2),
    ("dataset.num_workers", 0),
    ("validation.eval_interval", 0),
    ("validation.eval_iters", 1),
    ("validation.generate_samples", 0),
    ("checkpoint.save_interval", 0),
    ("checkpoint.most_recent_k", 0),
)
ONLY_ONE = {
    "model.pipeline_model_parallel_size": "layers are not split over ranks",
    "model.context_parallel_size": "sequences are split over the tensor-parallel ranks",
}


def value(config: FinetuneConfig, name: str):
    """Of a field by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check(config: FinetuneConfig, ranks: int) -> None:
    """Raises FinetuneError where values do not fit together or to the number of processes."""
    _check_kinds(config)
    for name, least in AT_LEAST:
        if value(config, name) < least:
            raise FinetuneError(f"{name} is {value(config, name)}; allowed: from {least}")
    for name, reason in ONLY_ONE.items():
        if value(config, name) != 1:
            raise FinetuneError(
                f"{name} is {value(config, name)}; allowed: 1 ({reason}). Take model.tensor_model_parallel_size up to 8, or "
                "more ranks, which are data parallel"
            )
    if config.train.recompute not in ("auto", *RUN):
        raise FinetuneError(f"train.recompute is {config.train.recompute!r}; allowed: auto, {', '.join(RUN)}")
    if not 0 <= config.peft.dropout < 1:
        raise FinetuneError(f"peft.dropout is {config.peft.dropout}; allowed: from 0 to below 1")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config.optimizer, name) < 1:
            raise FinetuneError(f"optimizer.{name} is {getattr(config.optimizer, name)}; allowed: from 0 to below 1")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise FinetuneError(f"optimizer.min_lr {config.optimizer.min_lr} is above optimizer.lr {config.optimizer.lr}")
    if config.optimizer.name != "adamw" and config.train.precision == "bf16_stochastic":
        raise FinetuneError("train.precision=bf16_stochastic brings its own AdamW: leave optimizer.name at adamw")
    _check_data(config)
    tp, copies = config.model.tensor_model_parallel_size, config.model.replicate
    if ranks % (tp * copies):
        raise FinetuneError(
            f"{ranks} processes do not divide into model.tensor_model_parallel_size {tp} x model.replicate {copies}: start "
            f"torchrun with --nproc-per-node={tp * copies} or a multiple of it, or change these"
        )


def _check_kinds(config, before: str = "") -> None:
    """Values that a command line would not have let pass, such as numbers as text; configurations are also made in Python."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, kind, found = before + field.name, kinds[field.name], getattr(config, field.name)
        if dataclasses.is_dataclass(kind):
            _check_kinds(found, f"{name}.")
        elif typing.get_origin(kind) is typing.Literal:
            if found not in typing.get_args(kind):
                raise FinetuneError(f"{name} is {found!r}; allowed: {', '.join(typing.get_args(kind))}")
        elif not _is_of(found, kind):
            raise FinetuneError(f"{name} is {found!r}; it must be of type {getattr(kind, '__name__', kind)}")


def _is_of(found, kind) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_of(found, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(found, (tuple, list)) and all(_is_of(item, typing.get_args(kind)[0]) for item in found)
    if isinstance(found, bool):
        return kind is bool
    return isinstance(found, (int, float) if kind is float else kind)


def _check_data(config: FinetuneConfig) -> None:
    data = config.dataset
    if data.type == "hf" and not data.maker_name:
        raise FinetuneError("dataset.type=hf needs dataset.maker_name, such as make_cord_v2_dataset")
    if data.type in ("local", "preloaded") and not data.train_data_path:
        raise FinetuneError(f"dataset.type={data.type} needs dataset.train_data_path, a JSONL, JSON or parquet file")
    if data.type == "mock" and (data.maker_name or data.train_data_path):
        named = "dataset.maker_name" if data.maker_name else "dataset.train_data_path"
        raise FinetuneError(
            f"{named} is set, but dataset.type is mock: pass --dataset-type hf (makers) or local (files)"
        )


@dataclass(frozen=True)
class Folders:
    """Attributes: of the run, of its checkpoints, and where to resume from."""

    run: Path
    checkpoints: Path
    load: Path


def folders(config: FinetuneConfig) -> Folders:
    """By the configuration, and SAVE_DIR of the environment where that names none."""
    run = Path(config.dir or os.environ.get("SAVE_DIR") or DEFAULT_DIR) / config.name
    save = Path(config.checkpoint.save) if config.checkpoint.save else run / "checkpoints"
    return Folders(run, save, Path(config.checkpoint.load) if config.checkpoint.load else save)


def changes(old: dict, new: FinetuneConfig) -> list[str]:
    """Fields that differ from a record's, as ``name: before -> now``."""
    flat_old, flat_new = _flat(old), _flat(dataclasses.asdict(new))
    names = sorted(flat_old.keys() | flat_new.keys())
    pairs = [(n, flat_old.get(n), flat_new.get(n)) for n in names]
    return [f"{n}: {a} -> {b}" for n, a, b in pairs if _plain(a) != _plain(b)]


def _flat(nested: dict, before: str = "") -> dict:
    flat = {}
    for name, item in nested.items():
        flat |= _flat(item, f"{before}{name}.") if isinstance(item, dict) else {before + name: item}
    return flat


def _plain(item):
    return list(item) if isinstance(item, tuple) else item
