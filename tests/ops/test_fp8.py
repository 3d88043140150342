"""FP8 weights beside what every op is tested for: the same bits as transformers', every number, nothing kept, refusals."""

import pytest
import torch
from test_lora import SETTINGS, in_fp64, layers_of, plain

from m3kernels import ops
from m3kernels.ops import Adapted, fp8_dequantize, fp8_dequantize_reference, fp8_linear, lora_linears
from m3kernels.ops._common import use_triton
from m3kernels.parity.core import poisoned_allocations, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("fp8_dequantize", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter truncates to bf16
FP8 = torch.float8_e4m3fn


def draw(rows, columns, block_size=None):
    generator = torch.Generator(DEVICE).manual_seed(4)
    weight = (torch.randn(rows, columns, generator=generator, device=DEVICE) * 30).to(FP8)
    sizes = () if block_size is None else tuple(-(-n // b) for n, b in zip((rows, columns), block_size))
    return weight, torch.rand(sizes, generator=generator, device=DEVICE) * 0.02 + 0.001


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number(dtype):
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    weight = numbers[(numbers & 127) != 127].view(2, 127).view(FP8)  # all but NaN
    scale = torch.tensor(0.0123, device=DEVICE)
    expected = (weight.float() * scale).to(dtype)
    assert torch.equal(fp8_dequantize(weight, scale, dtype=dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((48, 84), None),
        ((256, 384), (128, 128)),
        ((130, 300), (128, 128)),
        ((48, 84), (16, 12)),
        ((9, 35), (3, 7)),
        ((130, 300), (1, 300)),
    ],
)
def test_the_bits_are_those_of_transformers(shape, block_size, dtype):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scale = draw(*shape, block_size)
    with poisoned_allocations():
        ours = fp8_dequantize(weight, scale, block_size=block_size, dtype=dtype)
    assert torch.equal(ours, fp8_dequantize_reference(weight, scale, block_size, dtype))
    if block_size is None or not any(n % b for n, b in zip(shape, block_size)):  # it takes whole blocks only
        assert torch.equal(ours, fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype))


def test_strides_and_empty_weights():
    weight, scale = draw(40, 60)
    wide = torch.zeros(40, 200, device=DEVICE).to(FP8)
    wide[:, 7:67] = weight
    expected = fp8_dequantize(weight, scale)
    assert torch.equal(fp8_dequantize(wide[:, 7:67], scale), expected)
    assert torch.equal(fp8_dequantize(weight.view(torch.uint8).T.contiguous().T.view(FP8), scale), expected)
    assert fp8_dequantize(weight[:0], scale).shape == (0, 60)
    assert fp8_linear(torch.zeros(0, 60, device=DEVICE), weight, scale).shape == (0, 40)


def test_powers_of_two_as_scales():
    weight, _ = draw(32, 32, (16, 16))
    scale = torch.tensor([[0.5, 2.0], [0.25, 1.0]], device=DEVICE)
    ours = fp8_dequantize(weight, scale.to(torch.float8_e8m0fnu), block_size=(16, 16))
    assert torch.equal(ours, fp8_dequantize(weight, scale, block_size=(16, 16)))


def quantised(layers, block_size, but=()):
    """The same layers with FP8 weights, and with those dequantised."""
    fp8, dense = [], []
    for j, p in enumerate(layers):
        weight, scale = draw(*p.weight.shape, block_size)
        adapter = (p.A, p.B, p.scaling, p.magnitude)
        as_numbers = fp8_dequantize_reference(weight, scale, block_size, p.weight.dtype)
        fp8.append(p if j in but else Adapted(weight, *adapter, scale, block_size))
        dense.append(p if j in but else Adapted(as_numbers.requires_grad_(), *adapter))
    return fp8, dense


@pytest.mark.parametrize("block_size", [None, (16, 16)])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s[0])
def test_adapters_on_fp8_weights_are_those_on_their_numbers(setting, block_size):
    _, outs, rank, dtype, adapters, dora = setting
    x, layers = layers_of(48, outs, rank, dtype, adapters, dora)
    fp8, dense = quantised(layers, block_size)

    def results(given):
        ys = lora_linears(x, given)
        wrt = [x, *(t for p in layers for t in (p.A, p.B, p.magnitude) if t is not None)]
        return [*ys, *torch.autograd.grad(ys, wrt, [torch.ones_like(y) for y in ys])]

    with poisoned_allocations():
        ours = results(fp8)
    for a, b in zip(ours, results(dense)):
        assert torch.equal(a, b)
    wrong = [Adapted(p.weight, p.A, p.B, p.scaling, p.magnitude, p.weight_scale * 1.01, block_size) for p in fp8]
    assert not torch.equal(results(wrong)[0], ours[0])


def test_a_trained_layer_beside_a_frozen_one_in_fp8():
    x, layers = layers_of(48, (40, 24), 4, torch.float32, torch.float32)
    fp8, dense = quantised(layers, None, but=(1,))
    ys = lora_linears(x, fp8)
    wrt = [x, layers[0].A, layers[1].weight]
    ours = torch.autograd.grad(ys, wrt, [torch.ones_like(y) for y in ys])
    x64, dense64 = in_fp64(x, dense)
    ys = plain(x64, dense64)
    truth = torch.autograd.grad(ys, [x64, dense64[0].A, dense64[1].weight], [torch.ones_like(y) for y in ys])
    assert all(relative_error(a, t) < 1e-6 for a, t in zip(ours, truth))


def kept(function):
    """Sizes, transposed or not, and dtypes of what autograd keeps of a call."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append((tuple(sorted(t.shape, reverse=True)), t.dtype)) or t, lambda t: t
    ):
        function()
    return seen


@pytest.mark.parametrize("dora", [False, True])
def test_no_dequantised_weight_outlives_a_call(dora):
    x, layers = layers_of(48, (40, 24), 4, torch.float32, torch.float32, dora)
    fp8, dense = quantised(layers, None)
    weights = {((48, 40), torch.float32), ((48, 24), torch.float32)}
    assert not weights & set(kept(lambda: lora_linears(x, fp8)))
    assert weights <= set(kept(lambda: lora_linears(x, dense)))
    assert not weights & set(kept(lambda: fp8_linear(x, fp8[0].weight, fp8[0].weight_scale)))
    assert weights & set(kept(lambda: fp8_linear(x, fp8[0].weight, fp8[0].weight_scale, backend="reference")))


def test_compiled_as_one_graph():
    x, layers = layers_of(48, (40, 24), 4, torch.float32, torch.float32)
    fp8, _ = quantised(layers, (16, 16))
    torch._dynamo.reset()

    def step(x):
        frozen = fp8_linear(x, fp8[0].weight, fp8[0].weight_scale, block_size=(16, 16))
        return sum(y.square().sum() for y in (*lora_linears(x, fp8), frozen))

    wrt = [x, *(t for p in layers for t in (p.A, p.B))]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), wrt)
    for a, b in zip(compiled, torch.autograd.grad(step(x), wrt)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_bias_and_fp64():
    weight, scale = draw(40, 48)
    x = torch.randn(2, 5, 48, device=DEVICE, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(40, device=DEVICE, dtype=torch.float64, requires_grad=True)
    dense = weight.double() * scale.double()
    y = fp8_linear(x, weight, scale, bias)
    torch.testing.assert_close(y, x @ dense.T + bias)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    torch.testing.assert_close(dx, dense.sum(0).expand_as(x))
    assert torch.equal(dbias, torch.full_like(bias, 10))


def bad_calls():
    weight, scale = draw(40, 48)
    x = torch.zeros(3, 48, device=DEVICE)
    blocks = torch.ones(3, 3, device=DEVICE)
    a, b = torch.zeros(4, 48, device=DEVICE), torch.zeros(40, 4, device=DEVICE)
    return {
        "not FP8": (lambda: fp8_dequantize(x, scale), TypeError, "weight must be a torch.float8_e4m3fn"),
        "other FP8": (lambda: fp8_linear(x, weight.to(torch.float8_e5m2), scale), TypeError, "float8_e4m3fn"),
        "block size": (lambda: fp8_dequantize(weight, blocks), ValueError, "need a block_size"),
        "grid": (lambda: fp8_dequantize(weight, blocks.T[:2], block_size=(16, 16)), ValueError, r"has scales \(3, 3\)"),
        "rounded": (lambda: fp8_dequantize(weight, scale.bfloat16()), ValueError, "scale must be fp32"),
        "to integers": (lambda: fp8_dequantize(weight, scale, dtype=torch.int32), TypeError, "dtype must be"),
        "width": (lambda: fp8_linear(x[:, :9], weight, scale), ValueError, "needs x"),
        "device": (lambda: fp8_linear(x, weight, scale.to("meta")), ValueError, "move them together"),
        "no scale": (lambda: ops.lora_linear(x, weight, a, b), ValueError, "FP8 with a weight_scale"),
        "scale of no FP8": (lambda: lora_linears(x, [Adapted(x, a, b[:3], 1.0, None, scale)]), TypeError, "float8"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    call, error, message = bad_calls()[name]
    with pytest.raises(error, match=message):
        call()
