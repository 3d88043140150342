"""A finetune run from a configuration to exported weights."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from m3kernels.models.finetune.build import build, model_on_meta, open_checkpoint
from m3kernels.models.finetune.checkpoint import only_writer
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.data.encode import Encoder
from m3kernels.models.finetune.data.plan import Plan
from m3kernels.models.finetune.data.sources import open_source
from m3kernels.models.finetune.estimate import choose_recompute, summary
from m3kernels.models.finetune.process import StopSignals, Watch, process_group
from m3kernels.models.finetune.progress import Data, Result
from m3kernels.models.finetune.resolve import check, folders
from m3kernels.models.finetune.run import Run
from m3kernels.models.ministral3 import sharding
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
        # 1. processes, folders, and checks that cost nothing
        process = stack.enter_context(process_group(config.train.timeout_minutes))
        say = print if process.first else _silent
        tp, copies = config.model.tensor_model_parallel_size, config.model.replicate
        # one process is enough to see what several would do
        ranks = tp * copies if dry_run and process.size == 1 else process.size
        check(config, ranks)
        where = folders(config)

        # 2. what is read, trained and needed, while no weight is loaded
        checkpoint = open_checkpoint(config)
        data = open_data(config, checkpoint.folder, say)
        planned = model_on_meta(config, checkpoint)
        sharding.check(planned.config, tp)
        on_gpu = process.device.type == "cuda"
        gpu = torch.cuda.get_device_properties(process.device).total_memory if on_gpu else None
        memory = choose_recompute(planned, config, tp, ranks // tp, gpu)
        if dry_run:
            say(json.dumps(config.to_dict(), indent=2))
        say(summary(config, planned, memory, ranks, data.train.steps_per_epoch))
        if data.valid is None and config.validation.eval_interval:
            say("no validation set: nothing is evaluated")
        if config.scheduler.lr_warmup_iters >= config.train.train_iters:
            iters = f"{config.train.train_iters} steps, scheduler.lr_warmup_iters is {config.scheduler.lr_warmup_iters}"
            say(f"note: {iters}: optimizer.lr {config.optimizer.lr} is hardly reached")
        say(f"tokens by {data.encoder.backend}; run folder {where.run}")
        if dry_run:
            return None

        # 3. the model, and the state of an earlier run; ranks that share layers draw the same dropout
        torch.manual_seed(config.rng.seed + dist.get_rank() // tp)
        mesh = make_mesh(tp=tp, replicate=copies, device_type=process.device.type)
        built = build(config, checkpoint, mesh, process.device, progress=process.first)
        choose_recompute(built.model, config, tp, ranks // tp, gpu)
        if built.fused is not None:
            say(built.fused)
        say(f"optimizer: {config.optimizer.name}, {getattr(built.optimizer, 'backend', 'bitsandbytes')}")
        stack.enter_context(only_writer(where.checkpoints))
        run = Run(config, process, where, data, built)
        stack.callback(run.close)
        run.resume()

        # 4. steps, then what is left behind
        with StopSignals() as signals, Watch(config.train.timeout_minutes * 60, run.stack_file, process.rank) as watch:
            loss = run.steps(signals, watch)
        return run.finish(loss)


def open_data(config: FinetuneConfig, checkpoint: Path, say: Callable[[str], None]) -> Data:
    """Sets, their encoder and the order in which they are seen.

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
