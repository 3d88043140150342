"""Small runs of the trainer for ``parallel_check``: a tiny vision-language model on packed samples with uneven images."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from m3kernels.cli import tiny_checkpoint
from m3kernels.cli.demo_model import ModelSize
from m3kernels.models.finetune import trainer
from m3kernels.models.finetune.checkpoint import complete
from m3kernels.models.finetune.command import parse
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.finetune.estimate import Memory, choose_recompute
from m3kernels.models.finetune.metrics import METRICS, read_metrics
from m3kernels.models.finetune.process import process_group

# eight key-value heads: up to tp 8
SIZE = ModelSize(
    hidden=128, layers=2, heads=16, kv_heads=8, head_dim=32, intermediate=256, vision_hidden=64, vision_layers=2,
    vision_heads=2, vision_intermediate=128,
)  # fmt: skip
STEPS, SAVED = 4, 2
# several forwards a step; eps as large as gradients, or the first step would be their sign
OPTIONS = (
    f"train.train_iters={STEPS} train.global_batch_size=6 dataset.type=local dataset.shuffle=False dataset.num_workers=0 "
    "dataset.seq_length=96 optimizer.lr=1e-2 optimizer.adam_eps=1e-4 scheduler.lr_warmup_iters=2 "
    f"validation.eval_interval=0 checkpoint.save_interval={SAVED} checkpoint.most_recent_k=0 "
    "checkpoint.also_save_hf_checkpoint=False train.timeout_minutes=2"
)
# (height, width) of each sample's images: two, none, one, ... so that forwards and ranks have unequal numbers of them
IMAGES = (((56, 84), (28, 112)), (), (), ((84, 28),), (), ((56, 56),), (), ((28, 28), (112, 56), (28, 56)))

Layout = tuple[int, int]
ALONE: Layout = (1, 1)


def layouts(ranks: int) -> list[Layout]:
    """(tp, dp) of every mesh of so many processes."""
    return [(tp, ranks // tp) for tp in (1, 2, 4, 8) if ranks % tp == 0]


def run_name(scheme: str, precision: str, layout: Layout) -> str:
    return f"{scheme}-{precision}-tp{layout[0]}dp{layout[1]}"


def prepare(folder: Path) -> None:
    """The checkpoint and the data of all runs; the folder is there when they are."""
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    # in bf16: then runs in bf16 begin with the weights of those in fp64
    tiny_checkpoint.write(made / "tiny", vocab=1400, size=SIZE, dtype=torch.bfloat16)
    rng, rows = np.random.default_rng(0), []
    for i, sizes in enumerate(IMAGES):
        names = [f"{i}-{n}.png" for n in range(len(sizes))]
        for name, size in zip(names, sizes):
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(made / name)
        question = "<image>" * len(sizes) + f"What is it, number {i}?"
        answer = " ".join(["tea"] * (2 + 3 * i % 7))
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": chat, "images": names}))
    (made / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    made.rename(folder)


class Runs:
    """Runs in one folder, each under a name of its own, and what they gave.

    Args:
        folder: made by ``prepare``.
        device: as ``train.device``.

    Attributes:
        failed: by name, what a run raised.
        seconds: by name, how long it took.
    """

    def __init__(self, folder: Path, device: str = "auto"):
        self.folder, self.device = folder, device
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def config(self, name: str, scheme: str, precision: str, tp: int, *overrides: str) -> FinetuneConfig:
        words = [*OPTIONS.split(), f"dataset.train_data_path={self.folder}/train.jsonl"]
        words += [f"train.precision={precision}", f"model.tensor_model_parallel_size={tp}", f"name={name}"]
        words += [f"train.device={self.device}"]
        words += [f"dir={self.folder}", f"peft.scheme={scheme}", f"checkpoint.pretrained_checkpoint={self.folder}/tiny"]
        # of an option that is named twice the last counts
        pairs = dict(word.split("=", 1) for word in (*words, *overrides))
        return parse(["3b", *(f"{key}={value}" for key, value in pairs.items())]).config

    def run(self, name: str, *args: str | int) -> None:
        """A run on all processes of the group; ``args`` as ``config`` has them. What it raises is kept, not raised."""
        said, began = io.StringIO(), time.perf_counter()
        try:
            with contextlib.redirect_stdout(said):
                trainer.finetune(self.config(name, *args))
        # where only some ranks raise, the trainer's watch ends the others
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name}: {self.failed[name]}\n{said.getvalue()[-2000:]}", file=sys.stderr, flush=True)
        self.seconds[name] = time.perf_counter() - began

    def whole(self, scheme: str, precision: str, layout: Layout, kept: bool | None = None) -> str:
        """A run from the pretrained weights; its name. ``kept``: as ``keeping`` has it; None leaves that to the trainer."""
        name = run_name(scheme, precision, layout) + ("-kept" if kept else "")
        with contextlib.nullcontext() if kept is None else keeping(kept):
            self.run(name, scheme, precision, layout[0])
        return name

    def reshard(self, scheme: str, written: Layout, read: Layout) -> str:
        """A run that goes on from what another layout's run saved in the middle; its name."""
        source = run_name(scheme, "fp64", written)
        middle = self.folder / f"middle-of-{source}"
        if dist.get_rank() == 0 and not middle.exists():
            middle.mkdir()
            step = f"step-{SAVED:06}"
            (middle / step).symlink_to(self.folder / source / "checkpoints" / step)
        dist.barrier()
        name = f"{source}-to-tp{read[0]}dp{read[1]}"
        self.run(name, scheme, "fp64", read[0], f"checkpoint.load={middle}")
        return name

    def weights(self, name: str) -> dict[str, Tensor]:
        """The trained weights at the end of a run.

        Raises:
            KeyError: it has no checkpoint of its last step.
        """
        reader = FileSystemReader(complete(self.folder / name / "checkpoints")[STEPS])
        entries = reader.read_metadata().state_dict_metadata
        found = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
            for key, entry in entries.items()
            if key.startswith("weights.")
        }
        with warnings.catch_warnings():
            # that one process alone reads, which is what is asked for
            warnings.simplefilter("ignore")
            dcp.load(found, storage_reader=reader, no_dist=True)
        return found

    def seen(self, name: str, key: str) -> list[float]:
        """The ``loss`` or ``grad_norm`` of each step."""
        return [row[key] for row in read_metrics(self.folder / name / METRICS) if key in row]


