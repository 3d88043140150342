"""Finetune Ministral 3 with LoRA, DoRA or all weights, on one GPU, several (torchrun), or a CPU."""

import os
import sys

HELP = "LoRA, DoRA or full finetune, on one process or under torchrun"
OWN_PARSER = True  # its options are a configuration's fields


def run(arguments: list[str]) -> int:
    """Exit code: 0; 2 with a message where the run cannot start or go on."""
    from m3kernels.models.finetune.command import parse
    from m3kernels.models.finetune.config import FinetuneError
    from m3kernels.models.finetune.trainer import finetune
    from m3kernels.models.ministral3.adapters import AdapterError
    from m3kernels.models.ministral3.files import CheckpointError
    from m3kernels.parallel import ParallelError

    try:
        command = parse(arguments)
        finetune(command.config, dry_run=command.dry_run)
    except (FinetuneError, AdapterError, CheckpointError, ParallelError) as error:
        # what every rank found before it began, the first one says
        if os.environ.get("RANK", "0") == "0" or not getattr(error, "on_all_ranks", False):
            print(f"m3kernels finetune: {error}", file=sys.stderr)
        return 2
    return 0
