"""Training, greedy evaluation and step timing for the demo: plain PyTorch loops around a Hugging Face model."""

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import m3kernels
from m3kernels.cli.demo_data import ChatEncoder, Digits, Sample, collate, draw_sample

MAX_ANSWER_TOKENS = 6


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: AdamW, linear warmup, cosine decay to ``final_lr_ratio`` of the peak."""

    steps: int = 600
    batch_size: int = 24
    lr: float = 2e-3
    warmup_steps: int = 40
    final_lr_ratio: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    validate_every: int = 100
    validation_samples: int = 48

    def lr_at(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / min(self.warmup_steps, self.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * warmup * (self.final_lr_ratio + (1 - self.final_lr_ratio) * cosine)


class MasterAdamW:
    """AdamW on fp32 master weights; the model keeps its own dtype. In an fp32 model the masters are its parameters."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self.max_grad_norm = config.max_grad_norm
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' gradients, which are then cleared."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        pairs = list(zip(self.parameters, self.masters))
        for parameter, master in pairs:
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        for parameter, master in pairs:
            if master is not parameter:
                parameter.copy_(master)


@dataclass(frozen=True)
class Progress:
    """State after a training step. ``accuracy`` is None except after the steps that end with a validation."""

    step: int
    loss: float
    accuracy: float | None


def _place(model: nn.Module) -> dict:
    parameter = next(model.parameters())
    return {"device": str(parameter.device), "dtype": parameter.dtype}


def random_batch(encoder: ChatEncoder, digits: Digits, rng: np.random.Generator, size: int, model: nn.Module) -> dict:
    """A training batch of freshly drawn pages, where the model is and in its dtype."""
    return collate([encoder.encode(draw_sample(digits, rng)) for _ in range(size)], **_place(model))


def train(
    model: nn.Module,
    encoder: ChatEncoder,
    digits: Digits,
    validation: Sequence[Sample],
    config: TrainConfig,
    *,
    seed: int,
) -> Iterator[Progress]:
    """Train in place, one step per item. Pages are drawn anew for every batch."""
    rng = np.random.default_rng(seed)
    optimizer = MasterAdamW(model, config)
    for step in range(config.steps):
        batch = random_batch(encoder, digits, rng, config.batch_size, model)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step(config.lr_at(step))
        accuracy = None
        if (step + 1) % config.validate_every == 0:
            accuracy = exact_accuracy(answer(model, encoder, validation), validation)
        yield Progress(step + 1, loss.item(), accuracy)


@torch.no_grad()
def answer(model: nn.Module, encoder: ChatEncoder, samples: Sequence[Sample], *, batch_size: int = 32) -> list[str]:
    """Greedy answers by ``model.generate``. The model's mode is kept."""
    training, answers = model.training, []
    model.eval()
    for start in range(0, len(samples), batch_size):
        encoded = [encoder.encode(sample) for sample in samples[start : start + batch_size]]
        inputs = collate(encoded, prompts_only=True, **_place(model))
        tokens = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answers += [encoder.decode(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    model.train(training)
    return answers


def exact_accuracy(answers: Sequence[str], samples: Sequence[Sample]) -> float:
    """Share of answers that are right to the letter; two digits with one wrong count as wrong."""
    return sum(given == sample.answer for given, sample in zip(answers, samples, strict=True)) / len(samples)


def accuracy_by_question(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """:func:`exact_accuracy` for each question that occurs."""
    rights: dict[str, list[bool]] = {}
    for given, sample in zip(answers, samples, strict=True):
        rights.setdefault(sample.question, []).append(given == sample.answer)
    return {question: statistics.fmean(right) for question, right in sorted(rights.items())}


@dataclass(frozen=True)
class Timing:
    """Median time of a training step (forward, backward, optimizer) and the most memory it took."""

    milliseconds: float
    peak_mebibytes: float


def time_steps(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], config: TrainConfig, *, warmup: int = 5, repeats: int = 30
) -> Timing:
    """Time training steps of a model on CUDA with events. Trains the model: hand in a copy."""
    optimizer = MasterAdamW(model, config)
    times = []
    for i in range(warmup + repeats):
        if i == warmup:
            torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model(**batches[i % len(batches)]).loss.backward()
        optimizer.step(config.lr)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return Timing(statistics.median(times[warmup:]), torch.cuda.max_memory_allocated() / 2**20)


def compare_timings(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], config: TrainConfig
) -> tuple[Timing, Timing]:
    """(patched, eager) timings from the same weights. The model itself is left as it is."""
    timings = []
    for patched in (True, False):
        twin = copy.deepcopy(model).train()
        m3kernels.unpatch(twin)
        if patched:
            m3kernels.patch(twin)
        timings.append(time_steps(twin, batches, config))
        del twin
        torch.cuda.empty_cache()
    return timings[0], timings[1]


class Stopwatch:
    """Wall and CPU seconds since it was made; they differ when others use the cores, or when several are used."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def wall(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu(self) -> float:
        return time.process_time() - self._cpu
