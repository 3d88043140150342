"""The ``m3kernels`` command: one module a subcommand, each with ``HELP``, ``add_arguments(parser)`` and ``run(args)``."""

import argparse
import importlib
import sys

# a new subcommand is a new file and a name here
SUBCOMMANDS = ("demo", "doctor", "check", "bench", "convert")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="m3kernels", description="Fused Triton kernels for Ministral 3.")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="|".join(SUBCOMMANDS))
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"m3kernels.cli.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
