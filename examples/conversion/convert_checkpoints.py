"""The flags of Megatron-Bridge's conversion page, on top of ``m3kernels convert``.

    python convert_checkpoints.py import --hf-model mistralai/Ministral-3-3B-Base-2512 --megatron-path native/3b
    python convert_checkpoints.py export --hf-model mistralai/Ministral-3-3B-Base-2512 --megatron-path native/3b \\
        --hf-path hf/3b
"""

import argparse
import sys

from m3kernels.cli import convert


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for action in convert.add_actions(parser):
        action.add_argument("--device-map", help="accepted; conversion runs on the CPU, one tensor at a time")
        action.add_argument("--trust-remote-code", action="store_true", help="accepted; no remote code is ever run")
    args = parser.parse_args(argv)
    for flag in ("device_map", "trust_remote_code"):
        if getattr(args, flag):
            print(f"note: --{flag.replace('_', '-')} has no effect here", file=sys.stderr)
    return convert.run(args)


if __name__ == "__main__":
    sys.exit(main())
