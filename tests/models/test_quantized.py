"""FP8 weights in the native model: layers as with their weights dequantised, errors within E4M3's, and what is refused."""

import copy

import pytest
import torch
from hf_folders import load, save, save_fp8
from native import twins

import m3kernels
from m3kernels.models.ministral3 import (
    AdapterConfig,
    AdapterError,
    CheckpointError,
    Ministral3,
    QuantizationError,
    QuantizedLinear,
    add_adapters,
    quantize_,
    targets_of,
)
from m3kernels.models.ministral3.layers import Linear
from m3kernels.models.ministral3.quantized import quantized_layers
from models import FP32, VOCAB

FP8 = torch.float8_e4m3fn
IDS = torch.randint(11, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
LAYERS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@torch.no_grad()
def logits(model):
    return model(IDS.to(model.device)).logits


def numbers(layer):
    """A layer's weight in fp32."""
    scale = layer.weight_scale
    if layer.block_size is not None:
        for dim, size in enumerate(layer.block_size):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, layer.weight.shape[dim])
    return layer.weight.float() * (scale[:, None] if scale.dim() == 1 else scale)


def within_bounds(layer, weight):
    """2^-4 of each number (half of E4M3's last bit), or half of its smallest step, 2^-9 scales."""
    bound = torch.maximum(weight.abs() * 2.0**-4, layer.weight_scale[:, None] * 2.0**-10) * (1 + 1e-6)
    return bool(((numbers(layer) - weight).abs() <= bound).all())


def dequantised(model):
    """The same model with linear layers of the same numbers."""
    twin = copy.deepcopy(model)
    for name, layer in quantized_layers(twin).items():
        parent, _, attribute = name.rpartition(".")
        plain = Linear(layer.in_features, layer.out_features, bias=False, dtype=model.dtype)
        plain.weight.data = numbers(layer).to(model.dtype)
        setattr(twin.get_submodule(parent), attribute, plain)
    return twin


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bf16"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_on_load(bf16_folder, dtype):
    plain = Ministral3.from_pretrained(bf16_folder, dtype=dtype)
    ours = Ministral3.from_pretrained(bf16_folder, dtype=dtype, quantize="fp8")
    layers = quantized_layers(ours)
    assert list(layers) == [f"model.language_model.layers.{i}.{name}" for i in range(2) for name in LAYERS]
    assert ours.dtype == dtype and not any(p.requires_grad for layer in layers.values() for p in layer.parameters())
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight.float()
        assert layer.weight.dtype == FP8 and torch.equal(layer.weight_scale, weight.abs().amax(-1) / 448)
        assert within_bounds(layer, weight)
        wrong = copy.deepcopy(layer)
        wrong.weight_scale = layer.weight_scale.roll(1)  # the next row's
        assert not within_bounds(wrong, weight)
    others = {name for name, _ in plain.named_parameters()} - {f"{name}.weight" for name in layers}
    state = dict(ours.named_parameters())
    assert all(torch.equal(state[name], plain.get_parameter(name)) for name in others)
    assert torch.equal(logits(ours), logits(dequantised(ours)))
    assert not torch.equal(logits(ours), logits(plain))


@pytest.mark.parametrize("scale", ["tensor", "one", "block"])
def test_an_fp8_checkpoint_as_it_is(tmp_path, scale):
    folder = save_fp8(tmp_path, scale)
    plain, ours = Ministral3.from_pretrained(folder), Ministral3.from_pretrained(folder, quantize="keep")
    layers = quantized_layers(ours)
    assert len(layers) == 14 and all((layer.block_size == (32, 32)) == (scale == "block") for layer in layers.values())
    assert torch.equal(logits(ours), logits(plain))
    with torch.no_grad():
        theirs = load(folder)(IDS).logits
    assert (logits(ours).float() - theirs.float()).norm() < 0.05 * theirs.float().norm()
    for layer in layers.values():
        layer.weight_scale = layer.weight_scale * 1.05
    assert not torch.equal(logits(ours), logits(plain))
    # made anew, of what the checkpoint's numbers are
    rows = Ministral3.from_pretrained(folder, quantize="fp8")
    exact = Ministral3.from_pretrained(folder, dtype=torch.float32)
    for name, layer in quantized_layers(rows).items():
        assert within_bounds(layer, exact.get_submodule(name).weight)


