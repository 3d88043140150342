"""Steps of the native model over the GPUs of one host: time, memory, and that loss and gradient norm are those of one GPU.

    python -m m3kernels.bench.parallel --out FILE.ndjson                                # one GPU: what the others stand beside
    torchrun --nproc-per-node=2 -m m3kernels.bench.parallel --tp 1 2 --out FILE.ndjson  # the others split the batch

A step is forward and backward without an optimizer, of the patched model with random weights; every data-parallel rank has
the same rows, so that loss and norm do not depend on the layout. Options with several values make a cell of each
combination. Rows are appended to the file by rank 0, one step more under the profiler says what the GPU did.

    python -m m3kernels.bench.parallel --report FILE.ndjson ...     # the table in docs/parallel.md, from kept files
"""

import argparse
import gc
import itertools
import json
import operator
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import m3kernels
from m3kernels.bench import parallel_peers
from m3kernels.bench.model_shapes import ALPHA, RANK, SIZES, make_batch, step_flops, text_config
from m3kernels.bench.overlap import trace
from m3kernels.bench.results import commit
from m3kernels.models.finetune import adamw
from m3kernels.models.finetune.run import collecting_garbage_together
from m3kernels.models.ministral3 import Config, Ministral3
from m3kernels.models.ministral3.adapters import AdapterConfig, add_adapters, targets_of
from m3kernels.models.ministral3.loading import local_slices, part_of, to_empty
from m3kernels.models.ministral3.merging import is_adapter
from m3kernels.models.ministral3.parallel import parallelize
from m3kernels.models.ministral3.recompute import RUN, set_recompute
from m3kernels.models.ministral3.weights import runtime_name
from m3kernels.parallel import make_mesh

DOCS = Path(__file__).parents[1] / "docs" / "parallel.md"
BEGIN, END = "<!-- gpus -->", "<!-- /gpus -->"
OURS, HF_TP, HF_LIGER = "m3kernels", "hf tp_plan", "hf+liger"
PEERS = (OURS, HF_TP, HF_LIGER)
MODES = ("full", "lora", "dora")


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        batch: rows on each data-parallel rank.
        keep: data-parallel ranks have frozen weights whole, and trained ones from forward to backward.
    """

    size: str
    tp: int
    seq: int
    mode: str
    peer: str
    batch: int
    recompute: str
    keep: bool = False

    def why_not(self, ranks: int) -> str:
        """Why it cannot run on so many processes; empty where it can."""
        if ranks % self.tp:
            return f"tp {self.tp} does not divide {ranks} processes"
        if self.peer == HF_TP and not 1 < self.tp == ranks:
            return f"transformers shards over all processes: tp must be {ranks}, and above 1"
        if self.peer == HF_LIGER and self.tp > 1:
            return "Liger's parts know no tensor parallelism"
        if self.peer != OURS and (self.mode != "full" or self.recompute != "none" or self.keep):
            return "peers train all weights, recompute nothing and let go of what they gather"
        return ""


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, Tensor]], std: float) -> None:
    """Random values in place, the same for every layout and peer: each tensor is drawn whole, from its name, and cut."""
    for name, parameter in parameters:
        part = part_of(parameter)
        generator = torch.Generator(part.device).manual_seed(zlib.crc32(runtime_name(name).encode()))
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=part.device)
        whole = whole.fill_(1) if whole.dim() == 1 else whole.normal_(0, std, generator=generator)
        part.copy_(whole[local_slices(parameter) or ()])


def draw(model: Ministral3, device: torch.device, std: float) -> None:
    """Memory for a model on meta, with random values."""
    to_empty(model, device)
    fill(model.named_parameters(), std)


def build(cell: Cell, device: torch.device, mesh: DeviceMesh | None, stack: ExitStack) -> nn.Module:
    """A peer's model, as it is until ``stack`` ends."""
    size = SIZES[cell.size]
    if cell.peer == OURS:
        return build_ours(cell, device, mesh)
    model = parallel_peers.tensor_parallel(size) if cell.peer == HF_TP else parallel_peers.whole(size, device)
    fill(model.named_parameters(), size.std)
    if cell.peer == HF_LIGER:
        parallel_peers.with_liger(model, None if mesh is None else mesh["dp"], stack)
    model.config.use_cache = False
    return model.train()


