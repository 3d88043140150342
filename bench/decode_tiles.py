"""Every tile that the decode ops could take, timed: where the tables in ``m3kernels/ops/decode_*.py`` come from.

    python -m m3kernels.bench.decode_tiles [--shape o mlp ...] [--rows 1 16] [--fp8] [--out FILE.txt]

Microseconds a launch in a CUDA graph of dependent launches over weights that are not in the cache, as a decode step runs
them; the limit is the weight's bytes at the rate of a copy. Kernels are compiled by several processes first. Needs a CUDA GPU.
"""

import argparse
import importlib
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from m3kernels.ops._decode_products import Tiles, WeightTile

# op, columns, rows of the weight(s); the 8B's end in 8
SHAPES = {
    "qkv": ("decode_qkv", 3072, 6144),
    "o": ("decode_linear", 4096, 3072),
    "mlp": ("decode_swiglu", 3072, 9216),
    "down": ("decode_linear", 9216, 3072),
    "head": ("decode_linear", 3072, 131072),
    "o8": ("decode_linear", 4096, 4096),
    "mlp8": ("decode_swiglu", 4096, 14336),
    "down8": ("decode_linear", 14336, 4096),
}
ONE_ROW = tuple(itertools.product((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8), (1,)))
MORE_ROWS = tuple(itertools.product((16, 32, 64), (64, 128, 256), (2, 4), (3, 5)))
HEAD_DIM, HEADS, KV_HEADS = 128, 32, 8
LAUNCHES, REPEATS, COPIES = 24, 15, 8
COPY_BYTES_S = 3.02e12  # docs/performance.md

Job = tuple[str, int, bool, tuple[int, int, int, int]]


def take(op: str, tile: tuple[int, int, int, int]) -> None:
    """Makes an op use one tile for everything."""
    module, one = importlib.import_module(f"m3kernels.ops.{op}"), WeightTile(*tile)
    for name, value in list(vars(module).items()):
        if isinstance(value, Tiles):
            setattr(module, name, Tiles(one, one, one))


def calls_of(shape: str, rows: int, fp8: bool, copies: int) -> tuple[list[Callable], int]:
    """(a call for each copy of the weights, bytes of weights that one reads)."""
    op, columns, outputs = SHAPES[shape]
    run = getattr(importlib.import_module(f"m3kernels.ops.{op}"), op)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, gain, scale = torch.randn(rows, columns, **bf16), torch.rand(columns, **bf16), None
    if fp8:
        scale = torch.ones(1, device="cuda")

    def weight(n: int) -> torch.Tensor:
        w = torch.randn(n, columns, **bf16) / columns**0.5
        return w.to(torch.float8_e4m3fn) if fp8 else w

    size = columns * outputs * (1 if fp8 else 2)
    if op == "decode_linear":
        last = shape == "head"
        residual = None if last else torch.randn(rows, outputs, **bf16)
        options = {"norm_weight": gain if last else None, "residual": residual, "scale": scale}
        weights = [(weight(outputs),) for _ in range(copies)]
    elif op == "decode_swiglu":
        size, options = 2 * size, {"norm_weight": gain, "gate_scale": scale, "up_scale": scale}
        weights = [(weight(outputs), weight(outputs)) for _ in range(copies)]
    else:
        places = torch.arange(rows, device="cuda")
        caches = tuple(torch.zeros(rows, KV_HEADS, 1024, HEAD_DIM, **bf16) for _ in "kv")
        table = torch.rand(rows, HEAD_DIM, device="cuda")
        options = {"norm_weight": gain, "head_dim": HEAD_DIM, "table": table, "positions": places, "slots": places}
        options |= {"llama4": (0.1, 16384), "caches": caches, "scales": (scale, scale, scale)}
        sizes = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
        weights = [tuple(map(weight, sizes)) for _ in range(copies)]
    return [lambda w=w: run(x, *w, **options) for w in weights], size


def compiled(job: Job) -> str:
    """An empty string, or why a tile cannot be; the kernel is in Triton's cache on disk then."""
    shape, rows, fp8, tile = job
    take(SHAPES[shape][0], tile)
    try:
        with torch.no_grad():
            calls_of(shape, rows, fp8, 1)[0][0]()
        torch.cuda.synchronize()
    except Exception as error:
        return str(error)
    return ""


@torch.no_grad()
def microseconds(calls: list[Callable], launches: int) -> float:
    """Of one launch, the median over replays of a graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(launches):
            calls[number % len(calls)]()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / launches)
    return statistics.median(times)


def sweep(shapes: list[str], rows: list[int], fp8: bool, processes: int = 14):
    """A line for each shape and number of rows: the best tiles, and the worst."""
    cases = list(itertools.product(shapes, rows))
    jobs = [(shape, n, fp8, tile) for shape, n in cases for tile in (ONE_ROW if n == 1 else MORE_ROWS)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        broken = dict(zip(jobs, pool.map(compiled, jobs, chunksize=4)))
    for shape, n in cases:
        calls, size = calls_of(shape, n, fp8, 3 if shape == "head" else COPIES)
        limit, found = 1e6 * size / COPY_BYTES_S, []
        for job in (job for job in jobs if job[:2] == (shape, n) and not broken[job]):
            take(SHAPES[shape][0], job[3])
            found.append((microseconds(calls, 6 if shape == "head" else LAUNCHES), job[3]))
        found.sort()
        best = "; ".join(f"{us:.1f} ({100 * limit / us:.0f} %) {tile}" for us, tile in found[:8])
        weights = "FP8" if fp8 else "bf16"
        yield f"{shape} rows {n} {weights}, limit {limit:.1f} us: {best}; worst {found[-1][0]:.1f} {found[-1][1]}"
        del calls
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=["qkv", "o", "mlp", "down", "head"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16], help="of x (default: 1 16)")
    parser.add_argument("--fp8", action="store_true", help="E4M3 weights")
    parser.add_argument("--out", type=Path, help="also write the lines there")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("m3kernels.bench.decode_tiles needs a CUDA GPU", file=sys.stderr)
        return 2
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds (share of the limit) tile"]
    for line in sweep(args.shape, args.rows, args.fp8):
        print(line, flush=True)
        lines.append(line)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
