"""What a finetune run is told, as frozen dataclasses under the names of Megatron-Bridge's documentation.

Flags, help and ``KEY=VALUE`` overrides are made from these fields: a new option is a field here.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal


class FinetuneError(ValueError):
    """A run that cannot be started or go on; the message says what was given, what is allowed and what to do.

    Attributes:
        on_all_ranks: whether every rank raises it with the same message, so that one of them is enough to say it.
    """

    on_all_ranks = False


@dataclass(frozen=True)
class TrainConfig:
    train_iters: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 32
    """Samples a step, over all ranks."""
    micro_batch_size: int = 1
    """Samples a forward without packing; with packing dataset.seq_length tokens decide."""
    precision: Literal["bf16_mixed", "bf16_stochastic", "fp32", "fp64"] = "bf16_mixed"
    """bf16_mixed: bf16 products, fp32 master weights, gradients and moments. bf16_stochastic: trained weights stay bf16 and
    are rounded stochastically. fp32, fp64: everything in that (fp64 on CPU, for tests)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPUs where there are any."""
    recompute: str = "auto"
    """none, cheap, attention or all; auto takes the least that fits the GPU's memory, none on a CPU."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do before a step whose loss or gradient norm is NaN or Inf."""
    max_skipped: int = 10
    """With on_nonfinite=skip: so many skipped steps end the run."""
    exit_duration_in_mins: float = 0.0
    """Save and exit after so many minutes; 0 is never."""
    timeout_minutes: float = 10.0
    """A collective or a batch that takes longer ends the run with a stack for each rank."""

    def __call__(self):
        """Runs the recipe that this is the ``train`` of: ``ministral3_3b_finetune_config(...).train()``."""
        from m3kernels.models.finetune.trainer import finetune

        return finetune(self.__dict__["_whole"])


@dataclass(frozen=True)
class ModelConfig:
    freeze_language_model: bool | None = None
    """True: not trained, and with PEFT without adapters. By default it is trained, with PEFT by its adapters."""
    freeze_vision_model: bool | None = None
    """True: not trained. By default it is trained, with PEFT only where peft.adapt_vision is set. An explicit False with PEFT
    trains it as a whole beside the adapters."""
    freeze_vision_projection: bool | None = None
    """The same of the projector between vision tower and language model."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; the key-value heads (8) must divide by it."""
    pipeline_model_parallel_size: int = 1
    """Only 1: more GPUs go to tensor_model_parallel_size or to data parallelism."""
    context_parallel_size: int = 1
    """Only 1: sequences are split over tensor-parallel ranks."""
    replicate: int = 1
    """Copies of the sharded model (HSDP)."""
    kernels: bool = True
    """Patch the fused kernels in."""


@dataclass(frozen=True)
class PeftConfig:
    scheme: Literal["none", "lora", "dora"] = "lora"
    dim: int = 32
    """Rank of A and B."""
    alpha: float = 32
    """Adapters count alpha / dim."""
    dropout: float = 0.0
    """Of the adapters' input."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections of the text layers (and of the vision tower with adapt_vision) that get an adapter."""
    adapt_text: bool = True
    """Adapters on the language model."""
    adapt_vision: bool = False
    """Adapters on the vision tower, too."""
    adapt_projector: bool = False
    """Adapters on the projector, too."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit needs bitsandbytes."""
    lr: float = 5e-6
    """The highest learning rate; recipes take 1e-4 for LoRA and DoRA."""
    min_lr: float = 0.0
    """Where the schedule ends."""
    weight_decay: float = 0.033
    """Of matrices; vectors have none."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Gradients are scaled down to this norm; 0 is never."""


@dataclass(frozen=True)
class SchedulerConfig:
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_iters: int = 50
    """Steps in which the learning rate rises from 0."""
    lr_decay_iters: int | None = None
    """Steps until min_lr is reached; train.train_iters by default."""


