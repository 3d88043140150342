"""Validation loss and token accuracy, and answers that the model gives."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3kernels.models.finetune.data.plan import MicroBatch, StepBatch
from m3kernels.models.ministral3 import Ministral3
from m3kernels.parallel import all_reduce_sum

IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """Over a set.

    Attributes:
        loss: per supervised token.
        accuracy: share of supervised tokens that are the likeliest one after those before them.
        exact: share of samples all of whose supervised tokens are: what greedy decoding would answer word by word.
        tokens, samples: how many there were.
    """

    loss: float
    accuracy: float
    exact: float
    tokens: int
    samples: int


@torch.no_grad()
def evaluate(
    model: Ministral3, batches: Iterable[StepBatch], dtype: torch.dtype, beat: Callable[[str], None]
) -> Evaluation:
    """Over all ranks' batches; the same on every rank. Leaves the model in the mode that it was in.

    Args:
        dtype: what the model computes in.
    """
    training = model.training
    model.eval()
    total = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        for micro in batch.micro_batches:
            beat(f"evaluation, {', '.join(micro.samples[:3])}")
            total += _sums(model, micro, dtype)
    total = all_reduce_sum(total.to(model.device), model.layout.batch_group)
    model.train(training)
    loss, right, tokens, exact, samples = total.tolist()
    return Evaluation(loss / max(tokens, 1), right / max(tokens, 1), exact / max(samples, 1), int(tokens), int(samples))


def _sums(model: Ministral3, micro: MicroBatch, dtype: torch.dtype) -> Tensor:
    """(summed loss, tokens right, tokens, samples right, samples) of this rank's batch, from the supervised columns' logits."""
    inputs = micro.inputs(model.device, dtype)
    labels = F.pad(inputs.pop("labels").flatten(), (0, 1), value=IGNORED)[1:]
    at = (labels != IGNORED).nonzero()[:, 0]
    # a rank without labels takes part in the forward, which other ranks wait for
    columns = at if len(at) else torch.zeros(1, dtype=torch.long, device=at.device)
    logits = model(**inputs, logits_to_keep=columns).logits
    if not len(at):
        return torch.zeros(5, dtype=torch.float64)
    logits = logits.reshape(len(at), -1)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[at], reduction="sum")
    right = logits.argmax(-1) == labels[at]
    which = torch.bucketize(at.cpu(), torch.tensor(micro.cu_seqlens[1:]), right=True)
    wrong = set(which[~right.cpu()].tolist())
    seen = set(which.tolist())
    counts = [float(loss), int(right.sum()), len(at), len(seen - wrong), len(seen)]
    return torch.tensor(counts, dtype=torch.float64)


@torch.no_grad()
def answer(
    model: Ministral3, prompt: Tensor, pixels: Tensor | None, sizes, *, eos: int, max_new_tokens: int
) -> list[int]:
    """Greedy tokens after a prompt (1, T), without the end; every rank takes part with the same prompt."""
    training = model.training
    model.eval()
    images = {} if pixels is None else {"pixel_values": pixels, "image_sizes": sizes}
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **images)
    tokens: list[int] = []
    while True:
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        if dist.get_world_size() > 1:
            # ranks may differ by a rounding, and must stop together
            dist.broadcast(token, src=0)
        if int(token) == eos or len(tokens) == max_new_tokens:
            break
        tokens.append(int(token))
        out = model(input_ids=token, cache=out.cache, logits_to_keep=1)
    model.train(training)
    return tokens
