"""Tiny Hugging Face Ministral 3 models and batches for the tests, and the comparisons made with them.

Weights are redrawn wide: with Hugging Face's own 0.02 attention is nearly uniform, and rotary errors hide below 1e-5.
Sizes are odd where they may be, and the query scale acts from position 8 on (``original_max_position_embeddings``).
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

import m3kernels
from m3kernels.models.float64 import float64_islands

VOCAB, IMAGE_TOKEN = 151, 10
MERGED = 8  # pixels that become one token: patches of 4, merged 2 x 2
# fp32 rounding through two layers is about 1e-6 of a tensor's norm; the wrong variants in test_patch_model.py are all
# more than ten times above this bound
# (on a GPU up to 3e-5 was measured, for DoRA through the vision tower: other orders of sums, approximate exp and division)
FP32 = 4e-5 if torch.cuda.is_available() else 1e-5
# in fp64 nothing but the order of sums may differ
FP64 = 1e-12

logging.getLogger("transformers").setLevel(logging.ERROR)


def rope(**changes) -> dict:
    """YaRN with the Llama-4 scale; a change to None removes a key."""
    full = {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 0.2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "llama_4_scaling_beta": 0.3,
    }
    return {key: value for key, value in {**full, **changes}.items() if value is not None}


def released_rope(**changes) -> dict:
    """YaRN as the released checkpoints have it."""
    return {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
        **changes,
    }


def text_config(**changes) -> Ministral3Config:
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 84,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 256,
        "rope_parameters": rope(),
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return Ministral3Config(**{**options, **changes})


def vision_config(**changes) -> PixtralVisionConfig:
    options = {
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 4,
        "hidden_act": "silu",
    }
    return PixtralVisionConfig(**{**options, **changes})


def vlm_config(text: dict | None = None, vision: dict | None = None, **changes) -> Mistral3Config:
    return Mistral3Config(
        text_config=text_config(**(text or {})),
        vision_config=vision_config(**(vision or {})),
        **{"image_token_index": IMAGE_TOKEN, "tie_word_embeddings": False, **changes},
    )


def redraw(model: nn.Module, std: float = 0.15, seed: int = 0) -> nn.Module:
    """Wide matrices, norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(1 + noise if p.dim() == 1 else noise)
    return model


def build(kind: str = "text", *, device="cpu", dtype=torch.float32, attention: str = "sdpa", **changes) -> nn.Module:
    """A small text ("text") or vision-language ("vlm") model in eval mode."""
    config = text_config(**changes) if kind == "text" else vlm_config(**changes)
    cls = Ministral3ForCausalLM if kind == "text" else Mistral3ForConditionalGeneration
    model = redraw(cls(config))
    model.set_attn_implementation(attention)
    return model.to(device=device, dtype=dtype).eval()


def twins(kind: str = "text", *, patching: dict | None = None, **options) -> tuple[nn.Module, nn.Module]:
    """(plain, patched): the same weights twice."""
    plain = build(kind, **options)
    ours = copy.deepcopy(plain)
    m3kernels.patch(ours, **(patching or {}))
    return plain, ours


def inputs(batch: dict) -> dict:
    """A batch without its labels."""
    return {k: v for k, v in batch.items() if k != "labels"}


def text_batch(model: nn.Module, *, batch: int = 2, seq: int = 21, padding: str = "", seed: int = 1) -> dict:
    """Tokens and labels; ``padding`` "left" or "right" pads every row but the first, by another length each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, VOCAB, (batch, seq), generator=generator)
    labels = ids.clone()
    labels[:, : seq // 4] = -100
    out = {"input_ids": ids, "labels": labels}
    if padding:
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            pad = slice(0, 3 + 2 * row) if padding == "left" else slice(seq - 3 - 2 * row, seq)
            mask[row, pad], ids[row, pad], labels[row, pad] = 0, 0, -100
        out["attention_mask"] = mask
    return on(out, model)


def vlm_batch(model: nn.Module, images: Iterable[Iterable[tuple[int, int]]], *, text: int = 5, seed: int = 1) -> dict:
    """One row of ``images`` (heights and widths in merged tokens) a sample, text around each, padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(11, VOCAB, (n,), generator=generator).tolist()

    rows = []
    for sample in images:
        rows.append(words(text))
        for height, width in sample:
            rows[-1] += [IMAGE_TOKEN] * (height * width) + words(3)
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill((ids == IMAGE_TOKEN) | (mask == 0), -100)
    out = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    sizes = [(h * MERGED, w * MERGED) for sample in images for h, w in sample]
    if sizes:
        pixels = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
        for image, (h, w) in zip(pixels, sizes):
            image[:, :h, :w] = torch.randn(3, h, w, generator=generator)
        out |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return on(out, model)


