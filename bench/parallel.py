"""Steps of the native model over the GPUs of one host: time, memory, and that loss and gradient norm are those of one GPU.

    python -m m3kernels.bench.parallel --out FILE.jsonl                                 # one GPU: what the others stand beside
    torchrun --nproc-per-node=2 -m m3kernels.bench.parallel --tp 2 --out FILE.jsonl    # the others split the batch

A step is forward and backward without an optimizer, of the patched model with random weights; every data-parallel rank has
the same rows, so that loss and norm do not depend on the layout. Rows are appended to the file by rank 0.

    python -m m3kernels.bench.parallel --report FILE.ndjson ...     # the table in docs/parallel.md, from kept files
"""

import argparse
import json
import operator
import os
import statistics
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import m3kernels
from m3kernels.bench.model_shapes import SIZES, make_batch, step_flops, text_config
from m3kernels.bench.results import commit
from m3kernels.models.ministral3 import Config, Ministral3
from m3kernels.models.ministral3.loading import local_slices, part_of, to_empty
from m3kernels.models.ministral3.parallel import parallelize
from m3kernels.models.ministral3.recompute import RUN, set_recompute
from m3kernels.parallel import make_mesh

DOCS = Path(__file__).parents[1] / "docs" / "parallel.md"
BEGIN, END = "<!-- gpus -->", "<!-- /gpus -->"


@torch.no_grad()
def draw(model: Ministral3, device: torch.device, std: float) -> None:
    """Random weights in place, the same for every layout: each tensor is drawn whole, from its name, and cut."""
    to_empty(model, device)
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        whole = whole.fill_(1) if whole.dim() == 1 else whole.normal_(0, std, generator=generator)
        part_of(parameter).copy_(whole[local_slices(parameter) or ()])


def build(args: argparse.Namespace, device: torch.device, mesh) -> Ministral3:
    with torch.device("meta"):
        model = Ministral3(Config.from_hf(text_config(SIZES[args.size]))).to(torch.bfloat16)
    if mesh is not None:
        m3kernels.patch(model)
        parallelize(model, mesh)
    draw(model, device, SIZES[args.size].std)
    # on one GPU patched where the weights lie, so that those of one product lie side by side
    m3kernels.patch(model)
    set_recompute(model, args.recompute)
    return model.train()


def gradient_norm(model: Ministral3) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def measure(model: Ministral3, batch: dict[str, Tensor], steps: int) -> dict:
    """Median milliseconds of a step with synchronised ranks, peak memory, loss and gradient norm of the first."""

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    first = step()
    seen = {"loss": float(first), "grad_norm": gradient_norm(model)}
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps + 1):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    times = times[1:]
    return seen | {
        "ms": statistics.median(times),
        "slowest": max(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="3b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1, help="rows on each data-parallel rank")
    parser.add_argument("--recompute", choices=tuple(RUN), default="none")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where a row is appended")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="measure nothing, write the docs' table")
    args = parser.parse_args(argv)
    if args.report:
        DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), args.report), encoding="utf-8")
        return 0
    if args.out is None:
        parser.error("--out is missing: the file that a row is appended to")
    if not torch.cuda.is_available():
        print("m3kernels.bench.parallel needs CUDA GPUs: torch sees none", file=sys.stderr)
        return 2
    device, mesh = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), None
    torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl", device_id=device)
        mesh = make_mesh(tp=args.tp)
    elif args.tp > 1:
        parser.error(
            f"--tp {args.tp} needs as many processes: torchrun --nproc-per-node={args.tp} -m m3kernels.bench.parallel"
        )
    dp = 1 if mesh is None else mesh["dp"].size()

    model = build(args, device, mesh)
    batch = make_batch(SIZES[args.size], "text", args.batch, args.seq, device)
    found = measure(model, batch, args.steps)
    flops = step_flops(SIZES[args.size], "text", "full", args.batch, args.seq).total
    tokens = args.batch * args.seq / args.tp
    row = {
        "kind": "parallel",
        **{name: getattr(args, name) for name in ("size", "tp", "seq", "batch", "recompute")},
        "dp": dp,
        **found,
        "tokens_per_s_gpu": 1e3 * tokens / found["ms"],
        "tflops_gpu": 1e-9 * flops / args.tp / found["ms"],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "commit": os.environ.get("M3K_COMMIT") or commit(),
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(show(row), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def with_table(text: str, files: list[Path]) -> str:
    """The page with its table made anew from result files; efficiency is beside one GPU in the same cell."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    cell = operator.itemgetter("size", "seq", "batch", "recompute")
    alone = {cell(row): row["tokens_per_s_gpu"] for row in rows if row["tp"] * row["dp"] == 1}
    lines = [
        "| model, tokens | tp x dp | ms a step | tokens/s a GPU | of one GPU | peak GiB a GPU | loss | gradient norm |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        share = f"{100 * row['tokens_per_s_gpu'] / alone[cell(row)]:.0f} %" if cell(row) in alone else "–"
        lines.append(
            f"| {row['size']}, {row['seq']} x {row['batch']} | {row['tp']} x {row['dp']} | {row['ms']:.0f} | "
            f"{row['tokens_per_s_gpu']:.0f} | {share} | {row['peak_gib']:.1f} | {row['loss']:.4f} | {row['grad_norm']:.3f} |"
        )
    of = f"{rows[0]['gpu']}, torch {rows[0]['torch']}, NCCL {rows[0]['nccl']}; " + ", ".join(
        f"`{f.name}`" for f in files
    )
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{of}.\n{END}{rest.split(END)[1]}"


def show(row: dict) -> str:
    return (
        f"{row['size']} tp {row['tp']} dp {row['dp']} S{row['seq']} x {row['batch']} {row['recompute']:<9} {row['ms']:7.1f} ms "
        f"{row['tokens_per_s_gpu']:7.0f} tokens/s a GPU  {row['tflops_gpu']:5.0f} TFLOP/s  peak {row['peak_gib']:5.1f} GiB  "
        f"loss {row['loss']:.5f} norm {row['grad_norm']:.5f}"
    )


if __name__ == "__main__":
    sys.exit(main())
