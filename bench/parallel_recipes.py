"""The recommended configurations of docs/finetune.md at their real shapes: steps of the trainer on mock data, optimizer included.

    torchrun --nproc-per-node=2 -m m3kernels.bench.parallel_recipes --out FILE.ndjson [--only 3b-none 8b-lora]

All weights of the 3B at tp 1, the 8B at tp 2, the 14B at tp 4; LoRA at 1, 1 and 2; data parallel over the other processes.
Weights are random and drawn on the GPUs, nothing is saved. Rows are appended to the file by rank 0; of a configuration that
cannot run the row says why.

    python -m m3kernels.bench.parallel_recipes --report FILE.ndjson ...     # the table in docs/parallel.md, from kept files
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from m3kernels.bench.model_shapes import SIZES, vlm_config
from m3kernels.bench.parallel import DOCS, fill, placed
from m3kernels.bench.results import commit
from m3kernels.cli.demo_data import write_tokenizer
from m3kernels.models import recipes
from m3kernels.models.finetune import build as building
from m3kernels.models.finetune.checkpoint import Checkpointer
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.metrics import METRICS, read_metrics
from m3kernels.models.finetune.process import process_group
from m3kernels.models.finetune.trainer import finetune
from m3kernels.models.ministral3.files import CODES
from m3kernels.models.ministral3.loading import to_empty
from m3kernels.models.ministral3.merging import is_adapter
from m3kernels.models.ministral3.weights import SINGLE, Checkpoint, expected_shapes
from m3kernels.patching.rules import prepare

BEGIN, END = "<!-- recipes -->", "<!-- /recipes -->"
WARMUP = 5
PRECISIONS = ("bf16_mixed", "bf16_stochastic")
TRAINED = {"none": "all weights"}
# what needs the most memory comes last: what is left of the processes after an error is not sure to run
NAMES = ("3b-lora", "8b-lora", "14b-lora", "3b-none", "14b-none", "8b-none")


@dataclass(frozen=True)
class Recipe:
    """One of ``NAMES``: a size, and what of it is trained; ``precision`` as ``train.precision``."""

    size: str
    scheme: str
    precision: str = PRECISIONS[0]

    @classmethod
    def of(cls, name: str, precision: str = PRECISIONS[0]) -> "Recipe":
        return cls(*name.split("-"), precision)

    @property
    def tp(self) -> int:
        size = recipes.SIZES[self.size]
        return size.tp_full if self.scheme == "none" else size.tp_peft

    def config(self, folder: Path, steps: int) -> FinetuneConfig:
        """As the recipe has it, but for what a run does besides its steps."""
        made = recipes.RECIPES[self.size](
            peft=None if self.scheme == "none" else self.scheme,
            pretrained_checkpoint=str(folder / self.size),
            dir=str(folder),
            name=f"{self.size}-{self.scheme}",
            precision_config=self.precision,
            train_iters=steps,
            eval_interval=0,
            save_interval=0,
        )
        return replace(made, checkpoint=replace(made.checkpoint, also_save_hf_checkpoint=False))


def write_shapes(folder: Path, size: str) -> None:
    """A checkpoint of a size: its config and tokenizer, and a file of weights that has a header and takes no disk."""
    config = vlm_config(SIZES[size])
    config.save_pretrained(folder)
    write_tokenizer(folder / "tekken.json")
    header, end = {}, 0
    for name, shape in expected_shapes(config.to_dict(), SIZES[size].tied).items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": CODES[torch.bfloat16], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / SINGLE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def drawn(model: nn.Module, checkpoint: Checkpoint, *, device: torch.device, progress: bool) -> None:
    """In the place of ``load``: random weights, each rank its part."""
    to_empty(model, device)
    prepare(model)
    std = checkpoint.config["text_config"]["initializer_range"]
    fill(((name, p) for name, p in model.named_parameters() if not is_adapter(name)), std)


@contextlib.contextmanager
def nothing_on_disk() -> Iterator[None]:
    """Weights are drawn instead of read, and checkpoints are not written: those of the 8B take 106 GB."""
    with mock.patch.object(building, "load", drawn), mock.patch.object(Checkpointer, "save", lambda *_: None):
        yield


def run(recipe: Recipe, folder: Path, steps: int) -> dict:
    """A row, the same on every rank but for its own memory."""
    ranks, on_gpu = dist.get_world_size(), torch.cuda.is_available()
    row = {"kind": "recipe", **asdict(recipe), "tp": recipe.tp, "steps": steps}
    config = recipe.config(folder, steps)
    if ranks % recipe.tp:
        return row | {"not_run": f"tp {recipe.tp} does not divide {ranks} processes"}
    began = time.perf_counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if dist.get_rank() == 0:
        write_shapes(folder / recipe.size, recipe.size)
    dist.barrier()
    try:
        with nothing_on_disk():
            ended = finetune(config)
        # the first rank writes what all read
        dist.barrier()
    # every rank has as much of everything, and runs out of it at one place
    except (FinetuneError, torch.OutOfMemoryError) as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        return row | {"not_run": str(error).splitlines()[0]}
    found = [step for step in read_metrics(ended.folder / METRICS) if "loss" in step]
    if len(found) < steps:
        return row | {"not_run": f"stopped after {len(found)} of {steps} steps"}
    timed = found[WARMUP:] or found
    speed = statistics.median(step["tokens_per_s"] for step in timed) / ranks
    return row | {
        "dp": ranks // recipe.tp,
        "optimizer": config.optimizer.name,
        "ms": 1e3 * statistics.median(step["seconds"] for step in timed),
        "tokens": statistics.median(step["tokens"] for step in timed),
        "tokens_per_s_gpu": speed,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "data_wait": statistics.median(step["data_wait"] for step in timed),
        "first_loss": found[0]["loss"],
        "last_loss": found[-1]["loss"],
        "seconds": time.perf_counter() - began,
        "gpu": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
    }


def show(row: dict) -> str:
    name = f"{row['size']:<3} {row['scheme']:<4} {row['precision']:<15} tp {row['tp']}"
    if "not_run" in row:
        return f"{name}  not run: {row['not_run']}"
    peak = "" if row["peak_gib"] is None else f"peak {row['peak_gib']:5.1f} GiB  "
    return (
        f"{name} dp {row['dp']}  {row['ms']:7.1f} ms a step of {row['tokens']:.0f} tokens  "
        f"{row['tokens_per_s_gpu']:6.0f} tokens/s a GPU  {peak}waits for data {row['data_wait']:.0%}  "
        f"loss {row['first_loss']:.4f} to {row['last_loss']:.4f}  {row['seconds']:.0f} s in all"
    )


def with_table(text: str, files: list[Path]) -> str:
    """The page with its table made anew from result files, in their order: what ran again replaces what did not."""
    rows = {}
    for file in files:
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            rows[row["size"], row["scheme"], row["precision"]] = row
    lines = [
        "| model | trained | precision | tp x dp | optimizer | ms a step | tokens a step | tokens/s a GPU | peak GiB a GPU | "
        "loss, first to last |"
    ]
    lines.append("|---|---|---|---|---|---:|---:|---:|---:|---:|")
    for row in rows.values():
        what = f"| {row['size']} | {TRAINED.get(row['scheme'], row['scheme'])} | {row['precision']} |"
        if "not_run" in row:
            lines.append(f"{what} {row['tp']} x – | – | – | – | – | – | {row['not_run'].split(':')[0]} |")
            continue
        lines.append(
            f"{what} {row['tp']} x {row['dp']} | {row['optimizer']} | {row['ms']:.0f} | {row['tokens']:.0f} | "
            f"{row['tokens_per_s_gpu']:.0f} | {row['peak_gib']:.1f} | {row['first_loss']:.2f} to {row['last_loss']:.2f} |"
        )
    some = next(row for row in rows.values() if "gpu" in row)
    return placed(text, BEGIN, END, lines, f"{some['gpu']}, torch {some['torch']}", files)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where rows are appended")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="run nothing, write the docs' table")
    args = parser.parse_args(argv)
    if args.report:
        DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), args.report), encoding="utf-8")
        return 0
    if args.out is None:
        parser.error("--out is missing: the file that rows are appended to")
    # the parent is torchrun, of all ranks
    folder = Path(tempfile.gettempdir()) / f"m3kernels-recipes-{os.getppid()}"
    with process_group(5) as process:
        for name in args.only:
            row = run(Recipe.of(name, args.precision), folder, args.steps)
            gc.collect()
            if process.device.type == "cuda":
                torch.cuda.empty_cache()
            if process.first:
                print(show(row), flush=True)
                with open(args.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        dist.barrier()
        if process.first:
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
