"""What every op promises besides numbers: layouts, empty input, compilation, checkpointing, refusals."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from m3kernels import ops
from m3kernels.ops._common import use_triton
from m3kernels.parity.core import table
from m3kernels.parity.losses import HEAD_ADAPTER
from m3kernels.parity.ops import ADD_RMS_NORM, CASES, LINEAR_CROSS_ENTROPY, LORA, RMS_NORM, ROTARY, SWIGLU, measure
from m3kernels.parity.products import FP8_BLOCKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("rms_norm", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
# the decode ops have no backward: tests/ops/test_decode.py has what they promise
DIFFERENTIABLE = [case for case in CASES if case.wrt]
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def make(case, shape=None, dtype=torch.float32, grad=True):
    inputs = case.make(shape or case.small[0], dtype, torch.Generator(DEVICE).manual_seed(1))
    return {
        n: x.requires_grad_(grad and n in case.wrt) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()
    }


def total(outputs):
    return sum((o.float() ** 2).sum() for o in outputs if o.requires_grad)


def gradients(case, function, inputs):
    return torch.autograd.grad(total(function(**inputs)), [inputs[n] for n in case.wrt])


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
def test_inputs_are_never_written(case):
    inputs = make(case)
    before = {n: x.detach().clone() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    gradients(case, case.ours, inputs)
    assert all(torch.equal(inputs[n], x) for n, x in before.items())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(case, reentrant):
    inputs = make(case)
    names = list(inputs)

    def function(*args):
        return case.ours(**dict(zip(names, args)))

    total(checkpoint(function, *inputs.values(), use_reentrant=reentrant)).backward()
    got = [inputs[n].grad for n in case.wrt]
    for a, b in zip(got, gradients(case, case.ours, make(case))):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
def test_compiled_fullgraph_equals_eager(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**make(case)), case.ours(**make(case))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(case, compiled, make(case)), gradients(case, case.ours, make(case))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in DIFFERENTIABLE if not c.name.startswith("attention")], ids=lambda c: c.name
)
def test_compiled_inference_is_left_to_inductor(case):
    """A kernel is opaque to it; the loss and attention keep theirs: the plain forms would hold all logits or scores."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        outputs = torch.compile(case.ours, fullgraph=True, backend=backend)(**make(case))
        for a, b in zip(outputs, case.ours(**make(case))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert any("m3kernels" in target for target in seen) == ("entropy" in case.name)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
def test_references_have_the_kernels_layout(case):
    """Compiled inference takes the reference: what is viewed after the kernel must be viewable after it too."""
    kernel = case.ours(**make(case))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(case.ours, fullgraph=True, backend="eager")(**make(case))
    assert [t.stride() for t in kernel] == [t.stride() for t in compiled]


def test_layout_of_transposed_inputs_under_compiled_inference():
    x, weight = torch.randn(6, 4, device=DEVICE).t(), torch.ones(6, device=DEVICE)
    flat = lambda x, weight: ops.rms_norm(x, weight).view(-1)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(flat, backend="eager")(x, weight), flat(x, weight))


def test_forward_mode_is_not_dropped_without_gradients():
    """no_grad does not turn forward-mode differentiation off; a tangent that vanishes would be a silent zero."""
    x, weight = torch.randn(3, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError)):
            ops.rms_norm(dual, weight)


def _lora_arguments(scaled: bool, normed: bool = False):
    x, weight, A, B = (make(LORA)[n] for n in ("x", "weight", "A", "B"))
    magnitudes = [torch.ones(len(weight), device=DEVICE, requires_grad=True) if scaled else None, None, None]
    norms = torch.full((len(weight),), 2.0, device=DEVICE) if normed else None
    return x, weight, A, B, *[None] * 6, *magnitudes, *[None] * 3, norms, None, [0.5], 0.0, [0, 0]


def _fp8_arguments():
    x, weight, scale = (make(FP8_BLOCKS)[n] for n in ("x", "weight", "scale"))
    return x, weight, scale, 128, 128


