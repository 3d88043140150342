"""What the train and decode benches share: a peer's failure as a status, memory, and running one of them alone."""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from m3kernels.bench import measure, results

OK, WRONG, MISSING, FAILED, OOM, SKIPPED = "ok", "WRONG", "missing", "failed", "oom", "skipped"
ALL = "all"


def outcome(error: Exception) -> tuple[str, str]:
    """(status, reason) of what a peer raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return OOM, measure.reason(error)
    return MISSING if isinstance(error, ImportError) else FAILED, measure.reason(error)


def free(device: torch.device) -> None:
    """Give back what nobody holds, so that one peer's cached blocks are not another's lack of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def late(deadline: float | None) -> bool:
    """Whether ``deadline`` (of ``time.monotonic()``) has passed."""
    return deadline is not None and time.monotonic() > deadline


@dataclass(frozen=True)
class Suite:
    """One bench as its command line needs it.

    ``bench(gpu, ceilings, size=, quick=, peers=, deadline=, only=)`` yields rows; ``expected(size, quick, peers, only)``
    says about how many; ``needs`` completes "needs a CUDA GPU".
    """

    name: str
    doc: str
    bench: Callable[..., Iterable[dict]]
    show: Callable[[dict], str]
    expected: Callable[[tuple[str, ...], bool, tuple[str, ...] | None, str], int]
    sizes: tuple[str, ...]
    default_sizes: tuple[str, ...]
    peers: tuple[str, ...]
    needs: str


def parse(suite: Suite, argv: list[str] | None) -> argparse.Namespace:
    program = f"m3kernels.bench.{suite.name}"
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=suite.doc.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=suite.sizes, default=suite.default_sizes, help="default: 3b 8b")
    parser.add_argument(
        "--peers", nargs="+", choices=suite.peers, help="only these (and hf, which the others must equal)"
    )
    parser.add_argument("--only", default="", help="only cells whose label, as in the log, has this in it")
    parser.add_argument("--quick", action="store_true", help="the 3B's most telling cells and fewer repeats")
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu>/<date>-<commit>-<suite>.jsonl")
    parser.add_argument("--seconds", type=float, default=1500, help="start no further cell after this long (1500)")
    return parser.parse_args(argv)


def run(suite: Suite, argv: list[str] | None = None) -> int:
    """Run one suite alone and write its file; 2 without a GPU."""
    args = parse(suite, argv)
    if not torch.cuda.is_available():
        print(
            f"m3kernels.bench.{suite.name} needs a CUDA GPU {suite.needs}: torch {torch.__version__} sees none. Run it "
            "on a GPU machine; results are read by m3kernels.bench.report.",
            file=sys.stderr,
        )
        return 2
    begun, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    gpu, chosen = measure.Gpu(device), None if args.peers is None else tuple(args.peers)
    with torch.cuda.stream(gpu.stream):
        ceilings = gpu.ceilings()
        head = results.header(device, ceilings, args.quick, [suite.name])
        writer = results.Writer(args.out or results.default_path(head), head)
        which = {"size": tuple(args.size), "quick": args.quick, "peers": chosen, "only": args.only}
        rows = suite.bench(gpu, ceilings, deadline=begun + args.seconds, **which)
        for row in progress(rows, suite.expected(**which), suite.name):
            writer.add(row)
            print(f"{time.monotonic() - begun:4.0f} s  {suite.show(row)}", flush=True)
    writer.close()
    print(f"wrote {writer.path} in {time.monotonic() - begun:.0f} s")
    return 0


def progress(rows: Iterable[dict], total: int, title: str) -> Iterator[dict]:
    """The rows, with a bar on a terminal where rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        yield from rows
        return
    yield from track(rows, description=title, total=total)
