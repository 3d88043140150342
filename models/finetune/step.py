"""One optimizer step: backward of every micro batch, the gradient norm, and a check before anything is changed."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from m3kernels.models.finetune.build import Built
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.data.plan import MicroBatch, StepBatch
from m3kernels.models.finetune.optimizer import ready_step, set_learning_rate
from m3kernels.models.finetune.schedule import learning_rate
from m3kernels.parallel import rank_in


@dataclass(frozen=True)
class Shared:
    """What ranks tell each other before a step.

    Attributes:
        supervised, tokens, capacity, read, bad: sums over all batches of the step.
        stop: whether a rank was asked to stop.
        written: whether every rank has written its part of an asynchronous checkpoint.
        failed: whether a rank could not make its batch; the sums then say nothing.
    """

    supervised: int
    tokens: int
    capacity: int
    read: int
    bad: int
    stop: bool
    written: bool
    failed: bool


class NonFinite(FinetuneError):
    """A loss or a gradient that is NaN or Inf, before anything was changed; on every rank."""


@dataclass(frozen=True)
class StepResult:
    """Attributes: loss per supervised token of all ranks, norm of the gradient before clipping, whether a step was taken."""

    loss: float
    grad_norm: float
    stepped: bool


def share(built: Built, batch: StepBatch | None, stop: bool, written: bool) -> Shared:
    """Over all ranks; counts of batches once for each tensor-parallel group.

    Args:
        batch: None on a rank that could not make its own.

    Raises:
        FinetuneError: ranks read other data than each other.
    """
    counts, agreed = torch.zeros(5, dtype=torch.int64, device="cpu"), 0
    if batch is not None:
        agreed = batch.agreed
        if rank_in(built.model.layout.tp_group) == 0:
            counts += torch.tensor([batch.supervised, batch.tokens, batch.capacity, batch.read, len(batch.bad)])
    both = torch.cat([counts, torch.tensor([stop, not written, batch is None, agreed])])
    if dist.get_world_size() > 1:
        dist.all_reduce(both)
    *sums, stops, unwritten, failed, all_agreed = both.tolist()
    if not failed and all_agreed != agreed * dist.get_world_size():
        raise FinetuneError(
            f"step {batch.step + 1}: rank {dist.get_rank()} read other samples than another rank: the data must be the same "
            "files on every host"
        )
    return Shared(*sums, stop=stops > 0, written=unwritten == 0, failed=failed > 0)


def run_step(
    built: Built, batch: StepBatch, shared: Shared, config: FinetuneConfig, step: int, beat: Callable[[str], None]
) -> StepResult:
    """Forward, backward and update.

    Raises:
        NonFinite: loss or gradient that are NaN or Inf, with ``on_nonfinite=stop``; on every rank, and nothing was changed.
        FinetuneError: GPU memory that is too small, on the rank whose it is.
    """
    model, trained, optimizer = built.model, built.trained, built.optimizer
    supervised = max(shared.supervised, 1)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for micro in batch.micro_batches:
        beat(f"step {step + 1}, {', '.join(micro.samples[:3])}")
        try:
            loss = model(**micro.inputs(model.device, built.dtype), num_items_in_batch=supervised).loss
            loss.backward()
        except torch.OutOfMemoryError as error:
            raise FinetuneError(out_of_memory(micro, step, error)) from error
        total += loss.detach()
    trained.fill_gradients()
    total_norm = trained.gradient_norm()
    set_learning_rate(optimizer, learning_rate(config, step))
    take_step = ready_step(trained, optimizer, total_norm, config.optimizer.clip_grad)
    loss, norm = torch.stack([total, total_norm.to(total)]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        trained.zero_grad()
        del take_step  # which holds gradients
        if config.train.on_nonfinite == "stop":
            raise NonFinite(nonfinite(built, batch, step, loss, norm))
        return StepResult(loss, norm, stepped=False)
    take_step()
    return StepResult(loss, norm, stepped=True)


def out_of_memory(micro: MicroBatch, step: int, error: Exception) -> str:
    """Which batch it was, and what to lower."""
    images = ", ".join(f"{h}x{w}" for h, w in micro.image_sizes) or "none"
    return (
        f"out of GPU memory in step {step + 1}: {micro.input_ids.numel()} tokens of {', '.join(micro.samples)}; images: "
        f"{images}. Lower dataset.seq_length or dataset.max_image_size, take train.recompute=all, "
        f"more model.tensor_model_parallel_size or ranks, or adapters (peft.scheme=lora). PyTorch: {str(error).splitlines()[0]}"
    )


@torch.no_grad()
def nonfinite(built: Built, batch: StepBatch, step: int, loss: float, norm: float) -> str:
    """Which rank and samples a NaN or Inf came from, found by a forward of each rank's batches alone."""
    model = built.model
    everyone = model.layout
    alone = dataclasses.replace(everyone)
    alone.__dict__["batch_group"] = None
    guilty = []
    for micro in batch.micro_batches:
        model.layout = alone
        try:
            own = model(**micro.inputs(model.device, built.dtype), num_items_in_batch=1).loss
        finally:
            model.layout = everyone
        if not bool(torch.isfinite(own)):
            guilty.append(f"rank {dist.get_rank()}: {', '.join(micro.samples)} (loss {float(own)})")
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, guilty)
    named = list(dict.fromkeys(line for lines in found for line in lines))
    where = "; ".join(named[:8]) or f"the backward, of samples such as {', '.join(batch.micro_batches[0].samples[:4])}"
    return (
        f"loss {loss}, gradient norm {norm} in step {step + 1}: not finite, so the step was not taken. From {where}. "
        "Look at these samples, lower optimizer.lr, or pass train.on_nonfinite=skip"
    )
