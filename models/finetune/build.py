"""The model of a run: what is trained and in which dtype, adapters, kernels, shards, weights, optimizer."""

import hashlib
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

import m3kernels
from m3kernels.models.finetune.config import FinetuneConfig, FinetuneError
from m3kernels.models.finetune.optimizer import Trained, make_optimizer, with_masters
from m3kernels.models.ministral3 import Config, Ministral3, parallelize
from m3kernels.models.ministral3.adapters import AdapterConfig, add_adapters, reset_adapters, targets_of
from m3kernels.models.ministral3.loading import load
from m3kernels.models.ministral3.merging import MAGNITUDE, is_adapter
from m3kernels.models.ministral3.weights import Checkpoint
from m3kernels.patching.rules import prepare

# (what is stored of trained parameters, what is computed in)
DTYPES = {
    "bf16_mixed": (torch.float32, torch.bfloat16),
    "bf16_stochastic": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
PARTS = {
    "language_model": ("model.language_model.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "multi_modal_projector": ("model.multi_modal_projector.",),
}
# of which every allowed tp is a divisor: the vocabulary's padding, and so a checkpoint, is the same at each of them
VOCAB_MULTIPLE = 8
SAMPLED = 1 << 16


@dataclass(frozen=True)
class Built:
    """A model that can be trained.

    Attributes:
        dtype: what it computes in.
        checkpoint: where its weights came from.
        fused: what m3kernels.patch reported; None without kernels.
    """

    model: Ministral3
    trained: Trained
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype
    checkpoint: Checkpoint
    fused: object | None


def part_of_name(name: str) -> str:
    """Which of PARTS a parameter belongs to."""
    return next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))


def open_checkpoint(config: FinetuneConfig) -> Checkpoint:
    """The pretrained checkpoint, checked.

    Raises:
        FinetuneError: none is named.
        CheckpointError: it is not there, or not whole.
    """
    source = config.checkpoint.pretrained_checkpoint
    if not source:
        raise FinetuneError(
            "no pretrained checkpoint: pass --pretrained-checkpoint DIR_OR_ID (a Hugging Face checkpoint, or one that "
            "m3kernels convert import wrote)"
        )
    checkpoint = Checkpoint.open(source)
    checkpoint.check()
    return checkpoint


def model_on_meta(config: FinetuneConfig, checkpoint: Checkpoint) -> Ministral3:
    """The model without memory: frozen, adapted and with the dtypes that it is trained in.

    Raises:
        FinetuneError: nothing is left to train, or a part is asked for that the checkpoint does not have.
    """
    shape = Config.from_hf(checkpoint.config, tied=checkpoint.tied, pad_vocab_to=VOCAB_MULTIPLE)
    stored, computed = DTYPES[config.train.precision]
    with torch.device("meta"):
        model = Ministral3(shape).to(computed)
    if shape.vision is None and (config.peft.adapt_vision or config.peft.adapt_projector):
        raise FinetuneError(
            "peft.adapt_vision, adapt_projector: the checkpoint is a language model without a vision tower"
        )
    freezes = {
        "language_model": config.model.freeze_language_model,
        "vision_tower": config.model.freeze_vision_model,
        "multi_modal_projector": config.model.freeze_vision_projection,
    }
    adapted = config.peft.scheme != "none"
    if adapted:
        _add_adapters(model, config, freezes, stored)
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            frozen = freezes[part_of_name(name)]
            # with adapters only an explicit False trains a whole part, and never the language model
            whole = frozen is False and part_of_name(name) != "language_model" if adapted else not frozen
            parameter.requires_grad_(whole)
            if whole:
                parameter.data = parameter.data.to(stored)
    if not any(p.requires_grad for p in model.parameters()):
        raise FinetuneError(
            f"nothing is trained: peft.scheme={config.peft.scheme} and all parts are frozen; unfreeze one"
        )
    return model.train()


def _add_adapters(model: Ministral3, config: FinetuneConfig, freezes: dict, dtype: torch.dtype) -> None:
    peft = config.peft
    for part, asked in (("vision_tower", peft.adapt_vision), ("multi_modal_projector", peft.adapt_projector)):
        if asked and freezes[part] is not None:
            raise FinetuneError(
                f"adapters on {part} and its freeze flag exclude each other: the flag trains all of it (False) or nothing"
            )
    text = peft.adapt_text and not freezes["language_model"]
    if not (text or peft.adapt_vision or peft.adapt_projector):
        return
    parts = {"text": text, "vision": peft.adapt_vision, "projector": peft.adapt_projector}
    try:
        targets = targets_of(model, names=peft.target_modules, **parts)
    except ValueError as error:
        raise FinetuneError(f"peft.target_modules: {error}") from error
    options = {"rank": peft.dim, "alpha": peft.alpha, "dropout": peft.dropout, "dora": peft.scheme == "dora"}
    add_adapters(model, AdapterConfig(**options, dtype=dtype), targets)


def build(
    model: Ministral3,
    config: FinetuneConfig,
    checkpoint: Checkpoint,
    mesh: DeviceMesh,
    device: torch.device,
    progress: bool,
    *,
    keep_gathered: bool = False,
) -> Built:
    """The model of :func:`model_on_meta` with its weights, sharded over ``mesh``, and its optimizer.

    ``keep_gathered``: data-parallel ranks have frozen weights whole, and trained ones from forward to backward.
    """
    if config.model.kernels:
        m3kernels.patch(model)
    stored, computed = DTYPES[config.train.precision]
    sharded = mesh.size() > mesh["tp"].size()
    sharding = {"reshard_after_forward": not keep_gathered, "shard_frozen": not keep_gathered}
    parallelize(model, mesh, param_dtype=computed, reduce_dtype=stored, **sharding)
    load(model, checkpoint, device=device, progress=progress)
    model.source = checkpoint.folder
    if model.adapters is not None:
        reset_adapters(model, config.rng.seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if sharded:
        trained = with_masters(parameters, None)
    else:
        # a magnitude is near its norm: in bf16 all but large changes of it would be lost
        magnitudes = {name: p for name, p in parameters.items() if name.endswith(f".{MAGNITUDE}")}
        others = {name: p for name, p in parameters.items() if name not in magnitudes}
        # bitsandbytes takes gradients of the masters' dtype alone
        trained = with_masters(others, computed, narrow_gradients=config.optimizer.name == "adamw")
        trained.masters.update(magnitudes)
        prepare(model)
    optimizer = make_optimizer(trained, config.optimizer, seed=config.rng.seed)
    # once more, for the report: backends go by the device that the weights are on by now
    fused = m3kernels.patch(model) if config.model.kernels else None
    return Built(model, trained, optimizer, computed, checkpoint, fused)


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """Of a checkpoint's files: names, sizes, headers and some of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.files):
        path = checkpoint.folder / name
        size = path.stat().st_size
        digest.update(f"{name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(8):
                file.seek(size * i // 8)
                digest.update(file.read(SAMPLED))
    return digest.hexdigest()[:16]
