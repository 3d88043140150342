"""What the decode ops promise besides numbers: layouts, FP8 weights, many rows, caches, compilation, refusals."""

import importlib

import pytest
import torch

from m3kernels import ops
from m3kernels.ops._common import use_triton
from m3kernels.ops._decode_products import MAX_ROWS, dense_weight
from m3kernels.parity.core import poisoned_allocations, relative_error
from m3kernels.parity.decode import DECODE_LINEAR, DECODE_QKV, DECODE_SWIGLU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("decode_linear", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
CASES = (DECODE_LINEAR, DECODE_SWIGLU, DECODE_QKV)
FP8 = torch.float8_e4m3fn
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# several rows of fp32 are BLAS's on a GPU
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def make(case, shape=None, dtype=DTYPE):
    return case.make(shape or case.small[0], dtype, torch.Generator(DEVICE).manual_seed(1))


def strided(x):
    """The same values in memory where no dimension is dense."""
    room = torch.full([2 * n + 1 for n in x.shape], 7.0, dtype=x.dtype, device=x.device)
    return room[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)


def counted(monkeypatch):
    """Names of the kernels that are launched from here on."""
    names = []
    for module in ("decode_linear", "decode_swiglu", "decode_qkv"):
        module = importlib.import_module(f"m3kernels.ops.{module}")
        launch = module.launch
        monkeypatch.setattr(
            module, "launch", lambda op, *args, run=launch, **meta: names.append(op) or run(op, *args, **meta)
        )
    return names


@each
def test_inputs_are_never_written_and_any_strides_do(case):
    inputs = make(case)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    dense = case.ours(**inputs)
    assert all(torch.equal(inputs[n], x) for n, x in before.items())
    wide = {n: strided(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    assert all(torch.equal(a, b) for a, b in zip(case.ours(**wide), dense))


@each
def test_one_launch_up_to_the_most_rows(case, monkeypatch):
    names = counted(monkeypatch)
    inputs = make(case, (MAX_ROWS, *case.small[0][1:]))
    case.ours(**inputs)
    # each case calls its op once for each kind of result
    assert set(names) == {case.name} and len(names) <= 2
    names.clear()
    many = make(case, (MAX_ROWS + 1, *case.small[0][1:]), torch.float32)
    for ours, eager in zip(case.ours(**many), case.eager(**many)):
        assert relative_error(ours, eager) < 1e-6
    assert not names


def test_the_table_may_be_a_pair_and_positions_shared():
    """As transformers hands them around: (cos, sin) with their halves doubled, one row for all, positions too."""
    qkv, close = make(DECODE_QKV, (3, 96, 4, 2, 16)), 1e-6 if DTYPE == torch.float32 else 1e-3
    weights, norm = (qkv[n] for n in "qkv"), {"norm_weight": qkv["gain"], "llama4": (0.3, 4), "head_dim": 16}
    table, positions = (qkv[n][1:2].expand(3, *qkv[n].shape[1:]) for n in ("table", "positions"))
    pair = tuple(torch.cat([half, half], dim=-1)[:1].expand(3, -1) for half in table.chunk(2, dim=-1))
    q, k, v = weights
    want = ops.decode_qkv(qkv["x"], q, k, v, **norm, table=table.contiguous(), positions=positions.contiguous())
    for shared in (table, pair):
        for function in (ops.decode_qkv, ops.decode_qkv_reference):
            for ours, theirs in zip(function(qkv["x"], q, k, v, **norm, table=shared, positions=positions), want):
                assert relative_error(ours, theirs) < close
    other = ops.decode_qkv(qkv["x"], q, k, v, **norm, table=pair[::-1], positions=positions)
    assert relative_error(other[0], want[0]) > 0.1


@each
def test_no_rows(case):
    inputs = make(case)
    rows = inputs["x"].shape[0]
    empty = {n: x[:0] if isinstance(x, torch.Tensor) and x.shape[:1] == (rows,) else x for n, x in inputs.items()}
    if case is DECODE_QKV:
        heads = {n: empty[n] for n in ("head_dim", "table", "positions")}
        assert ops.decode_qkv(empty["x"], *(inputs[n] for n in "qkv"), **heads)[0].shape[0] == 0
    else:
        assert all(out.shape[0] == 0 for out in case.ours(**empty))


@each
def test_compiled_fullgraph_takes_the_kernel_and_equals_eager(case):
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(case.ours, fullgraph=True, backend=backend)(**make(case))
        assert all(torch.equal(a, b) for a, b in zip(compiled, case.ours(**make(case))))
        assert any(f"m3kernels.{case.name}" in target for target in seen)


def _opchecks():
    linear, swiglu, qkv = (make(case) for case in CASES)
    heads = (
        *(qkv[n] for n in ("x", "q", "k", "v", "head_dim")),
        *qkv["table"].chunk(2, dim=-1),
        *(qkv["positions"], qkv["gain"]),
        1e-5,
        0.1,
        16,
        None,
        None,
        None,
    )
    return {
        "decode_linear": (linear["x"], linear["weight"], linear["gain"], 1e-5, linear["residual"], None, torch.float32),
        "decode_swiglu": (swiglu["x"], swiglu["gate"], swiglu["up"], None, 1e-5, None, None),
        "decode_qkv": heads,
    }


@each
def test_opcheck(case):
    operator = getattr(torch.ops.m3kernels, case.name).default
    torch.library.opcheck(operator, _opchecks()[case.name], test_utils=("test_schema", "test_faketensor"))


def _quantised(weight, per_row):
    amax = weight.abs().amax(dim=1) if per_row else weight.abs().amax()
    scale = (amax / 448).float()
    return (weight / (scale[:, None] if per_row else scale)).to(FP8), scale


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter's FP8 casts are wrong")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 16, 40, 70])
def test_fp8_weights_are_those_of_the_dequantised_reference(rows, per_row, dtype):
    generator = torch.Generator(DEVICE).manual_seed(3)
    randn = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE)  # noqa: E731
    x, gain, residual = randn(rows, 512).to(dtype), randn(512).to(dtype), randn(rows, 384).to(dtype)
    (w, s), (u, t), (v, r) = (
        _quantised(randn(384, 512) * (1 + 9 * torch.rand(384, 1, device=DEVICE)), per_row) for _ in "wuv"
    )
    heads = {"head_dim": 64, "table": randn(rows, 64), "positions": torch.arange(rows, device=DEVICE)}
    calls = {
        "linear": lambda f, x, g, e: f(x, w, norm_weight=g, residual=e, scale=s),
        "swiglu": lambda f, x, g, e: f(x, w, u, norm_weight=g, gate_scale=s, up_scale=t),
        "qkv": lambda f, x, g, e: torch.cat(f(x, w, u, v, norm_weight=g, scales=(s, t, r), **heads), 1),
    }
    for name, call in calls.items():
        ours, reference = (getattr(ops, f"decode_{name}{suffix}") for suffix in ("", "_reference"))
        truth = call(reference, x.double(), gain.double(), residual.double())
        eager = relative_error(call(reference, x, gain, residual), truth)
        with poisoned_allocations():
            got = call(ours, x, gain, residual)
        # the reference rounds the dequantised weight once more
        assert relative_error(got, truth) <= 1.5 * eager + 1e-6, (name, eager)
    wrong = ops.decode_linear(x, w, norm_weight=gain, scale=s.flip(-1) if per_row else 2 * s)
    assert relative_error(wrong, calls["linear"](ops.decode_linear_reference, x, gain, None)) > 0.1


def test_the_fp8_reference_is_the_dequantised_product():
    x, weight = torch.randn(3, 40, device=DEVICE), torch.randn(24, 40, device=DEVICE) * 30
    for per_row in (False, True):
        quantised, scale = _quantised(weight, per_row)
        dense = dense_weight(quantised, scale, torch.float32)
        # E4M3 has 3 bits behind the point: half a step is 1 / 16 of a value at most
        assert ((dense - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-10).all()
        ours = ops.decode_linear(x, quantised, scale=scale, backend="reference")
        torch.testing.assert_close(ours, x @ dense.T)


def test_logits_may_stay_in_fp32():
    x, weight = (torch.randn(2, 32, device=DEVICE).half(), torch.randn(9, 32, device=DEVICE).half())
    wide = ops.decode_linear(x, weight, out_dtype=torch.float32)
    assert wide.dtype == torch.float32 and (wide != wide.half().float()).any()
    torch.testing.assert_close(wide, x.float() @ weight.float().T, rtol=1e-5, atol=1e-4)


def test_what_is_refused():
    x, w, caches = (
        torch.zeros(2, 8, device=DEVICE),
        torch.zeros(4, 8, device=DEVICE),
        torch.zeros(2, 1, 3, 4, device=DEVICE),
    )
    heads = {"head_dim": 4, "table": torch.zeros(2, 4, device=DEVICE), "positions": torch.arange(2, device=DEVICE)}
    calls = {
        "needs x": lambda: ops.decode_linear(x, w.T),
        "of x's dtype": lambda: ops.decode_linear(x, w.half()),
        "one fp32 scale": lambda: ops.decode_linear(x, w.to(FP8), scale=torch.ones(3, device=DEVICE)),
        "norm_weight must be": lambda: ops.decode_linear(x, w, norm_weight=x),
        "residual must be": lambda: ops.decode_linear(x, w, residual=x),
        "no backward": lambda: ops.decode_linear(x, w.clone().requires_grad_()),
        "one shape": lambda: ops.decode_swiglu(x, w, w[:2]),
        "whole heads": lambda: ops.decode_qkv(x, w, w, w, **heads | {"head_dim": 3}),
        "fp32 table": lambda: ops.decode_qkv(x, w, w, w, **heads | {"table": x}),
        "one kind": lambda: ops.decode_qkv(
            x, w, w, w.to(FP8), **heads, scales=(None, None, torch.ones((), device=DEVICE))
        ),
        "caches must be": lambda: ops.decode_qkv(
            x, w, w, w, **heads, caches=(caches[:1], caches), slots=heads["positions"]
        ),
        "dense along K": lambda: ops.decode_qkv(
            x,
            w,
            w,
            w,
            **heads,
            caches=(caches, caches.transpose(2, 3).contiguous().transpose(2, 3)),
            slots=heads["positions"],
        ),
        "caches need slots": lambda: ops.decode_qkv(x, w, w, w, **heads, caches=(caches, caches)),
    }
    for message, call in calls.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call()