IMAGES = [[(2, 3), (1, 4)], [(3, 2)]]  # two images in the first sample, one in the second


def batch_for(model: nn.Module, **options) -> dict:
    return (
        vlm_batch(model, IMAGES, **options) if hasattr(model.config, "vision_config") else text_batch(model, **options)
    )


def on(batch: dict, model: nn.Module) -> dict:
    """The batch on the model's device, pixels in its dtype."""
    parameter = next(model.parameters())
    return {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
    }


def tensors(output, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a model's output by name: nested tuples, dataclasses and caches included."""
    if isinstance(output, Tensor):
        return {name: output.detach()}
    if hasattr(output, "layers") and hasattr(output, "get_seq_length"):
        parts = (
            (f"{i}.{part}", getattr(layer, part))
            for i, layer in enumerate(output.layers)
            for part in ("keys", "values")
        )
    elif isinstance(output, dict):
        parts = output.items()
    elif isinstance(output, (list, tuple)):
        parts = enumerate(output)
    else:
        return {}
    return {k: v for key, value in parts for k, v in tensors(value, f"{name}.{key}" if name else str(key)).items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def observe(model: nn.Module, batch: dict, *, seed: int = 0, **options) -> dict[str, Tensor]:
    """Loss and gradients of a training step, then everything that an eval forward returns."""
    was_training = model.training
    model.train()
    model.zero_grad()
    torch.manual_seed(seed)  # dropout
    loss = model(**batch, **options).loss
    loss.backward()
    seen = {"loss": loss.detach(), **gradients(model)}
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        seen |= tensors(model(**{k: v for k, v in batch.items() if k != "labels"}, **options))
    model.train(was_training)
    return seen


def distance(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance of ``a`` from ``b``; bool and integer tensors are equal (0) or not (inf)."""
    if a.shape != b.shape:
        return float("inf")
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double(), b.double()
    off, size = (a - b).norm().item(), b.norm().item()
    return off / size if size else (0.0 if off == 0 else float("inf"))


def assert_same(ours: dict[str, Tensor], plain: dict[str, Tensor], bound: float) -> None:
    """The same names, and each tensor within ``bound`` (relative Frobenius; NaN is never within)."""
    assert ours.keys() == plain.keys(), f"differ in {sorted(ours.keys() ^ plain.keys())}"
    assert plain, "nothing to compare"
    wrong = {name: d for name in plain if not (d := distance(ours[name], plain[name])) <= bound}
    assert not wrong, "\n".join(f"{name}: {d:.2e} > {bound:.0e}" for name, d in sorted(wrong.items()))


def assert_parity(ours: nn.Module, plain: nn.Module, batch: dict, bound: float = FP32, **options) -> None:
    """Loss, every gradient, logits and whatever else a forward returns."""
    assert_same(observe(ours, batch, **options), observe(plain, batch, **options), bound)


def assert_both(ours: nn.Module, plain: nn.Module, function: Callable, bound: float = FP32) -> None:
    """``function(model)`` returns the same tensors for both."""
    assert_same(tensors([function(ours)]), tensors([function(plain)]), bound)


def assert_error_at_most_eagers(ours: nn.Module, plain: nn.Module, context=contextlib.nullcontext) -> None:
    """error(ours) <= 1.5 x error(eager), both against fp64, RMS over each tensor and eight batches.

    Two RMS estimates of n independent errors have a ratio with standard deviation 1 / sqrt(n), however good the code:
    three of those are allowed on top. That makes 3.1 for the loss (n = 8) and at most 1.75 for any other tensor.
    """
    truth = copy.deepcopy(plain).double()
    error, count = {}, {}
    for seed in range(8):
        batch = batch_for(plain, seed=seed)
        with float64_islands():
            exact = observe(truth, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
        for which, model in enumerate((ours, plain)):
            with context():
                seen = observe(model, batch)
            assert seen.keys() == exact.keys()
            for name, value in seen.items():
                squares = error.setdefault(name, [0.0, 0.0])
                squares[which] += (value.double() - exact[name]).square().sum().item()
                count[name] = count.get(name, 0) + value.numel() / 2
    wrong = {
        name: (ours_off / eager_off) ** 0.5 if eager_off else ours_off
        for name, (ours_off, eager_off) in error.items()
        if not ours_off**0.5 <= 1.5 * eager_off**0.5 * (1 + 3 / count[name] ** 0.5)
    }
    assert not wrong, wrong
