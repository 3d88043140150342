"""``m3kernels finetune`` for torchrun, with the faults that FAULTS names for each attempt, separated by semicolons."""

import os
import sys

import torch
from faults import faults

from m3kernels.cli.finetune import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    attempt, by_attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["FAULTS"].split(";")
    with faults(by_attempt[attempt] if attempt < len(by_attempt) else "", int(os.environ["RANK"])):
        sys.exit(run(sys.argv[1:]))
