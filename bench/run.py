"""Runs suites on one GPU and writes one result file: behind ``m3kernels bench`` and each bench file's own command."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from m3kernels.bench import decode, host, measure, ops, peers, results, targets, train
from m3kernels.bench.cases import OPS
from m3kernels.bench.results import SUITES

SIZES = ("3b", "8b", "14b")
PEERS = {"ops": peers.ORDER, "host": (*peers.ORDER, *host.LAYER_PEERS), "train": train.PEERS, "decode": decode.PEERS}


def _ops(args, gpu: measure.Gpu, ceilings: dict, deadline: float) -> Iterator[dict]:
    chosen = args.peers or peers.ORDER
    return ops.bench_ops(gpu, ceilings, ops=tuple(args.op), chosen=chosen, quick=args.quick, deadline=deadline)


def _host(args, gpu: measure.Gpu, ceilings: dict, deadline: float) -> Iterator[dict]:
    return host.bench_host(gpu.device, args.quick, args.peers or PEERS["host"])


def _end_to_end(bench: Callable[..., Iterator[dict]]) -> Callable[..., Iterator[dict]]:
    def rows(args, gpu: measure.Gpu, ceilings: dict, deadline: float) -> Iterator[dict]:
        with torch.cuda.stream(gpu.stream):
            chosen = {"size": tuple(args.size), "quick": args.quick, "peers": args.peers, "only": args.only}
            yield from bench(gpu, ceilings, deadline=deadline, **chosen)

    return rows


# suite: (its rows, one row as a line of the log)
RUNNERS: dict[str, tuple[Callable[..., Iterator[dict]], Callable[[dict], str]]] = {
    "ops": (_ops, ops.show),
    "host": (_host, host.show),
    "train": (_end_to_end(train.bench_train), train.show),
    "decode": (_end_to_end(decode.bench_decode), decode.show),
}
assert set(RUNNERS) == set(SUITES)


def add_arguments(parser: argparse.ArgumentParser, suites: list[str]) -> None:
    add = parser.add_argument
    if "ops" in suites:
        add("--op", nargs="+", choices=tuple(OPS), default=tuple(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    known = tuple(dict.fromkeys(peer for suite in suites for peer in PEERS[suite]))
    add("--peers", nargs="+", choices=known, metavar="PEER", help=f"only these beside eager: {', '.join(known)}")
    if {"train", "decode"} & set(suites):
        add("--size", nargs="+", choices=SIZES, default=["3b", "8b"], help="default: 3b 8b")
        add("--only", default="", metavar="TEXT", help='train and decode cells with this in their label ("text lora")')
    add("--quick", action="store_true", help="fewer shapes and repeats: all suites in under 10 minutes on an H100")
    add("--out", type=Path, metavar="FILE", help="default: bench/results/<gpu>/<date>-<commit>.jsonl")
    add("--seconds", type=float, default=3600.0, help="start no further case after this long (default: 3600)")


def run(suites: list[str], args: argparse.Namespace) -> int:
    """Exit code 0; 2 where there is no GPU or ``--only`` names nothing. What breaks is a row, not the end of the run."""
    if getattr(args, "only", "") and not any(
        module.cells_of(tuple(args.size), args.quick, args.only) for module in (train, decode)
    ):
        print(
            f"m3kernels bench: no train or decode cell of {args.size} has {args.only!r} in its label", file=sys.stderr
        )
        return 2
    if not torch.cuda.is_available():
        print(
            f"m3kernels bench {' '.join(suites)} needs a CUDA GPU with bf16 (80 GB for the largest rows): torch "
            f"{torch.__version__} sees none. Run it on a GPU machine; m3kernels bench report reads the result files here.",
            file=sys.stderr,
        )
        return 2
    begun = time.monotonic()
    gpu = measure.Gpu(torch.device("cuda", torch.cuda.current_device()))
    with torch.cuda.stream(gpu.stream):
        ceilings = gpu.ceilings()
    partial = bool(args.peers or getattr(args, "only", "") or set(getattr(args, "op", OPS)) != set(OPS))
    head = results.header(gpu.device, ceilings, args.quick, suites, partial)
    writer = results.Writer(args.out or results.default_path(head), head)
    print(f"{head['gpu']}, torch {head['versions']['torch']}, triton {head['versions']['triton']}, {head['peers']}")
    try:
        for suite in suites:
            for row in with_bar(guarded(suite, args, gpu, ceilings, begun + args.seconds), suite):
                writer.add(row)
                text = f"{suite} broke: {row['reason']}" if row.get("suite") else RUNNERS[suite][1](row)
                print(f"{time.monotonic() - begun:4.0f} s  {text}", flush=True)
            torch.cuda.empty_cache()
    finally:
        writer.close()
    print(targets.table(writer.rows, head))
    print(f"wrote {writer.path} in {time.monotonic() - begun:.0f} s")
    return 0


def guarded(suite: str, *args) -> Iterator[dict]:
    """A suite's rows; what breaks all of it is one ``error`` row, not the end of the others."""
    try:
        yield from RUNNERS[suite][0](*args)
    except Exception as error:
        yield {"kind": "error", "suite": suite, "op": None, "label": suite, "reason": measure.reason(error)}


def with_bar(rows: Iterator[dict], suite: str) -> Iterator[dict]:
    """The rows, above a running bar on a terminal where rich is installed; how many there will be is not known before."""
    if not sys.stdout.isatty():
        yield from rows
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield from rows
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(suite, total=None)
        for row in rows:
            yield row
            bar.advance(task)


def main_of(suite: str, argv: list[str] | None = None) -> int:
    """The command line of one suite by itself."""
    description = sys.modules[f"m3kernels.bench.{suite}"].__doc__
    parser = argparse.ArgumentParser(prog=f"python -m m3kernels.bench.{suite}", description=description)
    add_arguments(parser, [suite])
    return run([suite], parser.parse_args(argv))
