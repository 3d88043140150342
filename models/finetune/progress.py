"""What a run works on, how far it is, what it leaves, and what its checkpoints say about the software."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.plan import Plan

PACKAGES = ("m3kernels", "torch", "triton", "transformers", "mistral-common", "datasets")


@dataclass(frozen=True)
class Data:
    """Attributes: plans of training and of validation (None without a validation set), and what encodes them."""

    train: Plan
    valid: Plan | None
    encoder: Encoder


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        folder: of metrics.jsonl, loss.png and what was exported.
        step: how many steps are over; less than ``train_iters`` where a signal or the time ended it.
        loss: of the last step; NaN where there was none.
        exported: folders in Hugging Face's or PEFT's format, by kind.
    """

    folder: Path
    step: int
    loss: float
    exported: dict[str, Path]


@dataclass
class Progress:
    """Where a run stands, as its checkpoints have it.

    Attributes:
        step: how many steps are over, skipped ones included.
        optimizer_steps: how many were taken.
        best: {"step", "loss"} of the best validation, empty without one.
        tokens, read, bad: how many tokens were seen, records looked at, and records replaced.
    """

    step: int = 0
    optimizer_steps: int = 0
    best: dict = field(default_factory=dict)
    tokens: int = 0
    read: int = 0
    bad: int = 0


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed; by default of what the numbers of a run depend on."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Of the working directory, where that is a repository."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