def build_ours(cell: Cell, device: torch.device, mesh: DeviceMesh | None) -> Ministral3:
    with torch.device("meta"):
        model = Ministral3(Config.from_hf(text_config(SIZES[cell.size]))).to(torch.bfloat16)
    if cell.mode != "full":
        options = {"rank": RANK, "alpha": ALPHA, "dora": cell.mode == "dora", "dtype": None}
        add_adapters(model, AdapterConfig(**options), targets_of(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
    if mesh is not None:
        m3kernels.patch(model)
        parallelize(model, mesh, reshard_after_forward=not cell.keep, shard_frozen=not cell.keep)
    draw(model, device, SIZES[cell.size].std)
    # on one GPU patched where the weights lie, so that those of one product lie side by side
    m3kernels.patch(model)
    set_recompute(model, cell.recompute)
    return model.train()


def measure(model: nn.Module, batch: dict[str, Tensor], steps: int) -> dict:
    """Median milliseconds of a step with synchronised ranks, peak memory, loss and gradient norm of the first."""

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    first = step()
    norm = adamw.gradient_norm([p for p in model.parameters() if p.grad is not None])
    seen = {"loss": float(first), "grad_norm": float(norm)}
    torch.cuda.reset_peak_memory_stats()
    # as the trainer: a collection of one rank is waited for by all
    with collecting_garbage_together():
        times = [timed(model, step) for _ in range(steps + 1)][1:]
    seen |= {"ms": statistics.median(times), "slowest": max(times)}
    seen |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    model.zero_grad(set_to_none=True)
    return seen | trace(step)


def timed(model: nn.Module, step: Callable[[], object]) -> float:
    """Milliseconds of a step that ranks begin together."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begun)


def run(cell: Cell, device: torch.device, mesh: DeviceMesh | None, steps: int) -> dict:
    """A row; of a cell that failed, one that says why."""
    size, dp = SIZES[cell.size], 1 if mesh is None else mesh["dp"].size()
    row = {"kind": "parallel", **asdict(cell), "dp": dp}
    began = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    try:
        with ExitStack() as stack:
            model = build(cell, device, mesh, stack)
            found = measure(model, make_batch(size, "text", cell.batch, cell.seq, device), steps)
    # every rank does the same, and fails of it at one place
    except torch.OutOfMemoryError:
        return row | {"failed": f"out of memory at {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"}
    except (ImportError, RuntimeError, ValueError) as error:
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    flops = step_flops(size, "text", cell.mode, cell.batch, cell.seq).total
    tokens = cell.batch * cell.seq / cell.tp
    return row | found | {
        "tokens_per_s_gpu": 1e3 * tokens / found["ms"],
        "tflops_gpu": 1e-9 * flops / cell.tp / found["ms"],
        "seconds": time.perf_counter() - began,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "commit": os.environ.get("M3K_COMMIT") or commit(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=tuple(SIZES), default=["3b"])
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument("--seq", nargs="+", type=int, default=[4096])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["full"])
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=[OURS])
    parser.add_argument("--batch", type=int, default=1, help="rows on each data-parallel rank")
    parser.add_argument("--recompute", choices=tuple(RUN), default="none")
    parser.add_argument(
        "--keep", action="store_true", help="do not let go of weights that FSDP2 gathers, as the trainer"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where rows are appended")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="measure nothing, write the docs' table")
    args = parser.parse_args(argv)
    if args.report:
        DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), args.report), encoding="utf-8")
        return 0
    if args.out is None:
        parser.error("--out is missing: the file that rows are appended to")
    if not torch.cuda.is_available():
        print("m3kernels.bench.parallel needs CUDA GPUs: torch sees none", file=sys.stderr)
        return 2
    single = [args.batch], [args.recompute], [args.keep]
    values = itertools.product(args.size, args.tp, args.seq, args.mode, args.peer, *single)
    cells = [Cell(*chosen) for chosen in values]
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    runnable = [cell for cell in cells if not cell.why_not(ranks)]
    if not runnable:
        parser.error("; ".join(dict.fromkeys(cell.why_not(ranks) for cell in cells)))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl", device_id=device)
    mesh_of = cache(lambda tp: make_mesh(tp=tp) if dist.is_initialized() else None)
    for cell in runnable:
        row = run(cell, device, mesh_of(cell.tp), args.steps)
        if not dist.is_initialized() or dist.get_rank() == 0:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(show(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def with_table(text: str, files: list[Path]) -> str:
    """The page with its table made anew from result files, in their order: what is measured again replaces what was.

    Efficiency is a peer's beside its own on one GPU, in the same file.
    """
    where = operator.itemgetter("size", "seq", "batch", "recompute", "mode", "peer")
    rows, shares = {}, {}
    for file in files:
        # files of before there were peers
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        read = [{"mode": "full", "peer": OURS, "keep": False} | row for row in lines if "failed" not in row]
        alone = {where(row): row["tokens_per_s_gpu"] for row in read if row["tp"] * row["dp"] == 1}
        for row in read:
            cell = (*where(row), row["tp"], row["dp"], row["keep"])
            rows[cell] = row
            shares[cell] = f"{100 * row['tokens_per_s_gpu'] / alone[where(row)]:.0f} %" if where(row) in alone else "–"
    lines = [
        "| model, tokens | peer | tp x dp | ms a step | tokens/s a GPU | of one GPU | collectives, hidden | idle | "
        "peak GiB a GPU | loss | gradient norm |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    places = {name: i for i, name in enumerate((*SIZES, *MODES, *PEERS, *RUN))}
    for cell, row in sorted(rows.items(), key=lambda item: [places.get(value, value) for value in item[0]]):
        what = f"{row['size']}, {row['seq']} x {row['batch']}" + ("" if row["mode"] == "full" else f", {row['mode']}")
        what += "" if row["recompute"] == "none" else f", recompute {row['recompute']}"
        what += ", kept" if row["keep"] else ""
        lines.append(
            f"| {what} | {row['peer']} | {row['tp']} x {row['dp']} | {row['ms']:.0f} | {row['tokens_per_s_gpu']:.0f} | "
            f"{shares[cell]} | {told_traced(row)} | {row['peak_gib']:.1f} | {row['loss']:.4f} | {row['grad_norm']:.3f} |"
        )
    some = next(iter(rows.values()))
    return placed(text, BEGIN, END, lines, f"{some['gpu']}, torch {some['torch']}, NCCL {some['nccl']}", files)


def placed(text: str, begin: str, end: str, lines: list[str], machine: str, files: list[Path]) -> str:
    """The page with a table between two markers, and below it where it was measured and the files that hold it."""
    before, rest = text.split(begin)
    of = f"{machine}; " + ", ".join(f"`{file.name}`" for file in files)
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n\n{of}.\n{end}{rest.split(end)[1]}"


def told_traced(row: dict) -> str:
    """Cells of what a trace showed: milliseconds of collectives and which share ran beside compute; of waiting."""
    if "nccl_ms" not in row:
        return "– | –"
    if not row["nccl_ms"]:
        return f"– | {row['idle_ms']:.0f} ms"
    return f"{row['nccl_ms']:.0f} ms, {100 * row['nccl_hidden_ms'] / row['nccl_ms']:.0f} % | {row['idle_ms']:.0f} ms"


def show(row: dict) -> str:
    name = (
        f"{row['size']} {row['mode']:<4} {row['peer']:<10} tp {row['tp']} dp {row['dp']} S{row['seq']} x {row['batch']}"
    )
    name += f" {row['recompute']:<9}{' kept' if row['keep'] else ''}"
    if "failed" in row:
        return f"{name} {row['failed']}"
    return (
        f"{name} {row['ms']:7.1f} ms {row['tokens_per_s_gpu']:7.0f} tokens/s a GPU  {row['tflops_gpu']:5.0f} TFLOP/s  "
        f"peak {row['peak_gib']:5.1f} GiB  loss {row['loss']:.5f} norm {row['grad_norm']:.5f}  "
        f"NCCL, idle {told_traced(row)}  {row.get('kernels', 0)} kernels  {row['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    sys.exit(main())
