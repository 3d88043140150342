"""A finetune run from a configuration to exported weights."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from m3kernels.models.finetune import metrics
from m3kernels.models.finetune.build import build, model_on_meta, open_checkpoint
from m3kernels.models.finetune.checkpoint import only_writer
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.data.sources import open_source
from m3kernels.models.finetune.estimate import GIB, Memory, choose_recompute, summary
from m3kernels.models.finetune.process import Process, StopSignals, Watch, process_group
from m3kernels.models.finetune.progress import Data, Result
from m3kernels.models.finetune.resolve import Folders, check, folders
from m3kernels.models.finetune.run import Run
from m3kernels.models.ministral3 import Ministral3, sharding
from m3kernels.models.ministral3.weights import Checkpoint
from m3kernels.parallel import make_mesh


def finetune(config: FinetuneConfig, *, dry_run: bool = False) -> Result | None:
    """Runs a configuration; goes on from the newest complete checkpoint where there is one.

    Args:
        config: of ``m3kernels.models.recipes``, or made by hand.
        dry_run: print what would be done and return None; a single process stands for as many as one copy of the model takes.

    Raises:
        FinetuneError: the configuration, the data or a step is not as it must be.
        CheckpointError: the pretrained checkpoint is not.
    """
    with ExitStack() as stack:
        process = stack.enter_context(process_group(config.train.timeout_minutes, config.train.device))
        say = print if process.first else _silent
        try:
            planned = plan(config, process, dry_run, say)
        except Exception as error:
            # no rank has begun, and each found the same
            error.on_all_ranks = True
            raise
        if dry_run:
            return None
        tp, device = config.model.tensor_model_parallel_size, process.device

        # the model, and the state of an earlier run; ranks that share layers draw the same dropout
        torch.manual_seed(config.rng.seed + dist.get_rank() // tp)
        mesh = make_mesh(tp=tp, replicate=config.model.replicate, device_type=device.type)
        options = {"progress": process.first, "keep_gathered": planned.memory.kept > 0}
        built = build(planned.model, config, planned.checkpoint, mesh, device, **options)
        if built.fused is not None:
            say(built.fused if device.type == "cuda" else "no GPU: plain PyTorch in place of the kernels")
        say(f"optimizer: {config.optimizer.name}, {getattr(built.optimizer, 'backend', 'bitsandbytes')}")
        stack.enter_context(only_writer(planned.where.checkpoints))
        run = Run(config, process, planned.where, planned.data, built)
        stack.callback(run.close)
        run.resume()

        # steps, then what is left behind
        with StopSignals() as signals, Watch(config.train.timeout_minutes * 60, run.stack_file, process.rank) as watch:
            loss = run.steps(signals, watch)
        return run.finish(loss)


@dataclass(frozen=True)
class Planned:
    """What is known before a weight is loaded; ``model`` is on the meta device and knows what it will recompute."""

    where: Folders
    checkpoint: Checkpoint
    data: Data
    model: Ministral3
    memory: Memory


def plan(config: FinetuneConfig, process: Process, dry_run: bool, say: Callable[[object], None]) -> Planned:
    """Checks what can be checked while it costs nothing, and says what will be trained, where, and in how much memory."""
    tp = config.model.tensor_model_parallel_size
    # one process is enough to see what several would do
    ranks = tp * config.model.replicate if dry_run and process.size == 1 else process.size
    check(config, ranks)
    metrics.check_installed(config.logger)
    where = folders(config)

    checkpoint = open_checkpoint(config)
    data = open_data(config, checkpoint.folder, say)
    model = model_on_meta(config, checkpoint)
    sharding.check(model.config, tp)
    on_gpu = process.device.type == "cuda"
    gpu_bytes = torch.cuda.get_device_properties(process.device).total_memory if on_gpu else None
    memory = choose_recompute(model, config, tp, ranks // tp, gpu_bytes)
    if dry_run:
        say(json.dumps(config.to_dict(), indent=2))
    say(summary(config, model, memory, ranks, data.train.steps_per_epoch))
    if gpu_bytes is not None and memory.total > gpu_bytes:
        say(
            f"WARNING: that may not fit into {gpu_bytes / GIB:.1f} GiB: take more ranks (tensor_model_parallel_size or data "
            "parallel), peft.scheme=lora, train.precision=bf16_stochastic, or a smaller dataset.seq_length"
        )
    if data.valid is None and config.validation.eval_interval:
        say("no validation set: nothing is evaluated")
    if config.scheduler.lr_warmup_iters >= config.train.train_iters:
        iters = f"{config.train.train_iters} steps, scheduler.lr_warmup_iters is {config.scheduler.lr_warmup_iters}"
        say(f"note: {iters}: optimizer.lr {config.optimizer.lr} is hardly reached")
    say(f"tokens by {data.encoder.backend}; run folder {where.run}")
    return Planned(where, checkpoint, data, model, memory)


def open_data(config: FinetuneConfig, checkpoint: Path, say: Callable[[object], None]) -> Data:
    """Sets, their encoder and the order in which they are seen; ``say`` is told of sets without a validation split.

    Raises:
        FinetuneError: a set that is not there or has other columns, a checkpoint without a tokenizer.
    """
    data, train = config.dataset, config.train
    encoder = Encoder.open(
        data.tokenizer or checkpoint, max_image_size=data.max_image_size, system_prompt=data.system_prompt
    )
    options = {
        "seed": config.rng.seed,
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "seq_length": data.seq_length,
        "pack": data.pack,
    }
    source = open_source(data, "train", seed=config.rng.seed)
    if source is None:
        raise FinetuneError(f"there is no training set: dataset.split={data.split!r}, dataset.type={data.type}")
    plan = Plan(source, encoder, shuffle=data.shuffle, **options)
    valid = open_source(data, "valid", seed=config.rng.seed, say=say) if config.validation.eval_interval else None
    return Data(plan, None if valid is None else Plan(valid, encoder, shuffle=False, **options), encoder)


def _silent(*_) -> None:
    pass
