"""Measure ops, host overhead, training steps and decoding beside their peers on one GPU; make and compare reports."""

import argparse
import importlib

HELP = "benchmarks beside peers, their report, and the comparison of two runs"
SUITES = {
    "ops": "every op: device time, host time, memory, error",
    "host": "Python time of an op call and of a patched decoder layer",
    "train": "training steps of Ministral 3 at real shapes",
    "decode": "time to first token and time a token",
    "all": "all of these into one result file",
}
# argument parsing is theirs: both also run as python -m m3kernels.bench.<name>
OTHERS = {
    "report": "docs/benchmarks.md, its plots and the tables of README, docs/attention.md and docs/adapters.md",
    "compare": "BASE NEW: fail on a slowdown, a memory growth or an error growth",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing of bench/ is imported before something to run is chosen."""
    names = "\n".join(f"  {name:<8} {text}" for name, text in (SUITES | OTHERS).items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"what to run:\n{names}\n\nm3kernels bench WHAT --help lists the options of each."
    parser.add_argument("what", choices=(*SUITES, *OTHERS), metavar="|".join((*SUITES, *OTHERS)))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of what is run")


def run(args: argparse.Namespace) -> int:
    """Exit code of what was run; 2 where it needs a GPU and there is none."""
    if args.what in OTHERS:
        return importlib.import_module(f"m3kernels.bench.{args.what}").main(args.options)
    from m3kernels.bench import results
    from m3kernels.bench import run as runner

    suites = list(results.SUITES) if args.what == "all" else [args.what]
    parser = argparse.ArgumentParser(prog=f"m3kernels bench {args.what}", description=SUITES[args.what])
    runner.add_arguments(parser, suites)
    return runner.run(suites, parser.parse_args(args.options))
