"""The steps of a run, and everything that happens between them: saving, evaluating, stopping, telling."""

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from m3kernels.models.finetune import metrics
from m3kernels.models.finetune.build import Built, weights_fingerprint
from m3kernels.models.finetune.checkpoint import Checkpointer, CheckpointFailed, read_record
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.data.loader import step_batches
from m3kernels.models.finetune.data.plan import BadRecords, StepBatch
from m3kernels.models.finetune.estimate import flops_a_token, peak_flops
from m3kernels.models.finetune.evaluate import answer, evaluate
from m3kernels.models.finetune.optimizer import set_step
from m3kernels.models.finetune.process import Process, StopSignals, Watch
from m3kernels.models.finetune.progress import Data, Progress, Result, git_commit, versions
from m3kernels.models.finetune.resolve import Folders, changes
from m3kernels.models.finetune.results import export
from m3kernels.models.finetune.schedule import learning_rate
from m3kernels.models.finetune.step import NonFinite, Shared, StepResult, run_step, share
from m3kernels.models.float64 import float64_islands
from m3kernels.parallel import rank_in, size_of

GIB = 2**30
GARBAGE_STEPS = 50
T = TypeVar("T")


@contextmanager
def collecting_garbage_together() -> Iterator[None]:
    """No garbage is collected inside but by calls: Python's own collections come at other steps on each rank, and all wait."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


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
        self.signals: StopSignals | None = None
        self.watch: Watch | None = None
        self.stopping = False  # all ranks know
        self.resumed_from: Path | None = None
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
        self.resumed_from = latest
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
        """Trains to the end or until it is asked to stop; returns the last loss.

        Raises:
            FinetuneError: a step, the data or the last checkpoint failed; on every rank, but where memory ran out.
        """
        self._open_sinks()
        self.signals, self.watch = signals, watch
        iters, loss = self.config.train.train_iters, math.nan
        if self.progress.step >= iters:
            self.say(
                f"{self.progress.step} steps are over already: raise train.train_iters to go on, or take another name"
            )
        batches = step_batches(self.data.train, self.progress.step, iters, **self._share_of_data())
        with closing(batches), collecting_garbage_together():
            while self.progress.step < iters and not self.stopping:
                loss = self._step(batches, loss)
        watch.beat("the end of the last checkpoint")
        self.checkpoints.wait()
        if self.stopping and self.progress.step < iters:
            why = signals.received or "another rank, or train.exit_duration_in_mins"
            self.say(f"stopped by {why} after step {self.progress.step}; start again to go on")
        return loss

    def _step(self, batches: Iterator[StepBatch], loss: float) -> float:
        """One step and what comes after it; only a checkpoint where ranks were asked to stop. ``loss``: of the one before."""
        progress, began = self.progress, time.perf_counter()
        self.watch.beat(f"waiting for the data of step {progress.step + 1}")
        batch, shared = self._next(batches)
        waited = time.perf_counter() - began
        if shared.written:
            self._tolerated(self.checkpoints.wait)
        if shared.stop:
            # the batch is seen by the run that goes on: launchers kill soon after their SIGTERM
            self.stopping = True
            if progress.step:
                self._save(must=True)
            return loss
        self._count_bad(batch, shared)
        try:
            with self._precision():
                result = run_step(self.built, batch, shared, self.config, progress.step, self.watch.beat)
        except NonFinite as error:
            raise FinetuneError(f"{error}. {self._last_checkpoint()}") from error
        progress.step += 1
        progress.optimizer_steps += result.stepped
        progress.tokens += shared.tokens
        self._tell(result, shared, time.perf_counter() - began, waited)
        skipped, most = progress.step - progress.optimizer_steps, self.config.train.max_skipped
        if not result.stepped and skipped > most:
            raise FinetuneError(
                f"{skipped} steps were skipped for NaN or Inf; train.max_skipped is {most}. {self._last_checkpoint()}"
            )
        self._after_step()
        if progress.step % GARBAGE_STEPS == 0:
            gc.collect(1)
        return result.loss

    def _next(self, batches: Iterator[StepBatch]) -> tuple[StepBatch, Shared]:
        """The next batch, and what ranks say about theirs; raises on all of them where one could not make its own."""
        batch, error = None, None
        try:
            batch = next(batches)
        except (FinetuneError, RuntimeError) as raised:
            error = raised
        self.watch.beat(f"what the other ranks say before step {self.progress.step + 1}")
        shared = share(self.built, batch, self._wants_to_stop(), self.checkpoints.poll())
        if shared.failed:
            said = [None] * self.process.size
            dist.all_gather_object(said, error and f"rank {self.process.rank}: {error}")
            raise FinetuneError(next(text for text in said if text)) from error
        return batch, shared

    def _share_of_data(self) -> dict[str, int]:
        """Which part of each global batch is this rank's, and how many processes make it."""
        group = self.built.model.layout.batch_group
        return {"rank": rank_in(group), "ranks": size_of(group), "num_workers": self.config.dataset.num_workers}

    def _precision(self):
        return float64_islands() if self.config.train.precision == "fp64" else nullcontext()

    def _wants_to_stop(self) -> bool:
        minutes = self.config.train.exit_duration_in_mins
        return bool(self.signals.received) or bool(minutes and time.monotonic() - self.began > 60 * minutes)

    def _until_stop(self, items: Iterable[T]) -> Iterator[T]:
        """Equally many ``items`` on every rank, until one is asked to stop: all then end together."""
        for item in items:
            wish = torch.tensor(self._wants_to_stop(), dtype=torch.int32)
            dist.all_reduce(wish)
            if self.stopping or wish:
                self.stopping = True
                return
            yield item

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

    def _after_step(self) -> None:
        """Evaluates and saves where it is time to."""
        step, last = self.progress.step, self.progress.step == self.config.train.train_iters
        every, interval = self.config.validation.eval_interval, self.config.checkpoint.save_interval
        better = False
        if self.data.valid is not None and every and (step % every == 0 or last):
            better = self._evaluate()
        if last or self.stopping or better or (interval and step % interval == 0):
            # what ends the run is lost with it; before that the training can go on
            self._save(must=last or self.stopping)

    def _save(self, *, must: bool) -> None:
        """Writes a checkpoint; one that fails ends the run only where it ``must`` be written."""
        self.watch.beat(f"the checkpoint of step {self.progress.step}")
        # that an earlier one failed is no reason not to write this one
        self._tolerated(self.checkpoints.wait)

        def save() -> None:
            self.checkpoints.save(self.progress.step, self.tensors(), self.record())

        save() if must else self._tolerated(save)

    def _tolerated(self, save: Callable[[], None]) -> None:
        try:
            save()
        except CheckpointFailed as error:
            self.say(f"WARNING: {error}. The training goes on; make room before step {self.config.train.train_iters}")
            self._write({"checkpoint_failed": str(error)})

    def _last_checkpoint(self) -> str:
        """What a run that ends here can go on from; all ranks ask."""
        self._tolerated(self.checkpoints.wait)
        last = self.checkpoints.latest() or self.resumed_from
        return f"The last checkpoint is {last}" if last else "No checkpoint was written yet"

    def _evaluate(self) -> bool:
        """Whether this was the best validation loss so far."""
        batches = self.data.valid.eval_batches(self.config.validation.eval_iters, **self._share_of_data())
        batches = self._until_stop(batches)
        with self._precision():
            found = evaluate(self.built.model, batches, self.built.dtype, self.watch.beat)
        if self.stopping:
            return False  # a part of the set says nothing
        self.say(
            f"step {self.progress.step}: validation loss {found.loss:.4f}, tokens right {found.accuracy:.1%}, "
            f"answers right {found.exact:.1%} of {found.samples}"
        )
        self._write({f"valid_{name}": value for name, value in asdict(found).items()})
        self._show_answers()
        better = math.isfinite(found.loss) and found.loss < self.progress.best.get("loss", math.inf)
        if better:
            self.progress.best = {"step": self.progress.step, "loss": found.loss}
            self.checkpoints.best_step = self.progress.step
        return better

    def _show_answers(self) -> None:
        for prompt in self._until_stop(self.data.valid.prompts(self.config.validation.generate_samples)):
            self.watch.beat(f"an answer to {prompt.where}")
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
