"""What the demo leaves behind: files written whole or not at all, the loss curve, and the sheet of answers."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from m3kernels.cli.demo_data import Sample  # noqa: E402
from m3kernels.cli.demo_train import Progress  # noqa: E402

RIGHT, WRONG = "#1a7f37", "#cf222e"
LONGEST_ANSWER = 16


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Outputs:
    """A folder whose entries appear only when complete; earlier ones stay until then.

    Args:
        directory: made if it does not exist.
        saved: receives the path of each entry when it is complete.
    """

    def __init__(self, directory: Path, saved: list[Path]) -> None:
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"--output {directory} is a file; give a folder, which is made if needed")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.saved = saved

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a file or a folder to; it takes its name when the block ends without an exception."""
        final, partial, old = (self.directory / f"{prefix}{name}" for prefix in ("", ".partial-", ".old-"))
        _remove(partial)
        try:
            yield partial
            if final.is_dir():
                # a folder cannot be replaced in one step
                _remove(old)
                final.rename(old)
            os.replace(partial, final)
            self.saved.append(final)
        finally:
            if old.exists() and not final.exists():
                old.rename(final)
            _remove(old)
            _remove(partial)


def plot_training(history: Sequence[Progress], path: Path) -> None:
    """Training loss (logarithmic) and validation accuracy over steps, as a PNG."""
    steps, losses = [p.step for p in history], np.array([p.loss for p in history])
    window = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axis.plot(steps, losses, color="#0969da", alpha=0.25, linewidth=1)
    axis.plot(steps[window - 1 :], smooth, color="#0969da", label=f"training loss (mean of {window} steps)")
    axis.set(xlabel="step", ylabel="cross-entropy per answer token", yscale="log")
    validated = [p for p in history if p.accuracy is not None]
    twin = axis.twinx()
    if validated:
        percent = [100 * p.accuracy for p in validated]
        twin.plot([p.step for p in validated], percent, "o-", color=RIGHT, label="accuracy")
    twin.set(ylabel="exact answers on validation digits (%)", ylim=(0, 102))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def plot_answers(samples: Sequence[Sample], answers: Sequence[str], path: Path, *, columns: int = 4) -> None:
    """A PNG of questions with their pages, the generated answers, and whether they are right."""
    rows = -(-len(samples) // columns)
    figure = plt.figure(figsize=(3.4 * columns, 2.9 * rows), dpi=110, layout="constrained")
    cells = np.atleast_1d(figure.subfigures(rows, columns, wspace=0.02, hspace=0.02)).ravel()
    for cell, sample, answer in zip(cells, samples, answers):
        right = answer == sample.answer
        color = RIGHT if right else WRONG
        axes = cell.subplots(1, len(sample.pages), squeeze=False)[0]
        for axis, page in zip(axes, sample.pages):
            axis.imshow(page, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="#8c959f", linewidth=0.8)
        verdict = "right" if right else f"wrong, it is {sample.answer!r}"
        cell.suptitle(sample.question, fontsize=9)
        # untrained models answer in any script, and with $; the font and matplotlib's math know neither
        shown = ascii(answer if len(answer) <= LONGEST_ANSWER else answer[:LONGEST_ANSWER] + "...")
        cell.supxlabel(f"model: {shown}  ({verdict})", fontsize=11, color=color, parse_math=False)
    figure.savefig(path)
    plt.close(figure)
