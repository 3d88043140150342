"""LoRA and DoRA linears of the 3B and 8B beside the bare frozen products and PEFT, on this GPU.

    python -m m3kernels.bench.adapter_grid [OUT.json]     measure; default: bench/results/<gpu>/<date>-<commit>-adapters.json
    python -m m3kernels.bench.adapter_grid --show FILE    the tables of docs/adapters.md

A cell is the layers of one input, as a patched model calls them: q, k, v; o; gate, up; down. ``bare`` is those frozen products
alone, y = x W^T forward and dx = dy W backward, by cuBLAS, with the sum over projections of one input. Results are compared
with the plain fp64 formula before they are timed. Milliseconds are medians in turns with a cold L2, the host's work hidden.
"""

import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from m3kernels.bench import measure, results
from m3kernels.ops import Adapted, dora_norm_reference, lora_linears

SCALING = 2.0
ROUNDS = 11


def _of_one_input(hidden: int, attention: int, mlp: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name -> (inputs, outputs of each layer); 8 key/value heads of 128."""
    return {
        "q, k, v": (hidden, (attention, 1024, 1024)),
        "o": (attention, (hidden,)),
        "gate, up": (hidden, (mlp, mlp)),
        "down": (mlp, (hidden,)),
    }


LAYERS = {"3b": _of_one_input(3072, 4096, 9216), "8b": _of_one_input(4096, 4096, 14336)}
APART = 0.02


@dataclass(frozen=True)
class Cell:
    size: str
    layers: str
    tokens: int
    rank: int
    adapters: str
    dora: bool


def cells() -> list[Cell]:
    found = []
    for size in LAYERS:
        for tokens in (4096, 8192):
            for rank, adapters, dora in (
                (16, "bf16", False),
                (64, "bf16", False),
                (16, "fp32", False),
                (16, "bf16", True),
            ):
                found += [Cell(size, layers, tokens, rank, adapters, dora) for layers in LAYERS[size]]
    return found


def problem(cell: Cell) -> tuple[Tensor, list[Adapted], list[Tensor], list[Tensor]]:
    """(x, layers, their magnitudes, gradients of their outputs)."""
    width, outs = LAYERS[cell.size][cell.layers]
    dtype = torch.float32 if cell.adapters == "fp32" else torch.bfloat16

    def draw(*size, scale=1.0, to=torch.bfloat16):
        return (torch.randn(size, device="cuda") * scale).to(to)

    layers = []
    for out in outs:
        a, b = draw(cell.rank, width, scale=width**-0.5, to=dtype), draw(out, cell.rank, scale=0.1, to=dtype)
        layers.append(Adapted(draw(out, width, scale=width**-0.5), a.requires_grad_(), b.requires_grad_(), SCALING))
    magnitudes = [(1 + 0.1 * torch.randn(out, device="cuda")).to(dtype).requires_grad_() for out in outs]
    x = draw(cell.tokens, width).requires_grad_()
    return x, layers, magnitudes, [draw(cell.tokens, out) for out in outs]


def ours(cell: Cell, x: Tensor, layers: list[Adapted], magnitudes: list[Tensor]) -> list[Tensor]:
    if cell.dora:
        layers = [dataclasses.replace(p, magnitude=m) for p, m in zip(layers, magnitudes)]
    return lora_linears(x, layers)


def peft(cell: Cell, x: Tensor, layers: list[Adapted], magnitudes: list[Tensor]) -> list[Tensor]:
    """PEFT's arithmetic and casts, without its module calls."""
    found = []
    for p, m in zip(layers, magnitudes):
        base, wide = F.linear(x, p.weight), x.to(p.A.dtype)
        low = F.linear(F.linear(wide, p.A), p.B)
        if not cell.dora:
            found.append((base + low * p.scaling).to(base.dtype))
            continue
        eye = torch.eye(p.A.shape[1], device=x.device, dtype=p.A.dtype)
        merged = p.weight.to(p.A.dtype) + p.scaling * F.linear(F.linear(eye, p.A), p.B).T.detach()
        k = m / torch.linalg.norm(merged, dim=1)
        found.append((base + ((k - 1) * base + k * low * p.scaling)).to(base.dtype))
    return found


def in_fp64(cell: Cell, x: Tensor, layers: list[Adapted], magnitudes: list[Tensor]) -> list[Tensor]:
    """The first rows only: enough to see a wrong one."""
    found = []
    for p, m in zip(layers, magnitudes):
        w, a, b = (t.detach().double() for t in (p.weight, p.A, p.B))
        y = x.detach().double() @ w.T + (x.detach().double() @ a.T) @ b.T * p.scaling
        found.append(y * (m.detach().double() / dora_norm_reference(w, a, b, p.scaling)) if cell.dora else y)
    return found


def medians(runs: dict[str, Callable]) -> dict[str, float]:
    """Median milliseconds of each, in turns, the L2 written over before each."""
    flush = torch.empty(measure.FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for run in runs.values():
        run(), run()
    events: dict[str, list] = {name: [] for name in runs}
    for name in measure.turns(runs, ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        # long enough that what the host does for the next call is hidden
        torch.cuda._sleep(2_500_000)
        start.record()
        runs[name]()
        end.record()
        events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(s.elapsed_time(e) for s, e in pairs) for name, pairs in events.items()}


def run_cell(cell: Cell) -> dict:
    x, layers, magnitudes, dys = problem(cell)
    for y, truth in zip(ours(cell, x[:256], layers, magnitudes), in_fp64(cell, x[:256], layers, magnitudes)):
        apart = ((y.double() - truth).norm() / truth.norm()).item()
        if not apart <= APART:
            return asdict(cell) | {"wrong": apart}
    leaves = [x, *(t for p in layers for t in (p.A, p.B)), *(magnitudes if cell.dora else [])]

    def bare_forward():
        return [torch.mm(x.detach(), p.weight.T) for p in layers]

    def bare_backward():
        dx = torch.mm(dys[0], layers[0].weight)
        for dy, p in zip(dys[1:], layers[1:]):
            dx.addmm_(dy, p.weight)

    forward, backward = {"bare": bare_forward}, {"bare": bare_backward}
    for name, function in (("m3kernels", ours), ("peft", peft)):
        forward[name] = functools.partial(function, cell, x, layers, magnitudes)
        ys = forward[name]()
        backward[name] = functools.partial(torch.autograd.grad, ys, leaves, dys, retain_graph=True)
    return asdict(cell) | {"ms": {"forward": medians(forward), "backward": medians(backward)}}


def run(path: Path | None) -> Path:
    torch.manual_seed(0)
    gpu = measure.Gpu(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(gpu.stream):
        head = results.header(gpu.device, gpu.ceilings(), False, ["adapters"])
    path = path or results.default_path(head, ".json")
    found = {"machine": head, "rows": []}
    for cell in tqdm(cells(), desc="adapters"):
        found["rows"].append(run_cell(cell))
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(show(found))
    return path


def ratio(row: dict, who: str) -> float:
    """Forward and backward over the bare products'."""
    total = lambda name: sum(ms[name] for ms in row["ms"].values())
    return total(who) / total("bare")


def show(found: dict) -> str:
    """The file's tables in Markdown: times over the bare products' by kind, and every cell in microseconds."""
    rows = [row for row in found["rows"] if "ms" in row]
    kinds = dict.fromkeys((row["adapters"], row["rank"], row["dora"]) for row in rows)
    mean = lambda values: math.exp(statistics.mean(map(math.log, values)))
    title = lambda adapters, rank, dora: f"{'DoRA' if dora else 'LoRA'}, r {rank}, {adapters} adapters"
    lines = ["| over the bare products, geometric mean (largest) | m3kernels | PEFT's arithmetic |", "|---|---|---|"]
    for kind in kinds:
        mine = [row for row in rows if (row["adapters"], row["rank"], row["dora"]) == kind]
        said = []
        for who in ("m3kernels", "peft"):
            ratios = [ratio(row, who) for row in mine]
            said.append(f"{mean(ratios):.3f} ({max(ratios):.2f})")
        lines.append(f"| {title(*kind)} | " + " | ".join(said) + " |")
    lines += ["", "| µs, forward / backward | bare | m3kernels | PEFT's arithmetic |", "|---|---|---|---|"]
    for row in rows:
        name = f"{row['size'].upper()} {row['layers']}, {row['tokens']:,} tokens, "
        name += title(row["adapters"], row["rank"], row["dora"])
        both = [
            " / ".join(f"{1e3 * row['ms'][d][who]:.0f}" for d in row["ms"]) for who in ("bare", "m3kernels", "peft")
        ]
        lines.append(f"| {name} | " + " | ".join(both) + " |")
    wrong = [
        f"{row['size']} {row['layers']} {title(row['adapters'], row['rank'], row['dora'])}"
        for row in found["rows"]
        if "wrong" in row
    ]
    return "\n".join([*lines, *(f"\nWRONG: {name}" for name in wrong)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--show"]:
        print(show(json.loads(Path(sys.argv[2]).read_text())))
    else:
        print("wrote", run(Path(sys.argv[1]) if sys.argv[1:] else None))