@dataclass(frozen=True)
class DatasetConfig:
    type: Literal["mock", "hf", "local", "preloaded"] = "mock"
    """mock: random pictures and words. hf: maker_name. local (or preloaded): the files of train_data_path."""
    maker_name: tuple[str, ...] = ()
    """With type=hf: makers by name, such as make_cord_v2_dataset; several are mixed by weights."""
    path: tuple[str, ...] = ()
    """Instead of a maker's Hub id, one for each maker: another id, a folder of parquet or JSONL, or a saved dataset."""
    weights: tuple[float, ...] = ()
    """How often each of several makers' samples come, relative to each other; by default by their sizes."""
    train_data_path: tuple[str, ...] = ()
    """With type=local: JSONL, JSON or parquet files with messages, conversations or conversation."""
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    image_folder: str | None = None
    """What relative image paths are relative to; the file's own folder by default."""
    split: str = "train"
    valid_split: str = "validation"
    streaming: bool = False
    """Read sets from the Hub as they come, without a download first."""
    seq_length: int = 4096
    """The most tokens of a forward; longer samples are cut at a turn or dropped, never within an image."""
    pack: bool = True
    """Samples share a forward up to seq_length tokens; they do not see each other."""
    shuffle: bool = True
    num_workers: int = 2
    """Processes a rank that decode and tokenise."""
    max_image_size: int | None = None
    """Longest side of an image in pixels; the model's own (1540) by default."""
    max_bad_share: float = 0.01
    """Bad records are replaced; more than this share of those read ends the run with their list."""
    tokenizer: str | None = None
    """Folder or Hub id of tokenizer and processor; the pretrained checkpoint's by default."""
    system_prompt: str | None = None
    """Put before conversations without one."""


@dataclass(frozen=True)
class ValidationConfig:
    eval_interval: int = 30
    """Steps between evaluations; 0 is never."""
    eval_iters: int = 32
    """Batches of global_batch_size samples in each; the whole validation set where that is smaller."""
    generate_samples: int = 2
    """Answers that are generated and logged in each."""
    max_new_tokens: int = 64


@dataclass(frozen=True)
class CheckpointConfig:
    pretrained_checkpoint: str | None = None
    """Folder or Hub id of a Hugging Face checkpoint, or a native one."""
    save: str | None = None
    """Folder of checkpoints; SAVE_DIR/<name>/checkpoints by default."""
    load: str | None = None
    """Folder to resume from; the same as save by default."""
    save_interval: int = 50
    """Steps between checkpoints; 0 saves at the end alone."""
    most_recent_k: int = 2
    """So many are kept, and the best by validation loss; 0 keeps all."""
    async_save: bool = False
    """Write while the training goes on."""
    also_save_hf_checkpoint: bool = True
    """At the end write what Hugging Face reads: the model, or PEFT's adapter."""
    merge_adapter: bool = False
    """At the end write the model with the adapters merged as well."""
    allow_changed_data: bool = False
    """Resume although the data or the pretrained weights are not those that the run began with."""


@dataclass(frozen=True)
class LoggerConfig:
    log_interval: int = 10
    """Steps between lines on a console that is no terminal; metrics.jsonl has every step."""
    tensorboard_dir: str | None = None
    """TensorBoard files, where that is installed; none by default."""
    wandb_project: str | None = None
    """Log to Weights & Biases (WANDB_API_KEY)."""
    wandb_entity: str | None = None
    wandb_exp_name: str | None = None


@dataclass(frozen=True)
class RngConfig:
    seed: int = 1234
    """Of the order of data, dropout and new weights."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A whole run.

    Attributes:
        name: of the run: its folder is SAVE_DIR/name, or dir/name.
        dir: where runs are kept; the environment's SAVE_DIR, or ./m3kernels_runs, by default.
        size: the recipe it came from, "3b", "8b" or "14b".
    """

    name: str = "default"
    dir: str | None = None
    size: str = "3b"
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    rng: RngConfig = field(default_factory=RngConfig)

    def __post_init__(self):
        train = dataclasses.replace(self.train)
        train.__dict__["_whole"] = self
        object.__setattr__(self, "train", train)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
