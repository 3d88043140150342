"""The learning rate of each step."""

import math

from m3kernels.models.finetune.config import FinetuneConfig


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Of a step counted from 0: a linear rise to ``lr`` over the warm-up, then down to ``min_lr``, and that from there on."""
    top, low = config.optimizer.lr, config.optimizer.min_lr
    warmup = config.scheduler.lr_warmup_iters
    if step < warmup:
        return top * (step + 1) / warmup
    style = config.scheduler.lr_decay_style
    last = config.scheduler.lr_decay_iters or config.train.train_iters
    if style == "constant" or last <= warmup:
        return top
    done = min(1.0, (step - warmup) / (last - warmup))
    share = (1 + math.cos(math.pi * done)) / 2 if style == "cosine" else 1 - done
    return low + (top - low) * share
