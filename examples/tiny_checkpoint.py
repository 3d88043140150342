"""A tiny Ministral 3 checkpoint with random weights and Mistral's tokenizer, for trying commands without a download.

python examples/tiny_checkpoint.py tiny
"""

import argparse

from m3kernels.cli.tiny_checkpoint import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    print(write(parser.parse_args().folder, says_text=True))
