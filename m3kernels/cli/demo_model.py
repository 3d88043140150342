"""A small Ministral 3 with the real architecture, its error against fp64, and its way to disk and back."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from m3kernels.cli.demo_data import EOS_TOKEN, IMAGE_TOKEN, MAX_IMAGE_SIZE, MERGE_SIZE, PAD_TOKEN, PATCH_SIZE
from m3kernels.models.float64 import float64_islands

# the first group whose pattern is in a parameter's name takes it
GROUPS = (
    ("vision norms", ("vision_tower", "norm")),
    ("vision norms", ("vision_tower", "ln_pre")),
    ("vision attention", ("vision_tower", ".attention.")),
    ("vision MLP", ("vision_tower", ".feed_forward.")),
    ("patch embedding", ("vision_tower", "patch_conv")),
    ("projector", ("multi_modal_projector",)),
    ("embeddings and head", ("embed_tokens",)),
    ("embeddings and head", ("lm_head",)),
    ("norms", ("norm",)),
    ("attention", ("self_attn",)),
    ("MLP", ("mlp",)),
)
# what different kernels make of the same weights; on the CPU it is nothing
LOGITS_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths. Everything else is as in the released models."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 384
    vision_hidden: int = 96
    vision_layers: int = 2
    vision_heads: int = 3
    vision_intermediate: int = 288
    original_positions: int = 32
    yarn_factor: float = 4.0


def model_config(vocab_size: int, size: ModelSize) -> Mistral3Config:
    """The configuration of a Ministral 3 of this size. Its query scale and YaRN are at work from ``original_positions``."""
    positions = int(size.yarn_factor * size.original_positions)
    text = Ministral3Config(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=positions,
        # 0.02 is for widths in the thousands; here it would leave every layer's output near zero
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=True,
        rope_parameters={
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": size.yarn_factor,
            "original_max_position_embeddings": size.original_positions,
            "max_position_embeddings": positions,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    )
    vision = PixtralVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=size.vision_intermediate,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=MAX_IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="silu",
        initializer_range=size.vision_hidden**-0.5,
        rope_parameters={"rope_type": "axial", "rope_theta": 10_000.0},
    )
    return Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=MERGE_SIZE,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def build_model(
    config: Mistral3Config, *, seed: int, device: str, dtype: torch.dtype
) -> Mistral3ForConditionalGeneration:
    """Random weights, drawn in fp32 on the CPU: a seed means the same weights on every device and in every dtype."""
    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration(config)
    # not model.to(dtype): that would round the rotary frequencies, which from_pretrained keeps in fp32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.generation_config.eos_token_id = EOS_TOKEN
    model.generation_config.pad_token_id = PAD_TOKEN
    return model.to(device).train()


@dataclass(frozen=True)
class ParityRow:
    """Relative Frobenius errors against fp64 of one output, or of the gradients of one group of parameters."""

    name: str
    ours: float
    eager: float


def _group(name: str) -> str:
    return next(group for group, patterns in GROUPS if all(pattern in name for pattern in patterns))


def _relative_error(got: list[Tensor], truth: list[Tensor]) -> float:
    difference = sum((g.double() - t).square().sum() for g, t in zip(got, truth, strict=True))
    return float((difference / sum(t.square().sum() for t in truth)).sqrt())


def _observe(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Logits of the real tokens, loss, and gradients by group. The model's gradients are cleared."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    dtype = next(model.parameters()).dtype
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        logits = model(**inputs).logits[batch["attention_mask"].bool()]
    model.zero_grad()
    loss = model(**inputs, labels=batch["labels"]).loss
    loss.backward()
    seen = {"logits": [logits], "loss": [loss.detach()]}
    for name, parameter in model.named_parameters():
        seen.setdefault(f"grad: {_group(name)}", []).append(parameter.grad)
    model.zero_grad()
    return seen


def parity_rows(
    model_patched: nn.Module, model_eager: nn.Module, model_fp64: nn.Module, batch: dict[str, Tensor]
) -> list[ParityRow]:
    """Errors of two models with the same weights, against the same weights in fp64.

    Args:
        model_patched, model_eager: in training mode, in the dtype that is judged.
        model_fp64: unpatched, in training mode.
        batch: as :func:`m3kernels.cli.demo_data.collate` makes it, with labels.
    """
    ours, eager = _observe(model_patched, batch), _observe(model_eager, batch)
    with float64_islands():
        truth = _observe(model_fp64, batch)
    return [
        ParityRow(name, _relative_error(ours[name], truth[name]), _relative_error(eager[name], truth[name]))
        for name in truth
    ]


def save_checkpoint(model: Mistral3ForConditionalGeneration, directory: Path, tokenizer: Path) -> None:
    """Write weights, configuration and tokenizer. A patched model is saved under transformers' own names."""
    model.save_pretrained(directory)
    shutil.copyfile(tokenizer, directory / "tekken.json")


@dataclass(frozen=True)
class ReloadCheck:
    """How a checkpoint, reloaded by transformers alone, compares with the model that was saved.

    Attributes:
        architecture: what ``config.json`` names.
        weights_equal: every parameter came back bit for bit.
        logits_error: relative Frobenius error of the reloaded model's logits.
        limit: what ``logits_error`` may be: rounding of the dtype, since the two run different kernels.
    """

    architecture: str
    weights_equal: bool
    logits_error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.weights_equal and self.logits_error <= self.limit


@torch.no_grad()
def check_reload(model: nn.Module, directory: Path, batch: dict[str, Tensor]) -> ReloadCheck:
    """Load a checkpoint with plain transformers and compare its logits on ``batch`` with the trained model's.

    Args:
        model: the trained model, patched or not.
        batch: model inputs without labels.
    """
    parameter = next(model.parameters())
    reloaded = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=parameter.dtype).to(parameter.device)
    keep = batch["attention_mask"].bool()
    logits = [m.eval()(**batch).logits[keep].double() for m in (model, reloaded)]
    expected = dict(model.named_parameters())
    equal = {name: torch.equal(value, expected[name]) for name, value in reloaded.named_parameters()}
    return ReloadCheck(
        architecture=json.loads((directory / "config.json").read_text())["architectures"][0],
        weights_equal=equal.keys() == expected.keys() and all(equal.values()),
        logits_error=_relative_error(logits[1:], logits[:1]),
        limit=LOGITS_LIMITS[parameter.dtype],
    )
