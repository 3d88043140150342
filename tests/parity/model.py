"""A whole model, patched against unpatched: outputs and gradients, each against a reference in higher precision."""

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from m3kernels.ops import fp8_linear
from m3kernels.ops.fp8_dequantize import FP8, quantize_rows
from m3kernels.parity.core import Row, allowed_error, relative_error
from m3kernels.patching import is_patched, patch, unpatch


def tiny_model(seed: int = 0) -> nn.Module:
    """A Ministral 3 vision-language model of 2 layers: real architecture, odd sizes, a query scale that acts from token 8 on."""
    from transformers import Ministral3Config, Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    text = Ministral3Config(
        vocab_size=515,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
    vision = PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=140,
        patch_size=14,
        hidden_act="silu",
    )
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        spatial_merge_size=2,
        image_token_index=10,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration(config)
    # with the initial 0.02 attention is nearly uniform and an error in the rotary would not show
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def with_adapters(model: nn.Module, dora: bool) -> nn.Module:
    """The model with PEFT's LoRA or DoRA in text, vision tower and projector; adapters in fp32 beside bf16, as PEFT has them."""
    from peft import LoraConfig, get_peft_model

    from m3kernels.peft import target_modules

    names = target_modules(model, vision=True, projector=True)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=8, target_modules=names, init_lora_weights=False, use_dora=dora))


def tiny_batch(device: str, seed: int = 0) -> dict[str, Tensor]:
    """Two samples with two and one images of different sizes, the second one padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 515, (2, 29), generator=generator)
    for sample, start, tokens in ((0, 2, 6), (0, 11, 4), (1, 5, 6)):
        ids[sample, start : start + tokens] = 10
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0
    labels = ids.masked_fill((ids == 10) | (mask == 0), -100)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.randn(3, 3, 84, 84, generator=generator),
        "image_sizes": torch.tensor([[84, 56], [56, 56], [56, 84]]),
    }
    return {name: x.to(device) for name, x in batch.items()}


def text_batch(model: nn.Module, device: str, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random text for a model of any size."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(20, vocab, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids}


GROUPS = (
    ("lora_A", "A"),
    ("lora_B", "B"),
    ("lora_magnitude", "magnitude"),
    ("vision_tower", "vision tower"),
    ("multi_modal_projector", "projector"),
    ("embed_tokens", "embeddings"),
    ("lm_head", "head"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
)


def _group(name: str) -> str:
    return next((label for part, label in GROUPS if part in name), "other")


def run_once(model: nn.Module, batch: dict[str, Tensor], gradients: bool = True) -> dict[str, Tensor]:
    """Logits of real tokens, loss, and (optionally) gradients joined by group of parameters, all on the model's device."""
    batch = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in batch.items()}
    model.eval()
    with torch.no_grad():
        logits = model(**{n: x for n, x in batch.items() if n != "labels"}, use_cache=False).logits
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool()]
    results = {"logits": logits}
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(gradients):
        loss = model(**batch, use_cache=False).loss
    results["loss"] = loss.detach()
    if gradients:
        loss.backward()
        parts = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parts[_group(name)].append(parameter.grad.flatten())
        results |= {f"d {group}": torch.cat(grads) for group, grads in parts.items()}
        model.zero_grad(set_to_none=True)
    return results


def has_fp8(model: nn.Module) -> bool:
    return any(p.dtype == FP8 for p in model.parameters())


@dataclass(frozen=True)
class WeightError:
    """What FP8 weights change.

    Attributes:
        logits: relative Frobenius error against the same model without.
        same: tokens whose likeliest successor stays the same, out of ``tokens``.
    """

    logits: float
    same: int
    tokens: int


@torch.no_grad()
def fp8_weight_error(model: nn.Module, batch: dict[str, Tensor]) -> WeightError:
    """The text layers' weights in E4M3 with a scale for each output channel (W8A16), against the model as it is.

    Each layer is quantised anew when it is called: no second set of weights is kept, and the model is left as it was.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".layers." in name and "vision_tower" not in name
    ]
    exact = run_once(model, batch, gradients=False)["logits"]
    for layer in layers:
        layer.forward = partial(_in_fp8, layer)
    try:
        ours = run_once(model, batch, gradients=False)["logits"]
    finally:
        for layer in layers:
            del layer.forward
    same = (ours.argmax(-1) == exact.argmax(-1)).sum()
    return WeightError(relative_error(ours, exact.double()), int(same), exact[..., 0].numel())


def _in_fp8(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, scale = quantize_rows(layer.weight)
    return fp8_linear(x, weight, scale[:, None], layer.bias, block_size=(1, weight.shape[1]))


def measure_model(
    model: nn.Module,
    batch: dict[str, Tensor],
    subject: str,
    *,
    truth_dtype: torch.dtype = torch.float64,
    gradients: bool = True,
    fp8: nn.Module | None = None,
) -> list[Row]:
    """Rows for one model, left as it was found (patched or not).

    Args:
        truth_dtype: of the unpatched copy that counts as the truth; fp32 for models whose fp64 copy would not fit.
        gradients: also compare gradients (needs memory for three sets of them).
        fp8: the model with its weights in FP8, to be patched in its stead; ``model`` then has them dequantised, and what is in
            FP8 gets no gradient in either.

    A model is a chain of many roundings, where an early difference of one rounding grows: loss and logits may
    differ from eager's in either direction by about the error itself, hence the same factor as for single ops.
    """
    was_patched = is_patched(model)
    training = model.training
    unpatch(model)
    in_fp8 = set() if fp8 is None else {name for name, p in fp8.named_parameters() if p.dtype == FP8}
    for name, parameter in model.named_parameters():
        if name in in_fp8:
            parameter.requires_grad_(False)
    eager = run_once(model, batch, gradients)
    wide = copy.deepcopy(model).to(truth_dtype)
    truth = run_once(wide, batch, gradients)
    del wide
    patched = model if fp8 is None else fp8
    patch(patched)
    ours = run_once(patched, batch, gradients)
    if not was_patched:
        unpatch(patched)
    model.train(training)
    rows = []
    for name, t in truth.items():
        error = relative_error(eager[name], t)
        allowed = allowed_error(error, model.dtype, t.numel())
        label = str(model.dtype).removeprefix("torch.")
        rows.append(Row(subject, label, name, relative_error(ours[name], t), error, allowed))
    return rows
