"""Patched against unpatched: loss, every gradient, logits, in fp64, fp32 and bf16; and that wrong ops are caught."""

import copy

import pytest
import torch
from transformers import Ministral3Model, PixtralVisionModel

import m3kernels
from m3kernels import ops
from models import (
    FP32,
    FP64,
    IMAGES,
    assert_both,
    assert_error_at_most_eagers,
    assert_parity,
    assert_same,
    batch_for,
    build,
    float64_islands,
    observe,
    rope,
    text_batch,
    twins,
    vlm_batch,
)

ATTENTION = ("eager", "sdpa")


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.interpreter)])
def test_parity_in_fp32(kind, device, attention):
    plain, ours = twins(kind, device=device, attention=attention)
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.parametrize("attention", ATTENTION)
def test_parity_in_fp64(kind, device, attention):
    """Without transformers' fp32 islands only the order of sums is left, so a wrong formula has nowhere to hide."""
    plain, ours = twins(kind, device=device, dtype=torch.float64, attention=attention)
    with float64_islands():
        assert_parity(ours, plain, batch_for(plain), FP64)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_error_is_at_most_eagers(kind, device, dtype, attention):
    plain, ours = twins(kind, device=device, dtype=dtype, attention=attention)
    assert_error_at_most_eagers(ours, plain)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("text", {"tie_word_embeddings": True}),
        ("text", {"sliding_window": 5}),
        ("text", {"attention_dropout": 0.3}),
        ("text", {"num_key_value_heads": 6}),
        ("text", {"num_key_value_heads": 1, "num_hidden_layers": 1}),
        ("text", {"head_dim": 64, "intermediate_size": 7}),
        ("text", {"rms_norm_eps": 0.1}),
        ("text", {"rope_parameters": rope(truncate=False)}),
        ("text", {"rope_parameters": rope(attention_factor=1.7)}),
        ("text", {"rope_parameters": rope(llama_4_scaling_beta=0)}),
        ("text", {"rope_parameters": rope(rope_type="linear")}),
        # inv_freq changes while the model runs, once a sequence is longer than max_position_embeddings
        ("text", {"rope_parameters": rope(rope_type="dynamic"), "max_position_embeddings": 16}),
        ("vlm", {"tie_word_embeddings": True}),
        ("vlm", {"text": {"sliding_window": 5}}),
        ("vlm", {"vision": {"attention_dropout": 0.3}, "text": {"attention_dropout": 0.2}}),
        ("vlm", {"text": {"rms_norm_eps": 0.1}}),
        ("vlm", {"vision": {"num_attention_heads": 1, "num_hidden_layers": 3}, "vision_feature_layer": -2}),
        ("vlm", {"vision": {"hidden_act": "gelu"}, "multimodal_projector_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.items())),
)
@pytest.mark.parametrize("attention", ATTENTION)
def test_configurations(kind, changes, attention, device):
    plain, ours = twins(kind, device=device, attention=attention, **changes)
    if device == "cuda" and not any("attention_dropout" in str(change) for change in changes.items()):
        # padding that sees nothing: 0 from our kernels and SDPA, the mean of all values from transformers' eager attention
        plain.set_attn_implementation("sdpa")
    assert_parity(ours, plain, batch_for(plain))


@pytest.mark.parametrize(
    "images",
    [[[], []], [[(2, 2)], []], [[(2, 3)] * 4], [[(1, 2), (5, 1), (3, 3)], [(2, 2)]], IMAGES],
    ids=["none", "one", "four alike", "all sizes", "usual"],
)
def test_images(vlm_pair, images):
    plain, ours = vlm_pair
    assert_parity(ours, plain, vlm_batch(plain, images))


@pytest.mark.parametrize("wrapped", [Ministral3Model, PixtralVisionModel])
def test_inner_models(wrapped, device):
    whole = build("vlm" if wrapped is PixtralVisionModel else "text", device=device)
    plain = whole.model.vision_tower if wrapped is PixtralVisionModel else whole.model
    ours = copy.deepcopy(plain)
    report = m3kernels.patch(ours)
    assert report.architecture == wrapped.__name__ and sum(report.patched.values()) > 5
    names = ("pixel_values", "image_sizes") if wrapped is PixtralVisionModel else ("input_ids",)
    batch = {name: batch_for(whole)[name] for name in names}

    def run(model):
        model.zero_grad()
        out = model(**batch, output_hidden_states=True)
        out.last_hidden_state.square().sum().backward()
        return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_both(ours, plain, run)


def test_classification_head(device):
    from transformers import Ministral3ForSequenceClassification

    plain = build(device=device)
    plain = Ministral3ForSequenceClassification(plain.config).to(device).eval()
    ours = copy.deepcopy(plain)
    m3kernels.patch(ours)
    batch = text_batch(plain, padding="right") | {"labels": torch.tensor([0, 1], device=device)}
    assert_parity(ours, plain, batch)


# --- two models, of which one is patched


def test_other_models_stay_bit_identical(kind, device):
    bystander = build(kind, device=device)
    batch = batch_for(bystander)
    before = observe(bystander, batch)
    classes = {type(m): {k: v for k, v in vars(type(m)).items() if k != "__doc__"} for m in bystander.modules()}
    ours = copy.deepcopy(bystander)
    m3kernels.patch(ours)
    observe(ours, batch)
    assert_same(observe(bystander, batch), before, 0.0)
    for cls, attributes in classes.items():
        assert {k: v for k, v in vars(cls).items() if k != "__doc__"} == attributes, f"{cls.__name__} was changed"
    assert not m3kernels.is_patched(bystander)
    assert not any(type(a) is type(b) for a, b in zip(bystander.modules(), ours.modules()) if "RMSNorm" in str(type(a)))


def test_unpatch_is_bit_equal(kind, device):
    model = build(kind, device=device)
    batch, types = batch_for(model), [type(m) for m in model.modules()]
    before, config = observe(model, batch), copy.deepcopy(model.config.to_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    m3kernels.patch(model)
    assert model.config.to_dict() == config
    observe(model, batch)
    assert m3kernels.unpatch(model) is model
    assert [type(m) for m in model.modules()] == types
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert_same(observe(model, batch), before, 0.0)


# --- wrong ops must be caught


def _scale_late(q, k, table, at, llama4):
    return ops.rotary(q, k, table, (at - 1).clamp(0), llama4)


def _scale_on_keys(q, k, table, at, llama4):
    return ops.rotary(q, q, table, at, llama4)[0], ops.rotary(k, k, table, at, llama4)[0]


def _keys_late(q, k, table, at, llama4):
    late = tuple(half.roll(1, -2) for half in table)
    return ops.rotary(q, k, table, at, llama4)[0], ops.rotary(q, k, late, at, llama4)[1]


def _interleaved(table):
    return tuple(half.repeat_interleave(2, -1) for half in table.chunk(2, -1))


def _lost_row(x, weight, eps):
    """Right forward; the weight's gradient lacks the first row."""
    return torch.cat([ops.rms_norm(x[..., :1, :], weight.detach(), eps), ops.rms_norm(x[..., 1:, :], weight, eps)], -2)


def _residual_lost(x, residual, weight, eps):
    return ops.add_rms_norm(x, residual, weight, eps)[0], residual


def _sum_detached(x, residual, weight, eps):
    normed, summed = ops.add_rms_norm(x, residual, weight, eps)
    return normed, summed.detach()


def _unshifted(hidden, weight, labels, **options):
    return ops.linear_cross_entropy(hidden, weight, labels.roll(1, -1), **options)


def _mean_over_all(hidden, weight, labels, **options):
    return ops.linear_cross_entropy(hidden, weight, labels, reduction="sum", **options) / labels.numel()


def _head_frozen(hidden, weight, labels, **options):
    return ops.linear_cross_entropy(hidden, weight.detach(), labels, **options)


def _axes_swapped(inv_freq, at, scaling):
    return ops.rotary_2d_table(inv_freq, at.flip(-1), scaling)


def _axes_diagonal(inv_freq, at, scaling):
    return ops.rotary_2d_table(inv_freq, at + torch.arange(len(at))[:, None] // 3, scaling)


WRONG = {
    "scale dropped": ("text", "text.llama4_parameters", lambda config: None),
    "scale one position late": ("text", "text.rotary", _scale_late),
    "scale on keys too": ("text", "text.rotary", _scale_on_keys),
    "keys one position late": ("text", "text.rotary", _keys_late),
    "interleaved rotary": ("text", "text.duplicate_halves", _interleaved),
    "attention factor dropped": ("text", "text.rotary_table", lambda freq, at, scaling: ops.rotary_table(freq, at)),
    "eps dropped": ("text", "text.rms_norm", lambda x, weight, eps: ops.rms_norm(x, weight, 0.0)),
    "eps dropped after the add": ("text", "text.add_rms_norm", lambda x, r, w, eps: ops.add_rms_norm(x, r, w, 0.0)),
    "weight ignored": ("text", "text.rms_norm", lambda x, w, eps: ops.rms_norm(x, torch.ones_like(w), eps)),
    "weight gradient lacks a row": ("text", "text.rms_norm", _lost_row),
    "residual lost": ("text", "text.add_rms_norm", _residual_lost),
    "gradient of the sum lost": ("text", "text.add_rms_norm", _sum_detached),
    "gate and up swapped": ("text", "text.swiglu", lambda gate, up: ops.swiglu(up, gate)),
    "loss unshifted": ("text", "loss.linear_cross_entropy", _unshifted),
    "loss averaged over ignored labels too": ("text", "loss.linear_cross_entropy", _mean_over_all),
    "head without a gradient": ("text", "loss.linear_cross_entropy", _head_frozen),
    "rows and columns swapped": ("vlm", "vision.rotary_2d_table", _axes_swapped),
    "patch positions wrong": ("vlm", "vision.rotary_2d_table", _axes_diagonal),
    "vision weight gradient lacks a row": ("vlm", "text.rms_norm", _lost_row),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ops_are_caught(name, monkeypatch):
    kind, target, wrong = WRONG[name]
    # an eps that is not lost beside the variances of hidden states around 1
    plain, ours = twins(kind, **({"rms_norm_eps": 1e-3} if kind == "text" else {}))
    batch = batch_for(plain)
    assert_parity(ours, plain, batch)
    monkeypatch.setattr(f"m3kernels.patching.{target}", wrong)
    # ten times the bound: none of them is caught by a hair
    with pytest.raises(AssertionError, match=" > |differ in"):
        assert_parity(ours, plain, batch, 10 * FP32)


@pytest.mark.parametrize(
    "name", ["scale dropped", "interleaved rotary", "weight gradient lacks a row", "rows and columns swapped"]
)
def test_wrong_ops_are_caught_in_bf16(name, monkeypatch):
    kind, target, wrong = WRONG[name]
    plain, ours = twins(kind, dtype=torch.bfloat16)
    monkeypatch.setattr(f"m3kernels.patching.{target}", wrong)
    with pytest.raises(AssertionError):
        assert_error_at_most_eagers(ours, plain)


def test_a_nan_is_caught(monkeypatch):
    plain, ours = twins()
    monkeypatch.setattr(
        "m3kernels.patching.text.swiglu", lambda g, u: ops.swiglu(g, u).index_fill(1, torch.tensor([3]), torch.nan)
    )
    with pytest.raises(AssertionError, match="nan > "):
        assert_parity(ours, plain, batch_for(plain))
