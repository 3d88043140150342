"""The ``m3kernels`` command: one module a subcommand, each with ``HELP``, ``add_arguments(parser)`` and ``run(args)``.

One with ``OWN_PARSER`` has no ``add_arguments``: its ``run`` takes the arguments as they are.
"""

import argparse
import importlib
import sys

# a new subcommand is a new file and a name here
SUBCOMMANDS = ("demo", "doctor", "check", "bench", "convert", "finetune", "data", "generate")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="m3kernels", description="Fused Triton kernels for Ministral 3.")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="|".join(SUBCOMMANDS))
    own = {}
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"m3kernels.cli.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        if getattr(module, "OWN_PARSER", False):
            own[name] = module.run
            continue
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    try:
        if argv and argv[0] in own:
            return own[argv[0]](argv[1:])
        args = parser.parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