def test_in_place_is_as_on_load(bf16_folder):
    loaded = Ministral3.from_pretrained(bf16_folder, quantize="fp8")
    made = quantize_(Ministral3.from_pretrained(bf16_folder))
    assert torch.equal(logits(made), logits(loaded)) and not made.training
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), loaded.state_dict().values()))


def test_patched_before_or_after(bf16_folder):
    loaded, first = (Ministral3.from_pretrained(bf16_folder, dtype=torch.float32) for _ in range(2))
    plain = logits(quantize_(loaded))
    m3kernels.patch(loaded)
    m3kernels.patch(first)
    assert relative(logits(loaded), plain) < FP32
    assert torch.equal(logits(quantize_(first)), logits(loaded))


def test_it_moves_and_is_never_cast(bf16_folder):
    ours = Ministral3.from_pretrained(bf16_folder, quantize="fp8")
    layer = next(iter(quantized_layers(ours).values()))
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    ours.float()
    assert ours.dtype == torch.float32 and layer.weight.dtype == FP8 and layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight.float(), weight.float()) and torch.equal(layer.weight_scale, scale)
    ours.double()
    assert relative(logits(ours), logits(dequantised(ours))) < 1e-6
    twin = copy.deepcopy(ours)
    assert torch.equal(logits(twin), logits(ours)) and "a scale for each row" in repr(twin)
    assert next(iter(quantized_layers(ours.to("meta")).values())).weight_scale.is_meta


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_memory_while_loading_is_that_of_fp8(bf16_folder, monkeypatch):
    """A parameter of the dtype of the others is never made for a layer in FP8."""
    made, empty = [], torch.empty_like

    def noted(t, **options):
        made.append((tuple(t.shape), t.dtype))
        return empty(t, **options)

    monkeypatch.setattr(torch, "empty_like", noted)
    ours = Ministral3.from_pretrained(bf16_folder, quantize="fp8")
    shapes = {tuple(layer.weight.shape) for layer in quantized_layers(ours).values()}
    text = [dtype for shape, dtype in made if shape in shapes]
    assert text.count(FP8) == 14


def test_what_is_refused(bf16_folder, tmp_path):
    ours = Ministral3.from_pretrained(bf16_folder, quantize="fp8")
    with pytest.raises(CheckpointError, match="in FP8 for generation and are not saved"):
        ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(QuantizationError, match="no FP8 weights to keep"):
        Ministral3.from_pretrained(bf16_folder, quantize="keep")
    with pytest.raises(QuantizationError, match="quantize='int4'; allowed: None"):
        Ministral3.from_pretrained(bf16_folder, quantize="int4")
    with pytest.raises(QuantizationError, match="quantised already"):
        quantize_(ours)
    with pytest.raises(QuantizationError, match="layers='all'; allowed: 'text'"):
        quantize_(ours, layers="all")
    with pytest.raises(AdapterError, match="QuantizedLinear; adapters go beside linear layers"):
        add_adapters(ours, AdapterConfig(rank=4), [next(iter(quantized_layers(ours)))])
    adapted = twins("text")[1]
    add_adapters(adapted, AdapterConfig(rank=4), targets_of(adapted))
    with pytest.raises(QuantizationError, match="merge_adapters"):
        quantize_(adapted)
    with pytest.raises(QuantizationError, match="on the meta device"):
        quantize_(twins("text")[1].to("meta"))


def test_the_layer_alone():
    weight = torch.tensor([[448.0, -2.0], [1.0, 0.0]]).to(FP8)
    layer = QuantizedLinear(weight, torch.tensor([0.5, 3.0]))
    assert layer(torch.tensor([[1.0, 10.0]])).tolist() == [[214.0, 3.0]]
    assert QuantizedLinear(weight, torch.tensor(2.0))(torch.tensor([1.0, 1.0])).tolist() == [892.0, 2.0]
