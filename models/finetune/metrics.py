"""What a run says while it goes: ``metrics.jsonl`` always, TensorBoard and W&B when asked for, a line on the console, a plot."""

import importlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TextIO

from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError, LoggerConfig

METRICS = "metrics.jsonl"
PLOT = "loss.png"


class Sink(Protocol):
    """Takes scalars of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, written out at once: a killed run keeps all of them. A full disk costs lines, not the run."""

    def __init__(self, path: Path):
        # unbuffered: nothing is left that a failed write would try again
        self.file = open(path, "ab", buffering=0)
        self._broken = path.read_bytes()[-1:] not in (b"", b"\n")

    def write(self, step: int, values: Mapping) -> None:
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        # what a kill or a full disk cut off stays a line of its own
        line = b"\n" + line if self._broken else line
        try:
            self._broken = self.file.write(line) != len(line)
        except OSError as error:
            print(f"WARNING: {self.file.name} lacks a line of step {step}: {error}", file=sys.stderr)

    def close(self) -> None:
        self.file.close()


def check_installed(logger: LoggerConfig) -> None:
    """Raises FinetuneError where a library that is to be logged to is not there; before anything is loaded."""
    asked = {"tensorboard_dir": "tensorboard"} if logger.tensorboard_dir else {}
    asked |= {"wandb_project": "wandb"} if logger.wandb_project else {}
    for field, library in asked.items():
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise FinetuneError(f"logger.{field} needs {library}: pip install it, or leave the option out") from error


class TensorBoard:
    def __init__(self, folder: str, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=first_step)

    def write(self, step: int, values: Mapping) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, config: FinetuneConfig, folder: Path):
        import wandb

        self.run = wandb.init(
            project=config.logger.wandb_project,
            entity=config.logger.wandb_entity,
            name=config.logger.wandb_exp_name or config.name,
            config=config.to_dict(),
            dir=str(folder),
            resume="allow",
        )

    def write(self, step: int, values: Mapping) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Console:
    """A live line with a bar on a terminal, a line every ``interval`` steps elsewhere."""

    def __init__(self, total: int, first: int, interval: int, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.total, self.interval = total, max(interval, 1)
        self.began, self.first, self.live = time.monotonic(), first, None
        if self.stream.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self.live = Progress(*columns, TimeRemainingColumn(compact=True))
            self.task = self.live.add_task("", total=total, completed=first)
            self.live.start()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """``step``: how many are done."""
        text = step_text(values)
        if self.live is not None:
            self.live.update(self.task, completed=step, description=text)
        elif step % self.interval == 0 or step in (self.first + 1, self.total):
            left = (time.monotonic() - self.began) / (step - self.first) * (self.total - step)
            self.say(
                f"step {step}/{self.total}  {text}  {int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left"
            )

    def say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()


def step_text(values: Mapping[str, float]) -> str:
    """The numbers of a step that a person watches."""
    parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}", f"norm {values['grad_norm']:.2f}"]
    parts.append(f"{values['tokens_per_s']:,.0f} tok/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if "memory_gib" in values:
        parts.append(f"{values['memory_gib']:.1f} GiB")
    parts.append(f"unused {values['padding']:.0%}")
    if values["data_wait"] > 0.05:
        parts.append(f"waiting for data {values['data_wait']:.0%}")
    return "  ".join(parts)


def read_metrics(path: Path) -> list[dict]:
    """The rows that count: of a step that a resumed run did again, the last; a line cut off by a kill is left out."""
    rows: dict[tuple, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "resumed_from" in row:
            rows = {key: kept for key, kept in rows.items() if kept["step"] <= row["resumed_from"]}
        else:
            # what is told by the way, answers and bad records, is not told again for a step
            kind = next((kind for kind in ("loss", "valid_loss") if kind in row), len(rows))
            rows[row["step"], kind] = row
    return list(rows.values())


def plot(folder: Path) -> Path | None:
    """``loss.png`` of ``metrics.jsonl``: training and validation loss, learning rate below; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    rows = read_metrics(folder / METRICS)
    train = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "valid_loss" in row]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    steps = [row["step"] for row in train]
    top.plot(steps, [row["loss"] for row in train], color="tab:blue", alpha=0.3, linewidth=1)
    top.plot(steps, smoothed([row["loss"] for row in train]), color="tab:blue", label="training")
    if valid:
        at = [row["step"] for row in valid]
        top.plot(at, [row["valid_loss"] for row in valid], color="tab:orange", marker="o", label="validation")
        right = top.twinx()
        right.plot(
            at, [row["valid_accuracy"] for row in valid], color="tab:green", linestyle=":", label="token accuracy"
        )
        right.set_ylabel("validation token accuracy")
        right.set_ylim(0, 1)
    top.set_ylabel("loss per supervised token")
    top.legend(loc="upper center")
    bottom.plot(steps, [row["lr"] for row in train], color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    figure.savefig(folder / PLOT, dpi=110)
    pyplot.close(figure)
    return folder / PLOT


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average, unbiased at the start."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out
