"""Finetune recipes by model size, with the arguments and defaults of Megatron-Bridge's documentation page.

    from m3kernels.models.recipes import ministral3_3b_finetune_config

    config = ministral3_3b_finetune_config(pretrained_checkpoint="DIR", dataset_type="hf", peft="lora", train_iters=200)
    config.train()

docs/finetune.md compares each default with upstream's.
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from m3kernels.models.finetune.config import (
    CheckpointConfig,
    DatasetConfig,
    FinetuneConfig,
    FinetuneError,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    PeftConfig,
    SchedulerConfig,
    TrainConfig,
    ValidationConfig,
)

DEFAULT_MAKER = "make_cord_v2_dataset"
LR_FULL, LR_PEFT = 5e-6, 1e-4
ALPHA = {"lora": 32.0, "dora": 64.0}
SCHEMES = ("none", *ALPHA)


@dataclass(frozen=True)
class Size:
    """Attributes: (layers, hidden size) of the language model, ranks that share a layer in full and in PEFT runs."""

    shape: tuple[int, int]
    tp_full: int
    tp_peft: int


SIZES = {"3b": Size((26, 3072), 1, 1), "8b": Size((34, 4096), 2, 1), "14b": Size((40, 5120), 4, 2)}


def _recipe(
    size: str,
    *,
    hf_path: str | None = None,
    dir: str | None = None,
    name: str = "default",
    train_data_path: str | Sequence[str] | None = None,
    valid_data_path: str | Sequence[str] | None = None,
    test_data_path: str | Sequence[str] | None = None,
    dataset_type: str | None = None,
    image_folder: str | None = None,
    tokenizer_model: str | None = None,
    seq_length: int = 4096,
    tensor_model_parallel_size: int | None = None,
    pipeline_model_parallel_size: int = 1,
    pipeline_dtype: object = None,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    sequence_parallel: bool | None = None,
    use_megatron_fsdp: bool = False,
    train_iters: int = 1000,
    global_batch_size: int = 32,
    micro_batch_size: int = 1,
    eval_interval: int = 30,
    save_interval: int = 50,
    finetune_lr: float | None = None,
    min_lr: float = 0.0,
    lr_warmup_iters: int = 50,
    lr_decay_iters: int | None = None,
    precision_config: str | None = None,
    comm_overlap_config: object = None,
    freeze_language_model: bool | None = None,
    freeze_vision_model: bool | None = None,
    freeze_vision_projection: bool | None = None,
    pretrained_checkpoint: str | None = None,
    peft: str | PeftConfig | None = "lora",
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    wandb_exp_name: str | None = None,
) -> FinetuneConfig:
    if isinstance(peft, PeftConfig):
        adapters = peft
    else:
        scheme = str(peft).lower()
        if scheme not in SCHEMES:
            raise FinetuneError(f"peft is {peft!r}; allowed: 'lora', 'dora', None (all weights), or a PeftConfig")
        adapters = PeftConfig(scheme=scheme, alpha=ALPHA.get(scheme, 32.0))
    full = adapters.scheme == "none"
    _note_ignored(
        pipeline_dtype=pipeline_dtype,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        comm_overlap_config=comm_overlap_config,
        use_megatron_fsdp=use_megatron_fsdp or None,
        sequence_parallel=None if sequence_parallel is None else "sequence_parallel, which is on wherever tp > 1",
    )
    paths = [_paths(path) for path in (train_data_path, valid_data_path, test_data_path)]
    kind = dataset_type or ("local" if paths[0] else "mock")
    parallel = SIZES[size].tp_full if full else SIZES[size].tp_peft
    return FinetuneConfig(
        name=name,
        dir=dir,
        size=size,
        train=TrainConfig(
            train_iters=train_iters,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            precision=precision_config or "bf16_mixed",
        ),
        model=ModelConfig(
            freeze_language_model=freeze_language_model,
            freeze_vision_model=freeze_vision_model,
            freeze_vision_projection=freeze_vision_projection,
            tensor_model_parallel_size=tensor_model_parallel_size or parallel,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
        ),
        peft=adapters,
        optimizer=OptimizerConfig(lr=finetune_lr or (LR_FULL if full else LR_PEFT), min_lr=min_lr),
        scheduler=SchedulerConfig(lr_warmup_iters=lr_warmup_iters, lr_decay_iters=lr_decay_iters),
        dataset=DatasetConfig(
            type=kind,
            maker_name=(DEFAULT_MAKER,) if kind == "hf" else (),
            train_data_path=paths[0],
            valid_data_path=paths[1],
            test_data_path=paths[2],
            image_folder=image_folder,
            seq_length=seq_length,
            tokenizer=tokenizer_model or (hf_path if pretrained_checkpoint else None),
        ),
        validation=ValidationConfig(eval_interval=eval_interval),
        checkpoint=CheckpointConfig(
            pretrained_checkpoint=pretrained_checkpoint or hf_path, save_interval=save_interval
        ),
        logger=LoggerConfig(wandb_project=wandb_project, wandb_entity=wandb_entity, wandb_exp_name=wandb_exp_name),
    )


def _paths(path: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if path is None else (path,) if isinstance(path, str) else tuple(path)


def _note_ignored(**given) -> None:
    """Arguments of the documented recipes that mean nothing here are said to, not refused."""
    for name, value in given.items():
        if value is not None:
            print(f"note: {name} has no effect here", file=sys.stderr)


def _named(size: str):
    def recipe(**options) -> FinetuneConfig:
        return _recipe(size, **options)

    tp_full, tp_peft = SIZES[size].tp_full, SIZES[size].tp_peft
    signature = inspect.signature(_recipe)
    recipe.__signature__ = signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "size"])
    recipe.__name__ = recipe.__qualname__ = f"ministral3_{size}_finetune_config"
    recipe.__doc__ = f"""A finetune of Ministral 3 {size.upper()}; ``.train()`` of what it returns runs it.

    Learning rate {LR_FULL} for all weights and {LR_PEFT} for LoRA and DoRA, tensor parallel {tp_full} and {tp_peft}, 32 samples
    a step, 4096 tokens a forward, 50 steps of warm-up, then cosine to ``min_lr``.

    Args:
        pretrained_checkpoint: folder or Hub id of a Hugging Face checkpoint, or a native one; ``hf_path`` where left out.
        dataset_type: "mock", "hf" (makers), "local" or "preloaded" (files of ``train_data_path``).
        peft: "lora", "dora", None for all weights, or a PeftConfig.
        freeze_language_model, freeze_vision_model, freeze_vision_projection: True trains nothing of that part. Without PEFT
            all parts are trained by default; with PEFT the language model's adapters are, and an explicit False of one of
            the other two trains it as a whole beside them.
        tokenizer_model: folder of tokenizer and processor, where that is not ``pretrained_checkpoint``.
        precision_config: "bf16_mixed", "bf16_stochastic", "fp32" or "fp64".
        pipeline_dtype, virtual_pipeline_model_parallel_size, sequence_parallel, use_megatron_fsdp, comm_overlap_config:
            accepted and said to have no effect.

    Every other argument is the field of the same name in m3kernels.models.finetune.config.

    Raises:
        FinetuneError: a value that is not allowed.
        TypeError: an argument that there is not.
    """
    return recipe


ministral3_3b_finetune_config = _named("3b")
ministral3_8b_finetune_config = _named("8b")
ministral3_14b_finetune_config = _named("14b")
RECIPES = {
    "3b": ministral3_3b_finetune_config,
    "8b": ministral3_8b_finetune_config,
    "14b": ministral3_14b_finetune_config,
}


def size_of(layers: int, hidden_size: int) -> str:
    """The recipe for a language model; the smallest for one that is none of the released."""
    return next((size for size, s in SIZES.items() if s.shape == (layers, hidden_size)), "3b")
