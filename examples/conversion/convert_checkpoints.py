"""``m3kernels convert`` under the name and with the flags of Megatron-Bridge's script.

python examples/conversion/convert_checkpoints.py import --hf-model ID_OR_DIR --megatron-path DIR
python examples/conversion/convert_checkpoints.py export --hf-model ID_OR_DIR --megatron-path DIR --hf-path OUT
"""

import argparse
import sys

from m3kernels.cli import convert


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=convert.__doc__)
    convert.add_arguments(parser)
    return convert.run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
