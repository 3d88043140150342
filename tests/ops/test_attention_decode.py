"""Attention over a cache against fp64: lengths on the device, splits, windows, and what lies behind a sequence's end."""

import importlib

import pytest
import torch

from m3kernels.ops._common import use_triton
from m3kernels.ops.attention import attention
from m3kernels.ops.attention_decode import attention_decode, attention_decode_reference, splits_for
from m3kernels.ops.fp8_dequantize import quantize_rows
from m3kernels.parity.core import allowed_error, poisoned_allocations, relative_error

decode = importlib.import_module("m3kernels.ops.attention_decode")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
pytestmark = pytest.mark.skipif(
    not use_triton("attention", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)


def make(batch, heads, kv_heads, new, keys, dim, lengths, dtype=torch.float32, seed=2):
    """q, caches that hold NaN behind every sequence's end, lengths."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    q = torch.randn(batch, new, heads, dim, generator=generator, device=DEVICE).transpose(1, 2).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, dim, generator=generator, device=DEVICE).to(dtype) for _ in "kv")
    lengths = torch.tensor(lengths, device=DEVICE)
    behind = torch.arange(keys, device=DEVICE) >= lengths[:, None]
    for cache in (k, v):
        cache.masked_fill_(behind[:, None, :, None], float("nan"))
    return q, k, v, lengths


CALLS = {
    "one token": (2, 4, 2, 1, 300, 32, (300, 17)),
    "one key": (1, 4, 1, 1, 64, 32, (1,)),
    "several tokens": (2, 4, 1, 5, 200, 32, (200, 9)),
    "sixteen tokens, no groups": (1, 2, 2, 16, 150, 64, (130,)),
    "head_dim 80": (1, 4, 2, 2, 90, 80, (90,)),
    "an empty slot": (2, 2, 1, 1, 128, 32, (0, 128)),
    "fewer keys than new tokens": (1, 2, 1, 4, 64, 32, (2,)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("call", CALLS)
def test_error_is_at_most_eagers(call, window, dtype):
    """Over four draws: a decoded token is a few hundred values, whose rounding errors are a matter of luck."""
    results = {"truth": [], "eager": [], "ours": []}
    for seed in range(4):
        inputs = make(*CALLS[call], dtype, seed)
        wide = [t.double() if t.is_floating_point() else t for t in inputs]
        results["truth"].append(attention_decode_reference(*wide, window=window))
        results["eager"].append(attention_decode_reference(*inputs, window=window))
        with poisoned_allocations():
            results["ours"].append(attention_decode(*inputs, window=window))
    truth, eager, ours = (torch.stack(tensors) for tensors in results.values())
    # without queries to average over, the hardware's exp2 (2 ulp) shows in fp32
    factor = 2.0 if dtype == torch.float32 else 1.5
    bound = allowed_error(relative_error(eager, truth), dtype, truth.numel()) * factor / 1.5
    assert relative_error(ours, truth) <= bound, (relative_error(ours, truth), bound)


WRONG = {
    "scale dropped": lambda q, k, v, n: attention_decode(q, k, v, n, scale=1.0),
    "length off by one": lambda q, k, v, n: attention_decode(q, k, v, n - 1),
    "new tokens see each other": lambda q, k, v, n: attention_decode(q.flip(2), k, v, n).flip(2),
    "a window where there is none": lambda q, k, v, n: attention_decode(q, k, v, n, window=60),
}


@pytest.mark.parametrize("variant", WRONG)
def test_wrong_variant_is_caught(variant):
    inputs = make(2, 4, 2, 3, 200, 32, (200, 70))
    truth = attention_decode_reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    assert relative_error(WRONG[variant](*inputs), truth) > 1e-3


@pytest.mark.parametrize("splits", [1, 2, 8, 64])
def test_any_number_of_stretches(splits, monkeypatch):
    """More than there are tiles as well: the last ones are empty."""
    monkeypatch.setattr(decode, "splits_for", lambda *_: splits)
    inputs = make(2, 4, 2, 2, 500, 32, (500, 70))
    expected = attention_decode_reference(*inputs)
    torch.testing.assert_close(attention_decode(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_it_continues_a_prefill():
    q, k, v, lengths = make(1, 4, 2, 7, 40, 32, (40,))
    torch.testing.assert_close(attention_decode(q, k, v, lengths), attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_splits_fill_the_gpu_and_never_starve():
    assert splits_for(1, 8, 16384, 132) == 16 and splits_for(1, 8, 262144, 132) == 16
    assert splits_for(64, 8, 262144, 132) == 1 and splits_for(1, 8, 100, 132) == 1
    assert splits_for(1, 1, 10**6, 132) == 64


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_a_graph_follows_the_lengths():
    q, k, v, lengths = make(2, 32, 8, 1, 4096, 128, (4096, 4096), torch.bfloat16)
    attention_decode(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(q, k, v, lengths)
    for now in ((1, 4096), (700, 33)):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        assert relative_error(out, attention_decode_reference(q.double(), k.double(), v.double(), lengths)) < 5e-3


def in_fp8(inputs):
    """(q, E4M3 caches, lengths), their scales, and the numbers that those stand for; NaN lies behind every end."""
    q, k, v, lengths = inputs
    behind = (torch.arange(k.shape[2], device=DEVICE) >= lengths[:, None])[:, None].expand(k.shape[:3])
    caches, scales, numbers = [], [], []
    for name, cache, size in (("k_scale", k, 3.0), ("v_scale", v, 0.01)):
        # tokens of different sizes, whose scales then differ
        by_token = torch.linspace(0.5, 2.0, k.shape[2], device=DEVICE)[:, None]
        eights, scale = quantize_rows(cache.masked_fill(behind[..., None], 1.0) * by_token * size)
        numbers.append(eights.double() * scale.double()[..., None])
        eights.view(torch.uint8)[behind] = 0x7F
        caches.append(eights)
        scales.append((name, scale.masked_fill(behind, float("nan"))))
    return (q, *caches, lengths), dict(scales), (q.double(), *numbers, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("call", ["one token", "several tokens", "head_dim 80", "an empty slot"])
def test_a_cache_in_fp8_is_its_numbers(call, window, dtype):
    inputs, scales, wide = in_fp8(make(*CALLS[call], dtype))
    truth = attention_decode_reference(*wide, window=window)
    with poisoned_allocations():
        ours = attention_decode(*inputs, **scales, window=window)
    rounded = attention_decode_reference(*inputs, **scales, window=window)
    assert ours.dtype == dtype and relative_error(rounded, truth) < max(1e-3, torch.finfo(dtype).eps)
    # scores and weights are rounded as attention over a cache of q's dtype rounds them
    assert relative_error(ours, truth) < (2e-6 if dtype == torch.float32 else 4e-3)


WRONG_FP8 = {
    "the other's scales": lambda x, k_scale, v_scale: attention_decode(*x, k_scale=v_scale, v_scale=k_scale),
    "one scale for all tokens": lambda x, k_scale, v_scale: attention_decode(
        *x, k_scale=k_scale[:, :, :1].expand_as(k_scale).contiguous(), v_scale=v_scale
    ),
    "the next token's scales": lambda x, k_scale, v_scale: attention_decode(
        *x, k_scale=k_scale, v_scale=v_scale.roll(1, 2).nan_to_num(0.0)
    ),
    "the next head's scales": lambda x, k_scale, v_scale: attention_decode(
        *x, k_scale=k_scale.flip(1), v_scale=v_scale
    ),
}


@pytest.mark.parametrize("variant", WRONG_FP8)
def test_wrong_scales_are_caught(variant):
    inputs, scales, wide = in_fp8(make(2, 4, 2, 1, 200, 32, (200, 70)))
    assert relative_error(WRONG_FP8[variant](inputs, **scales), attention_decode_reference(*wide)) > 1e-3


def test_fp8_caches_need_their_scales():
    inputs, scales, _ = in_fp8(make(2, 4, 2, 1, 20, 16, (20, 7)))
    k_scale, v_scale = scales.values()
    with pytest.raises(ValueError, match="with k_scale and v_scale"):
        attention_decode(*inputs)
    with pytest.raises(ValueError, match="v_scale must be .* got None"):
        attention_decode(*inputs, k_scale=k_scale)
    with pytest.raises(ValueError, match=r"k_scale must be \(2, 2, 20\)"):
        attention_decode(*inputs, k_scale=k_scale[:, :, :7], v_scale=v_scale)
    with pytest.raises(ValueError, match="dense along the last"):
        attention_decode(*inputs, k_scale=k_scale, v_scale=v_scale.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="caches must have q's dtype"):
        attention_decode(*make(2, 4, 2, 1, 20, 16, (20, 7)), **scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, n: (q, k, v[..., :8], n), "needs q"),
        (lambda q, k, v, n: (q, k, v, n.float()), "must be integers"),
        (lambda q, k, v, n: (q[:, :3], k, v, n), "multiple of G"),
        (lambda q, k, v, n: (q.expand(-1, -1, 17, -1), k, v, n), "1 to 16 new tokens"),
        (lambda q, k, v, n: (q.half(), k, v, n), "one dtype"),
        (lambda q, k, v, n: (q.clone().requires_grad_(), k, v, n), "no backward"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        attention_decode(*change(*make(2, 4, 2, 1, 20, 16, (20, 7))))
