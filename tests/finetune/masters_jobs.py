"""What the ranks of tests/finetune/test_precision.py run."""

from unittest import mock

import torch

from m3kernels.models.finetune import run as running
from m3kernels.models.finetune.config import FinetuneConfig
from m3kernels.models.finetune.trainer import finetune
from m3kernels.models.ministral3.shards import part_of


def dtypes(made: FinetuneConfig) -> dict[str, set[torch.dtype]]:
    """Of what lies on this rank of trained parameters, masters, gradients of both in a step; and of parameters at the end."""
    original, found, kept = running.run_step, {}, []

    def watched(built, *args):
        hooks = [
            p.register_hook(lambda grad: found.setdefault("gradients", set()).add(part_of(grad).dtype))
            for p, _ in built.trained.copies
        ]
        result = original(built, *args)
        [hook.remove() for hook in hooks]
        found["parameters"] = {part_of(p).dtype for p, _ in built.trained.copies}
        found["masters"] = {part_of(m).dtype for _, m in built.trained.copies}
        same = [torch.equal(part_of(p), part_of(m).to(part_of(p).dtype)) for p, m in built.trained.copies]
        found["written back"] = {all(same) and bool(same)}
        kept.append(built)
        return result

    with mock.patch.object(running, "run_step", watched):
        finetune(made)
    (built, *_) = kept
    found["exported"] = {part_of(p).dtype for p, _ in built.trained.copies}
    return found