def alone(runs: Runs, jobs: list[tuple]) -> list[str]:
    """Runs in one process; their names. ``jobs``: a method of ``Runs`` and its arguments each.

    In a process of their own: NCCL of torch 2.11 dies (SIGSEGV) where a second group in one process makes a mesh.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        names, failed, seconds = pool.submit(_alone, runs.folder, runs.device, jobs).result()
    runs.failed |= failed
    runs.seconds |= seconds
    return names


def _alone(folder: Path, device: str, jobs: list[tuple]) -> tuple[list[str], dict[str, str], dict[str, float]]:
    # torchrun's, of the parent
    os.environ.pop("RANK", None)
    runs = Runs(folder, device)
    with process_group(2, device):
        return [getattr(runs, method)(*args) for method, *args in jobs], runs.failed, runs.seconds


@contextlib.contextmanager
def keeping(kept: bool) -> Iterator[None]:
    """Data-parallel ranks keep the weights that they gather, or do not, whatever their memory."""

    def chosen(*args) -> Memory:
        return replace(choose_recompute(*args), kept=int(kept))

    with mock.patch.object(trainer, "choose_recompute", chosen):
        yield


@contextlib.contextmanager
def shared_meshes() -> Iterator[None]:
    """Runs of one layout share their mesh: each makes communicators otherwise."""
    with mock.patch.object(trainer, "make_mesh", functools.cache(trainer.make_mesh)):
        yield