OPCHECKS = {
    "fp8_dequantize": lambda: (*_fp8_arguments()[1:], torch.float16),
    "fp8_linear": _fp8_arguments,
    "lora_linear": lambda: _lora_arguments(False),
    "lora_linear ": lambda: _lora_arguments(True),
    "lora_linear  ": lambda: _lora_arguments(True, True),
    "dora_norm": lambda: (*(make(LORA, grad=False)[n] for n in ("weight", "A", "B")), 0.5),
    "rms_norm": lambda: (make(RMS_NORM)["x"], make(RMS_NORM)["weight"], 1e-5),
    "add_rms_norm": lambda: (*(make(ADD_RMS_NORM)[n] for n in ("x", "residual", "weight")), 1e-5),
    "swiglu": lambda: (make(SWIGLU)["gate"], make(SWIGLU)["up"]),
    "swiglu ": lambda: (make(SWIGLU)["gate"], None),
    "rotary": lambda: (
        *(make(ROTARY)[n] for n in "qk"),
        *ops.rotary_table(torch.ones(16, device=DEVICE), make(ROTARY)["positions"]).chunk(2, -1),
        make(ROTARY)["positions"],
        0.1,
        64,
    ),
    "linear_cross_entropy": lambda: (
        *(make(LINEAR_CROSS_ENTROPY)[n] for n in ("hidden", "weight", "labels")),
        *(torch.ones((), device=DEVICE), None, None, 1.0, -100, 0.1, 0.01, True, True, True, False, "auto", 0),
    ),
    "linear_cross_entropy ": lambda: (
        *(make(HEAD_ADAPTER)[n] for n in ("hidden", "weight", "labels")),
        torch.ones((), device=DEVICE),
        *(make(HEAD_ADAPTER)[n] for n in "AB"),
        *(0.75, -100, 0.1, 0.01, True, True, True, True, "auto", 0),
    ),
    "linear_cross_entropy_per_row": lambda: (
        *(make(LINEAR_CROSS_ENTROPY)[n] for n in ("hidden", "weight", "labels")),
        *(None, None, 1.0, -100, 0.1, 0.01, True, "auto", 0),
    ),
    "linear_cross_entropy_per_row ": lambda: (
        *(make(HEAD_ADAPTER)[n] for n in ("hidden", "weight", "labels", "A", "B")),
        *(0.75, -100, 0.1, 0.01, True, "auto", 0),
    ),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    operator = getattr(torch.ops.m3kernels, name.strip()).default
    if name.startswith("fp8"):
        # torch's schema test multiplies the inputs, for which there is no FP8 arithmetic
        torch.library.opcheck(operator, OPCHECKS[name](), test_utils=("test_autograd_registration", "test_faketensor"))
        return
    # the gradients that the loss op hands to its own backward are outputs without one
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator, OPCHECKS[name](), test_utils=tests[: 3 if "entropy" in name else 4])


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
def test_double_backward_is_refused_by_name(case):
    inputs = make(case)
    grads = torch.autograd.grad(total(case.ours(**inputs)), [inputs[n] for n in case.wrt], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        total(grads).backward()


def strided(x):
    """The same values in memory where no dimension is dense."""
    room = torch.full([2 * n + 1 for n in x.shape], 7.0, dtype=x.dtype, device=x.device)
    view = room[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
def test_any_strides(case):
    dense, sparse = make(case), make(case)
    for name in case.wrt:
        sparse[name] = strided(sparse[name])
    # cuBLAS, which multiplies by the adapters' frozen weights, has another order of sums for other strides
    exact = {"rtol": 1e-5, "atol": 1e-4} if "ora_linear" in case.name and DEVICE == "cuda" else {"rtol": 0, "atol": 0}
    for a, b in zip(case.ours(**sparse), case.ours(**dense)):
        torch.testing.assert_close(a, b, **exact)
    for a, b in zip(gradients(case, case.ours, sparse), gradients(case, case.ours, dense)):
        torch.testing.assert_close(a, b, **exact)


def test_rows_of_a_wider_buffer_are_addressed_without_a_copy():
    wide = torch.randn(6, 3, 32, device=DEVICE)
    x = wide[..., 8:24].transpose(0, 1)
    torch.testing.assert_close(
        ops.rms_norm(x, torch.ones(16, device=DEVICE)), ops.rms_norm_reference(x, torch.ones(16, device=DEVICE))
    )


def assert_parity(case, shape, dtype, seed, ulps=1):
    """A handful of values is no statistic: beside the factor, as many ulps of luck."""
    report = measure(case, shape, dtype, DEVICE, seed=seed)
    assert all(row.ours <= row.allowed + ulps * torch.finfo(dtype).eps for row in report), table(report)


@FEW
@given(rows=st.integers(0, 40), width=st.integers(2, 300), seed=st.integers(0, 99))
def test_norms_at_any_shape(rows, width, seed):
    for case in (RMS_NORM, ADD_RMS_NORM):
        assert_parity(case, (rows, width), torch.float32, seed)


@FEW
@given(rows=st.integers(0, 20), width=st.integers(1, 5000), seed=st.integers(0, 99))
def test_swiglu_at_any_shape(rows, width, seed):
    assert_parity(SWIGLU, (rows, width), torch.float16, seed)


@FEW
@given(
    batch=st.integers(0, 3),
    seq=st.integers(0, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    half=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_rotary_at_any_shape(batch, seq, kv_heads, group, half, seed):
    assert_parity(ROTARY, (batch, seq, kv_heads * group, kv_heads, 2 * half), torch.float32, seed)


@FEW
@given(rows=st.integers(0, 20), width=st.integers(2, 40), vocab=st.integers(2, 700), seed=st.integers(0, 99))
def test_loss_at_any_shape(rows, width, vocab, seed):
    # a gradient of one or two rows is an outer product, with as few independent roundings as rows
    assert_parity(LINEAR_CROSS_ENTROPY, (rows, width, vocab), torch.float32, seed, ulps=2)


def test_zero_rows():
    x = torch.empty(0, 5, 64, device=DEVICE, requires_grad=True)
    weight = torch.ones(64, device=DEVICE, requires_grad=True)
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_norm_promotes_an_fp32_weight_as_transformers_does():
    x = torch.randn(4, 32, device=DEVICE).half()
    weight = torch.randn(32, device=DEVICE)
    y = ops.rms_norm(x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, ops.rms_norm_reference(x, weight), rtol=2e-3, atol=1e-5)


def test_sum_alone_downstream():
    x, residual = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(32, device=DEVICE, requires_grad=True)
    _, summed = ops.add_rms_norm(x, residual, weight)
    summed.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, x.grad) and weight.grad is None


def test_rotary_looks_positions_up_in_a_table():
    q, k, positions, llama4 = make(ROTARY, grad=False).values()
    positions = torch.tensor([[0, 1, 2, 0, 1, 9, 9, 3, 2]] * 2, device=DEVICE)
    inv_freq = torch.rand(16, device=DEVICE)
    by_token = ops.rotary(q, k, ops.rotary_table(inv_freq, positions), positions, (0.1, 4))
    long = ops.rotary_table(inv_freq, torch.arange(10, device=DEVICE))
    for kind in (positions, positions.int()):
        for a, b in zip(ops.rotary(q, k, long, kind, (0.1, 4)), by_token):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_rotary_keeps_the_memory_order_of_projections():
    q, k, positions, _ = make(ROTARY, grad=False).values()
    assert all(x.transpose(1, 2).is_contiguous() for x in ops.rotary(q, k, _pair(positions), positions))


def _pair(positions):
    """transformers' (cos, sin) with duplicated halves."""
    table = ops.rotary_table(torch.ones(16, device=DEVICE), positions)
    return tuple(torch.cat([half, half], -1) for half in table.chunk(2, -1))


def test_fp64_takes_the_reference():
    x, weight = torch.randn(3, 8, device=DEVICE).double(), torch.ones(8, device=DEVICE).double()
    assert ops.rms_norm(x, weight).dtype == torch.float64
    with pytest.raises(ValueError, match="not one of fp32, bf16, fp16"):
        ops.rms_norm(x, weight, backend="triton")


def bad_calls():
    def z(*shape, dtype=torch.float32):
        return torch.zeros(*shape, device=DEVICE, dtype=dtype)

    q, k, at = z(1, 4, 3, 8), z(1, 2, 3, 8), z(1, 3, dtype=torch.long)
    table = z(1, 3, 8)
    lce = ops.linear_cross_entropy
    labels = z(3, dtype=torch.long)
    return {
        "norm width": (lambda: ops.rms_norm(z(3, 8), z(7)), ValueError, "weight must have shape"),
        "norm too wide": (lambda: ops.rms_norm(z(1, 65537), z(65537)), ValueError, "exceeds 65536"),
        "norm integer": (lambda: ops.rms_norm(z(3, 8), z(8, dtype=torch.int8)), TypeError, "floating-point"),
        "norm fp8": (lambda: ops.rms_norm(z(3, 8), z(8).to(torch.float8_e4m3fn)), TypeError, "dequantise"),
        "norm devices": (lambda: ops.rms_norm(z(3, 8), torch.zeros(8, device="meta")), ValueError, "one device"),
        "norm backend": (lambda: ops.rms_norm(z(3, 8), z(8), backend="cuda"), ValueError, "unknown; allowed"),
        "residual shape": (lambda: ops.add_rms_norm(z(3, 8), z(1, 8), z(8)), ValueError, "one shape"),
        "swiglu shapes": (lambda: ops.swiglu(z(3, 8), z(3, 7)), ValueError, "one shape and dtype"),
        "swiglu dtypes": (lambda: ops.swiglu(z(3, 8), z(3, 8).half()), ValueError, "one shape and dtype"),
        "swiglu odd": (lambda: ops.swiglu(z(3, 7)), ValueError, "even last dimension"),
        "rotary heads": (lambda: ops.rotary(q, z(1, 2, 4, 8), table, at), ValueError, "agree in all but heads"),
        "rotary dtypes": (lambda: ops.rotary(q, k.half(), table, at), ValueError, "one dtype"),
        "rotary odd": (lambda: ops.rotary(z(1, 1, 3, 7), z(1, 1, 3, 7), table, at), ValueError, "must be even"),
        "rotary positions": (lambda: ops.rotary(q, k, table, at.float()), TypeError, "must be integers"),
        "rotary position shape": (lambda: ops.rotary(q, k, table, at[:, :2]), ValueError, "positions must be"),
        "rotary table": (lambda: ops.rotary(q, k, table[..., :6], at), ValueError, "cos_sin_table must be"),
        "rotary period": (lambda: ops.rotary(q, k, table, at, (0.1, 0)), ValueError, "llama4"),
        "rotary_2d table": (lambda: ops.rotary_2d(q, k, z(4, 8)), ValueError, "cos_sin_table must be"),
        "loss shapes": (lambda: lce(z(3, 8), z(9, 7), labels), ValueError, "needs hidden"),
        "loss labels": (lambda: lce(z(3, 8), z(9, 8), z(3)), TypeError, "labels must be integers"),
        "loss dtypes": (lambda: lce(z(3, 8), z(9, 8).half(), labels), ValueError, "one dtype"),
        "loss reduction": (lambda: lce(z(3, 8), z(9, 8), labels, reduction="avg"), ValueError, "reduction must be"),
        "loss items": (
            lambda: lce(z(3, 8), z(9, 8), labels, reduction="none", num_items_in_batch=2),
            ValueError,
            "no meaning",
        ),
        "loss smoothing": (lambda: lce(z(3, 8), z(9, 8), labels, label_smoothing=2), ValueError, r"\[0, 1\]"),
        "loss chunk": (lambda: lce(z(3, 8), z(9, 8), labels, chunk_bytes=0), ValueError, "positive"),
        "loss sum": (
            lambda: lce(z(3, 8), z(9, 8), labels, accumulate_dtype=torch.half),
            ValueError,
            "accumulate_dtype",
        ),
        "loss label": (lambda: lce(z(3, 8), z(9, 8), torch.tensor([1, 9, 2])), ValueError, r"found \[9\]"),
        "loss negative": (lambda: lce(z(3, 8), z(9, 8), torch.tensor([1, -1, 2])), ValueError, r"found \[-1\]"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    call, error, message = bad_calls()[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA an assertion on the device, which ends the process")
def test_position_beyond_the_table():
    q, k, positions, _ = make(ROTARY, grad=False).values()
    short = ops.rotary_table(torch.ones(16), torch.arange(4))
    with pytest.raises(IndexError, match="outside the table of 4 rows.*build a longer table"):
        ops.rotary(q, k, short, positions)


def test_launch_failure_names_op_and_shapes(monkeypatch):
    import importlib

    from m3kernels.ops import swiglu as _  # noqa: F401

    module = importlib.import_module("m3kernels.ops.swiglu")

    class Broken:
        fn = None

        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(module, "swiglu_fwd_kernel", Broken())
    with pytest.raises(ops.KernelLaunchError, match=r"swiglu: kernel launch failed on .* \(7, 96\).*shared memory"):
        ops.swiglu(torch.zeros(7, 96, device=DEVICE), torch.zeros(7, 96, device=DEVICE))
