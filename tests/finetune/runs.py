"""Tiny checkpoints, configurations and whole runs for the tests of the trainer."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import tiny_checkpoint
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from m3kernels.bench.parallel_runs import keeping
from m3kernels.cli.demo_model import ModelSize
from m3kernels.models.finetune import build
from m3kernels.models.finetune.checkpoint import complete, read_record
from m3kernels.models.finetune.command import parse
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.finetune.metrics import METRICS, read_metrics
from m3kernels.models.finetune.trainer import finetune

SIZE = ModelSize(
    hidden=32, layers=2, heads=8, kv_heads=4, head_dim=8, intermediate=48, vision_hidden=24, vision_layers=2,
    vision_heads=2, vision_intermediate=32,
)  # fmt: skip
VOCAB = 1400
# quick and exact
OPTIONS = (
    "train.precision=fp64 train.train_iters=4 train.global_batch_size=4 dataset.num_workers=0 dataset.seq_length=512 "
    "optimizer.lr=1e-2 optimizer.adam_eps=1e-4 scheduler.lr_warmup_iters=2 validation.eval_interval=0 validation.eval_iters=2 "
    "checkpoint.save_interval=0 train.timeout_minutes=2 train.device=cpu"
)


def tiny(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint that four ranks can share, with weights large enough that every part matters."""
    return tiny_checkpoint.write(folder, vocab=VOCAB, size=SIZE, dtype=dtype)


def arguments(checkpoint: Path, *overrides: str, scheme: str = "none") -> list[str]:
    """Of ``m3kernels finetune``."""
    words = [*OPTIONS.split(), *(word for text in overrides for word in text.split())]
    # of an option that is named twice the last counts
    pairs = dict(word.split("=", 1) for word in words if not word.startswith("--"))
    flags = [word for word in words if word.startswith("--")]
    named = ["--pretrained-checkpoint", str(checkpoint), "--peft-scheme", scheme]
    return ["3b", *named, *flags, *(f"{key}={value}" for key, value in pairs.items())]


def config(checkpoint: Path, folder: Path, *overrides: str, scheme: str = "none") -> FinetuneConfig:
    made = parse(arguments(checkpoint, *overrides, scheme=scheme)).config
    return dataclasses.replace(made, dir=str(folder))


def folder_of(made: FinetuneConfig) -> Path:
    return Path(made.dir) / made.name


def checkpoints(made: FinetuneConfig) -> Path:
    return folder_of(made) / "checkpoints"


def run(made: FinetuneConfig) -> tuple[list[float], int]:
    """(loss of each step, how many are over); for the pool's ranks too."""
    result = finetune(made)
    return losses(result.folder), result.step


def run_keeping(made: FinetuneConfig) -> tuple[list[float], int]:
    """``run`` as where GPUs have room for the weights of other ranks."""
    with keeping(True), mock.patch.object(build, "parallelize", wraps=build.parallelize) as seen:
        found = run(made)
    assert not (seen.call_args.kwargs["shard_frozen"] or seen.call_args.kwargs["reshard_after_forward"])
    return found


def rows(folder: Path) -> list[dict]:
    return read_metrics(Path(folder) / METRICS)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def events(folder: Path) -> list[dict]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]


def record(made: FinetuneConfig) -> dict:
    """``run.json`` of the newest checkpoint."""
    return read_record(list(complete(checkpoints(made)).values())[-1])


def state(folder: Path) -> dict[str, Tensor]:
    """What the newest checkpoint of a run holds."""
    newest = sorted((Path(folder) / "checkpoints").glob("step-??????"))[-1]
    reader = FileSystemReader(newest)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
