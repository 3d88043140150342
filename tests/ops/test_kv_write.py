"""Writing to a cache: the right places and no others, E4M3 within its bounds, what is skipped and refused."""

import pytest
import torch

from m3kernels.ops import kv_write, kv_write_reference
from m3kernels.ops._common import use_triton
from m3kernels.ops._triton import INTERPRET
from m3kernels.ops.fp8_dequantize import quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
kernels = pytest.mark.skipif(
    not use_triton("kv_write", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
BACKENDS = ["reference", pytest.param("triton", marks=kernels)]
ROWS, AT = (2, 0, -1, 2, 1), (4, 0, 1, 5, 11)


def draw(dtype=torch.float32, heads=3, dim=24, fp8=False, seed=0):
    """k and v of five tokens, caches of 3 rows and 12 places (with scales), rows and places."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(5, heads, dim, generator=generator).to(DEVICE, dtype) for _ in "kv")
    caches = [torch.full((3, heads, 12, dim), 7.0, device=DEVICE).to(FP8 if fp8 else dtype) for _ in "kv"]
    scales = {f"{name}_scale": torch.full((3, heads, 12), 7.0, device=DEVICE) for name in "kv"} if fp8 else {}
    rows, at = (torch.tensor(x, device=DEVICE) for x in (ROWS, AT))
    return k, v, *caches, rows, at, scales


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "index"), [(torch.float32, torch.int64), (torch.float16, torch.int32)])
def test_tokens_go_to_their_places_and_nothing_else_changes(dtype, index, backend):
    k, v, k_cache, v_cache, rows, at, _ = draw(dtype)
    expected = [cache.clone() for cache in (k_cache, v_cache)]
    for new, cache in zip((k, v), expected):
        for token, (row, place) in enumerate(zip(ROWS, AT)):
            if row >= 0:
                cache[row, :, place] = new[token]
    kv_write(k, v, k_cache, v_cache, rows.to(index), at.to(index), backend=backend)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_rows_by_default(backend):
    k, v, k_cache, v_cache, _, at, _ = draw()
    turned = k.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((3, 12, 3, 40), 7.0, device=DEVICE)
    view = wide[..., 5:29].transpose(1, 2)
    kv_write(turned[:3], v[:3], view, v_cache, None, at[:3], backend=backend)
    kv_write_reference(k[:3], v[:3], k_cache, v_cache.clone(), torch.arange(3, device=DEVICE), at[:3])
    assert torch.equal(view, k_cache)
    assert (wide[..., :5] == 7).all() and (wide[..., 29:] == 7).all()
    kv_write(k[:0], v[:0], k_cache, v_cache, at[:0], at[:0], backend=backend)


def test_fp8_is_within_its_bounds():
    """2^-4 of each number, or half of the grid's 2^-9 below 2^-6; a scale that is off is seen."""
    k, v, k_cache, v_cache, rows, at, scales = draw(fp8=True, dim=128)
    kv_write(k, v, k_cache, v_cache, rows, at, **scales, backend="reference")
    for new, cache, scale in zip((k, v), (k_cache, v_cache), scales.values()):
        for token, (row, place) in enumerate(zip(ROWS, AT)):
            if row < 0:
                continue
            x, s = new[token], scale[row, :, place, None]
            # by a number of Python's, CUDA would multiply with the reciprocal
            assert torch.equal(s[:, 0], new[token].abs().amax(-1) / torch.tensor(448.0, device=DEVICE))
            bound = torch.maximum(x.abs() * 2.0**-4, s * 2.0**-10) * (1 + 1e-6)
            assert ((cache[row, :, place].float() * s - x).abs() <= bound).all()
            assert not ((cache[row, :, place].float() * s * 1.1 - x).abs() <= bound).all()
    untouched = torch.ones(3, 12, dtype=torch.bool, device=DEVICE)
    untouched[[r for r in ROWS if r >= 0], [a for r, a in zip(ROWS, AT) if r >= 0]] = False
    assert (k_cache.float().transpose(1, 2)[untouched] == 7).all() and (
        scales["v_scale"].transpose(1, 2)[untouched] == 7
    ).all()


def test_heads_of_zeros_and_what_is_no_number():
    eights, scale = quantize_rows(torch.tensor([[0.0, 0.0], [float("nan"), 1.0]]))
    assert eights[0].float().tolist() == [0.0, 0.0] and 0 < scale[0] < 1e-30
    assert eights[1].float().isnan().any()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
def test_the_fp8_kernel_is_the_reference(dtype):
    """The interpreter rounds to E4M3 wrongly: there, of numbers that need no rounding."""
    k, v, k_cache, v_cache, rows, at, scales = draw(dtype, fp8=True)
    if INTERPRET:
        k, v = (quantize_rows(x)[0].to(dtype) * 0.5 for x in (k, v))
    theirs = [k_cache.clone(), v_cache.clone()]
    their_scales = {name: scale.clone() for name, scale in scales.items()}
    kv_write(k, v, k_cache, v_cache, rows, at, **scales, backend="triton")
    kv_write_reference(k, v, *theirs, rows, at, **their_scales)
    for ours, expected in zip((k_cache, v_cache), theirs):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
    assert all(torch.equal(scales[name], their_scales[name]) for name in scales)


@kernels
def test_compiled_as_one_graph():
    k, v, k_cache, v_cache, rows, at, _ = draw()
    expected = [k_cache.clone(), v_cache.clone()]
    kv_write_reference(k, v, *expected, rows, at)
    torch._dynamo.reset()

    def step(k, v):
        kv_write(k, v, k_cache, v_cache, rows, at)
        return k_cache.sum()

    assert torch.compile(step, fullgraph=True, backend="aot_eager")(k, v) == expected[0].sum()
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda k, v, a, b, r, p: (k[0], v, a, b, r, p), "needs k and v"),
        (lambda k, v, a, b, r, p: (k, v, a[:, :2], b[:, :2], r, p), "must be those of k and v"),
        (lambda k, v, a, b, r, p: (k, v, a, b, r[:2], p), r"rows must be integers \(5,\)"),
        (lambda k, v, a, b, r, p: (k, v, a, b, r, p.float()), "at must be integers"),
        (lambda k, v, a, b, r, p: (k, v, a, b, None, p), "5 tokens without rows for a cache of 3"),
        (lambda k, v, a, b, r, p: (k, v, a.half(), b, r, p), "dtype of k and v"),
        (lambda k, v, a, b, r, p: (k, v, a.to(FP8), b.to(FP8), r, p), "with k_scale and v_scale"),
        (lambda k, v, a, b, r, p: (k, v, a.transpose(2, 3).contiguous().transpose(2, 3), b, r, p), "dense along K"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(ValueError, match=says):
        kv_write(*change(*draw()[:6]))


def test_scales_that_do_not_fit_are_refused():
    *inputs, scales = draw(fp8=True)
    with pytest.raises(ValueError, match="v_scale must be .* got None"):
        kv_write(*inputs, k_scale=scales["k_scale"])
    with pytest.raises(ValueError, match=r"k_scale must be \(3, 3, 12\) fp32, got \(3, 3, 12\) torch.float64"):
        kv_write(*inputs, k_scale=scales["k_scale"].double(), v_scale=scales["v_scale"])


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU")
def test_a_graph_writes_where_the_device_says():
    k, v, k_cache, v_cache, rows, at, scales = draw(torch.bfloat16, heads=8, dim=128, fp8=True)
    kv_write(k, v, k_cache, v_cache, rows, at, **scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_write(k, v, k_cache, v_cache, rows, at, **scales)
        at += 1
    at.copy_(torch.tensor(AT) - 1)
    at.clamp_(min=0)
    theirs, their_scales = [k_cache.clone(), v_cache.clone()], {name: s.clone() for name, s in scales.items()}
    kv_write_reference(k, v, *theirs, rows, at.clone(), **their_scales)
    graph.replay()
    assert torch.equal(k_cache.view(torch.uint8), theirs[0].view(torch.uint8))
    assert torch.equal(scales["v_scale"], their_scales["v_scale"]) and at.tolist() == [4, 1, 1, 5, 11]
