"""What comes after the backward, alone: norm, clipping, AdamW and bf16 copies, ours beside PyTorch's own.

    python -m m3kernels.bench.optimizer [--size 3b] [--mode mixed stochastic lora] [--chunk N --warps N]

One micro batch, bf16 gradients. mixed: fp32 masters and moments, bf16 parameters written from them; lora: rank 32, fp32 alone;
stochastic: bf16 parameters, fp32 moments. PyTorch: gradients to fp32, get_total_norm, clip_grads_with_norm_, fused AdamW,
_foreach_copy_; it has no stochastic rounding. GB/s counts what ours must move. Needs a CUDA GPU (3B mixed: 55 GiB).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import torch
from torch import nn

from m3kernels.bench.model_shapes import SIZES
from m3kernels.models.finetune.config import OptimizerConfig
from m3kernels.models.finetune.optimizer import Trained, make_optimizer, ready_step

RANK, MAX_NORM = 32, 1.0
# bytes an element: the norm reads the gradient, the step reads and writes parameter and moments, reads the gradient
BYTES = {"mixed": 2 + 2 + 24 + 2, "stochastic": 2 + 2 + 4 + 16, "lora": 4 + 4 + 24}


def shapes(size: str, mode: str) -> list[tuple[int, ...]]:
    """Of all that is trained in a text model."""
    made = SIZES[size]
    linears = [(out, fan_in) for fan_in, out in made.linear_shapes()]
    if mode == "lora":
        return [shape for out, fan_in in linears * made.layers for shape in ((RANK, fan_in), (out, RANK))]
    whole = [(made.vocab, made.hidden)] * (1 if made.tied else 2)
    return [*whole, (made.hidden,), *(linears + [(made.hidden,)] * 2) * made.layers]


def trained(size: str, mode: str) -> Trained:
    masters, copies = {}, []
    for i, shape in enumerate(shapes(size, mode)):
        dtype = torch.bfloat16 if mode == "stochastic" else torch.float32
        master = masters[str(i)] = nn.Parameter(torch.randn(shape, device="cuda").to(dtype))
        if mode == "mixed":
            master.grad_dtype = None
            copies.append((nn.Parameter(master.detach().bfloat16()), master))
    return Trained(masters, tuple(copies))


def gradients(made: Trained, mode: str) -> list[torch.Tensor]:
    dtype = torch.float32 if mode == "lora" else torch.bfloat16
    return [torch.randn_like(p, dtype=dtype) for p in made.masters.values()]


def ours(made: Trained, given: list[torch.Tensor]) -> Callable[[], None]:
    optimizer = make_optimizer(made, OptimizerConfig(), seed=0)

    def step() -> None:
        for p, g in zip(made.masters.values(), given):
            p.grad = g
        ready_step(made, optimizer, made.gradient_norm(), MAX_NORM)()

    return step


def pytorch(made: Trained, given: list[torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(made.masters.values(), fused=True)

    def step() -> None:
        for p, g in zip(made.masters.values(), given):
            p.grad = g.to(p.dtype)
        norm = torch.nn.utils.get_total_norm([p.grad for p in made.masters.values()])
        torch.nn.utils.clip_grads_with_norm_(made.masters.values(), MAX_NORM, norm)
        optimizer.step()
        made.zero_grad()
        made.write_back()

    return step


def measure(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """(milliseconds of the GPU, of the host) of a step: medians; the queue is empty when a step begins."""
    device, host = [], []
    for _ in range(3 + steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # the GPU is busy while the host issues the step, as after a backward
        torch.cuda._sleep(40_000_000)
        began = time.perf_counter()
        begin.record()
        step()
        end.record()
        host.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    return statistics.median(device[3:]), statistics.median(host[3:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="3b")
    parser.add_argument("--mode", nargs="+", choices=tuple(BYTES), default=list(BYTES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--chunk", type=int, help="elements a program of adamw handles")
    parser.add_argument("--warps", type=int)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench optimizer needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    op = import_module("m3kernels.ops.adamw")
    op.CONFIG = replace(op.CONFIG, chunk=args.chunk or op.CONFIG.chunk, warps=args.warps or op.CONFIG.warps)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {op.CONFIG}")
    for mode in args.mode:
        for peer in (ours, pytorch):
            if peer is pytorch and mode == "stochastic":
                continue
            made = trained(args.size, mode)
            count = sum(p.numel() for p in made.masters.values())
            try:
                ms, host = measure(peer(made, gradients(made, mode)), args.steps)
                moved = BYTES[mode] * count / ms / 1e6
                print(f"{args.size} {mode:<10} {peer.__name__:<8} {ms:8.2f} ms, host {host:5.2f} ms, {moved:6.0f} GB/s")
            except torch.OutOfMemoryError as error:
                print(f"{args.size} {mode:<10} {peer.__name__:<8} out of memory: {str(error).splitlines()[0]}")
            del made
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
