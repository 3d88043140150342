"""The steps of a run, and everything that happens between them: saving, evaluating, stopping, telling."""

import json
import math
import subprocess
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from m3kernels.models.finetune import metrics
from m3kernels.models.finetune.build import Built, weights_fingerprint
from m3kernels.models.finetune.checkpoint import Checkpointer, CheckpointFailed, read_record
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.loader import step_batches
from m3kernels.models.finetune.data.plan import BadRecords, Plan, StepBatch
from m3kernels.models.finetune.estimate import flops_a_token, peak_flops
from m3kernels.models.finetune.evaluate import answer, evaluate
from m3kernels.models.finetune.optimizer import set_step
from m3kernels.models.finetune.process import Process, StopSignals, Watch
from m3kernels.models.finetune.resolve import Folders, changes
from m3kernels.models.finetune.results import export
from m3kernels.models.finetune.schedule import learning_rate
from m3kernels.models.finetune.step import Shared, StepResult, run_step, share
from m3kernels.models.float64 import float64_islands

PACKAGES = ("m3kernels", "torch", "triton", "transformers", "mistral-common", "datasets")
GIB = 2**30


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


class Run:
    """A model, its data and its folder, and how far it is."""

    def __init__(self, config: FinetuneConfig, process: Process, where: Folders, data: Data, built: Built):
        self.config, self.process, self.where, self.data, self.built = config, process, where, data, built
        self.progress = Progress()
        self.reasons: dict[str, str] = {}  # of bad records, by place
        options = {"keep": config.checkpoint.most_recent_k, "async_save": config.checkpoint.async_save}
        self.checkpoints = Checkpointer(where.checkpoints, **options)
        self.weights = weights_fingerprint(built.checkpoint)
        self.began = time.monotonic()
        self.sinks: list[metrics.Sink] = []
        self.console: metrics.Console | None = None
        self.tp = config.model.tensor_model_parallel_size
        where.run.mkdir(parents=True, exist_ok=True)
        self.stack_file = where.run / f"stack-rank-{process.rank}.txt"
        self.flops = flops_a_token(built.model, config)
        self.peak = peak_flops(process.device)

    def say(self, text: object) -> None:
        if self.process.first:
            self.console.say(str(text)) if self.console else print(text, flush=True)

    # the state of an earlier run

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: trained weights and their moments."""
        optimizer, found = self.built.optimizer, {}
        for name, master in self.built.trained.masters.items():
            found[f"weights.{name}"] = master.detach()
            found |= {f"{key}.{name}": x for key, x in optimizer.state[master].items() if key != "step"}
        return found

    def record(self) -> dict:
        """``run.json`` of a checkpoint."""
        return {
            **asdict(self.progress),
            "ranks": self.process.size,
            "tensor_parallel": self.tp,
            "config": self.config.to_dict(),
            "data": self.data.train.fingerprint,
            "weights": self.weights,
            "versions": versions(),
            "git": git_commit(),
        }

    def resume(self) -> None:
        """Goes on from the newest complete checkpoint, if there is one.

        Raises:
            FinetuneError: it was trained on other data or weights, or it trains other parameters.
        """
        checkpoints = Checkpointer(self.where.load, keep=0, async_save=False)
        latest = checkpoints.latest()
        if latest is None:
            if self.config.checkpoint.load:
                raise FinetuneError(f"checkpoint.load={self.where.load} holds no complete step-N checkpoint")
            return
        record = read_record(latest)
        self._check_same(latest, record)
        same_ranks = checkpoints.load(latest, self.tensors())
        self.built.trained.write_back()
        self.progress = Progress(**{key: record[key] for key in asdict(self.progress)})
        set_step(self.built.optimizer, self.progress.optimizer_steps)
        self.checkpoints.best_step = self.progress.best.get("step")
        self.say(f"resumed from {latest}, step {self.progress.step}")
        for change in changes(record["config"], self.config):
            self.say(f"  changed since: {change}")
        for name, version in versions().items():
            if record["versions"].get(name) != version:
                self.say(f"  {name} {version}, the checkpoint was written with {record['versions'].get(name)}")
        if not same_ranks:
            self.say(
                f"  {record['ranks']} ranks wrote it, {self.process.size} go on: dropout draws other numbers from here on"
            )

    def _check_same(self, latest: Path, record: Mapping) -> None:
        if self.config.checkpoint.allow_changed_data:
            return
        ways = "go back to what it was, save somewhere else (checkpoint.save, name), or pass checkpoint.allow_changed_data=True"
        if record["data"] != self.data.train.fingerprint:
            raise FinetuneError(
                f"{latest} saw other data (files, tokenizer, rng.seed, global batch or seq_length have changed): {ways}"
            )
        if record["weights"] != self.weights:
            before = record["config"]["checkpoint"]["pretrained_checkpoint"]
            raise FinetuneError(f"{latest} began with other pretrained weights ({before}): {ways}")

    # steps

    def steps(self, signals: StopSignals, watch: Watch) -> float:
        """Trains to the end or until it is asked to stop; returns the last loss."""
        self._open_sinks()
        train, progress, loss = self.config.train, self.progress, math.nan
        layout = self.built.model.layout
        ranks = self.process.size // self.tp
        rank = 0 if layout.batch_group is None else layout.batch_group.rank()
        options = {"rank": rank, "ranks": ranks, "num_workers": self.config.dataset.num_workers}
        batches = step_batches(self.data.train, progress.step, train.train_iters, **options)
        while progress.step < train.train_iters:
            began = time.perf_counter()
            watch.beat(f"waiting for the data of step {progress.step + 1}")
            batch = next(batches)
            waited = time.perf_counter() - began
            shared = share(self.built, batch, self._wants_to_stop(signals), self.checkpoints.poll())
            if shared.written:
                self._save_failed(self.checkpoints.wait)
            self._count_bad(batch, shared)
            with self._precision():
                result = run_step(self.built, batch, shared, self.config, progress.step, watch.beat)
            loss = result.loss
            progress.step += 1
            progress.optimizer_steps += result.stepped
            progress.tokens += shared.tokens
            self._tell(result, shared, time.perf_counter() - began, waited)
            skipped = progress.step - progress.optimizer_steps
            if skipped > train.max_skipped:
                raise FinetuneError(
                    f"{skipped} steps were skipped for NaN or Inf; train.max_skipped is {train.max_skipped}"
                )
            self._after_step(watch, shared.stop)
            if shared.stop:
                why = signals.received or "another rank, or train.exit_duration_in_mins"
                self.say(f"stopped by {why} after step {progress.step}; start again to go on")
                break
        batches.close()
        watch.beat("the end of the last checkpoint")
        self.checkpoints.wait()
        return loss

    def _precision(self):
        return float64_islands() if self.config.train.precision == "fp64" else nullcontext()

    def _wants_to_stop(self, signals: StopSignals) -> bool:
        minutes = self.config.train.exit_duration_in_mins
        return bool(signals.received) or bool(minutes and time.monotonic() - self.began > 60 * minutes)

    def _count_bad(self, batch: StepBatch, shared: Shared) -> None:
        """Adds up replaced records over all ranks; raises where they are too many of those read."""
        self.progress.read += shared.read
        if not shared.bad:
            return
        self.progress.bad += shared.bad
        found = [None] * self.process.size
        dist.all_gather_object(found, batch.bad)
        for where, reason in dict.fromkeys(pair for pairs in found for pair in pairs):
            self.reasons[where] = reason
            self.say(f"replaced {where}: {reason}")
            self._write({"replaced": where, "reason": reason})
        bad = BadRecords(self.progress.read, self.progress.bad, self.reasons)
        bad.raise_if_over(self.config.dataset.max_bad_share)

    def _after_step(self, watch: Watch, stopping: bool) -> None:
        """Evaluates and saves where it is time to."""
        step, last = self.progress.step, self.progress.step == self.config.train.train_iters
        every, interval = self.config.validation.eval_interval, self.config.checkpoint.save_interval
        better = False
        if self.data.valid is not None and every and (step % every == 0 or last) and not (stopping and not last):
            better = self._evaluate(watch)
        if last or stopping or better or (interval and step % interval == 0):
            watch.beat(f"the checkpoint of step {step}")
            save = lambda: self.checkpoints.save(step, self.tensors(), self.record())
            # what ends the run is lost with it; before that the training can go on
            save() if last or stopping else self._save_failed(save)

    def _save_failed(self, save) -> None:
        try:
            save()
        except CheckpointFailed as error:
            self.say(f"WARNING: {error}. The training goes on; make room before step {self.config.train.train_iters}")
            self._write({"checkpoint_failed": str(error)})

    def _evaluate(self, watch: Watch) -> bool:
        """Whether this was the best validation loss so far."""
        layout, validation = self.built.model.layout, self.config.validation
        rank = 0 if layout.batch_group is None else layout.batch_group.rank()
        ranks = self.process.size // self.tp
        batches = self.data.valid.eval_batches(validation.eval_iters, rank, ranks)
        with self._precision():
            found = evaluate(self.built.model, batches, self.built.dtype, watch.beat)
        self.say(
            f"step {self.progress.step}: validation loss {found.loss:.4f}, tokens right {found.accuracy:.1%}, "
            f"answers right {found.exact:.1%} of {found.samples}"
        )
        self._write({f"valid_{name}": value for name, value in asdict(found).items()})
        self._show_answers(watch)
        better = math.isfinite(found.loss) and found.loss < self.progress.best.get("loss", math.inf)
        if better:
            self.progress.best = {"step": self.progress.step, "loss": found.loss}
            self.checkpoints.best_step = self.progress.step
        return better

    def _show_answers(self, watch: Watch) -> None:
        for prompt in self.data.valid.prompts(self.config.validation.generate_samples):
            watch.beat(f"an answer to {prompt.where}")
            model = self.built.model
            pixels = None if prompt.pixel_values is None else prompt.pixel_values.to(model.device, self.built.dtype)
            ids = torch.tensor([prompt.tokens], device=model.device)
            options = {"eos": self.data.encoder.eos_token, "max_new_tokens": self.config.validation.max_new_tokens}
            given = self.data.encoder.decode(answer(model, ids, pixels, prompt.image_sizes, **options))
            self.say(f"  {prompt.where}: {given!r}  (wanted {prompt.answer!r})")
            self._write({"sample": prompt.where, "given": given, "wanted": prompt.answer})

    # telling

    def _open_sinks(self) -> None:
        if not self.process.first:
            return
        folder, step, logger = self.where.run, self.progress.step, self.config.logger
        self.sinks.append(metrics.JsonLines(folder / metrics.METRICS))
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        if logger.tensorboard_dir:
            self.sinks.append(metrics.TensorBoard(logger.tensorboard_dir, step))
        if logger.wandb_project:
            self.sinks.append(metrics.WandB(self.config, folder))
        if step:
            self.sinks[0].write(step, {"resumed_from": step})
        self.console = metrics.Console(self.config.train.train_iters, step, logger.log_interval)

    def _write(self, values: Mapping) -> None:
        for sink in self.sinks:
            sink.write(self.progress.step, values)

    def _tell(self, result: StepResult, shared: Shared, seconds: float, waited: float) -> None:
        if not self.process.first:
            return
        values = {
            "loss": result.loss,
            "lr": learning_rate(self.config, self.progress.step - 1),
            "grad_norm": result.grad_norm,
            "tokens": shared.tokens,
            "supervised": shared.supervised,
            "tokens_per_s": shared.tokens / seconds,
            "padding": 1 - shared.tokens / max(shared.capacity, 1),
            "data_wait": waited / seconds,
            "seconds": seconds,
        }
        if self.peak:
            values["mfu"] = self.flops * shared.tokens / seconds / self.peak / self.process.size
        if self.process.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        if not result.stepped:
            values["skipped"] = self.progress.step - self.progress.optimizer_steps
            self.say(f"WARNING: step {self.progress.step} was skipped: loss {result.loss}, norm {result.grad_norm}")
        self._write(values)
        self.console.step(self.progress.step, values)

    def finish(self, loss: float) -> Result:
        """Exports where the run is over, and draws its curves."""
        exported = {}
        over = self.progress.step == self.config.train.train_iters
        if over and self.config.checkpoint.also_save_hf_checkpoint:
            exported = export(self.config, self.built, self.where.run, progress=self.process.first)
            for kind, folder in exported.items():
                self.say(f"{kind} in {folder}")
        self.close()
        if self.process.first and (drawn := metrics.plot(self.where.run)):
            print(f"curves in {drawn}")
        return Result(self.where.run, self.progress.step, loss, exported)

    def close(self) -> None:
        """Closes what metrics go to."""
        if self.console is not None:
            self.console.close()
            self.console = None
        while self.sinks:
            self.sinks.pop().close()


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {}
    for name in PACKAGES:
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
