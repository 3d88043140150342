"""What only a GPU can show: more than 2^31 elements, assertions on the device, Inductor."""

import subprocess
import sys

import pytest
import torch

from m3kernels import ops
from m3kernels.parity.core import relative_error
from m3kernels.parity.ops import CASES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}


def assert_tail(actual, expected):
    assert relative_error(actual, expected) < 5e-3  # one bf16 rounding is 2e-3; a wrapped offset is of order 1


def test_rms_norm_beyond_two_to_the_31(room):
    rows, width = 2**19 + 5, 4096
    x = torch.randn(rows, width, **BF16).requires_grad_()
    weight = torch.randn(width, **BF16).requires_grad_()
    y = ops.rms_norm(x, weight)
    assert_tail(y[-3:], ops.rms_norm_reference(x[-3:].float(), weight.float()))
    dy = torch.zeros_like(y)
    dy[-3:] = torch.randn(3, width, **BF16)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    tail, w = x[-3:].detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.autograd.grad(ops.rms_norm_reference(tail, w), (tail, w), dy[-3:].double())
    assert_tail(dx[-3:], expected[0])
    assert_tail(dweight, expected[1])


def test_swiglu_beyond_two_to_the_31(room):
    gate = torch.randn(2**17 + 3, 16_384, **BF16)
    y = ops.swiglu(gate, gate)
    assert_tail(y[-3:], ops.swiglu_reference(gate[-3:].float(), gate[-3:].float()))
    gate.requires_grad_()
    (grad,) = torch.autograd.grad(ops.swiglu(gate, gate.detach()), gate, y)
    tail = gate[-3:].detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(ops.swiglu_reference(tail, tail.detach()), tail, y[-3:].double())
    assert_tail(grad[-3:], expected)


def test_rotary_at_the_last_position_of_a_long_context(room):
    batch, seq = 3, 262_144
    q = torch.randn(batch, seq, 32, 128, **BF16).transpose(1, 2)
    k = torch.randn(batch, seq, 8, 128, **BF16).transpose(1, 2)
    positions = torch.arange(seq, device="cuda")[None]
    inv_freq = 1e6 ** (-torch.arange(0, 128, 2, device="cuda") / 128)
    got = ops.rotary(q, k, ops.rotary_table(inv_freq, positions), positions, (0.1, 16_384))
    last = positions[:, -5:].expand(batch, -1)
    expected = ops.rotary_reference(
        q[:, :, -5:].float(), k[:, :, -5:].float(), ops.rotary_table(inv_freq, last), last, (0.1, 16_384)
    )
    for a, b in zip(got, expected):
        assert_tail(a[:, :, -5:], b)


def test_lora_beyond_two_to_the_31(room):
    rows, width, out, rank = 233_027, 1024, 9216, 16
    x = torch.randn(rows, width, **BF16).requires_grad_()
    weight = torch.randn(out, width, **BF16) * width**-0.5
    a = (torch.randn(rank, width, device="cuda") * width**-0.5).requires_grad_()
    b = torch.randn(out, rank, device="cuda").requires_grad_()
    y = ops.lora_linear(x, weight, a, b, 0.5)
    dy = torch.zeros_like(y)
    dy[-3:] = torch.randn(3, out, **BF16)
    found = torch.autograd.grad(y, (x, a, b), dy)
    tail = [t.detach().double().requires_grad_() for t in (x[-3:], a, b)]
    expected = ops.lora_linear_reference(tail[0], weight.double(), *tail[1:], 0.5)
    assert_tail(y[-3:], expected)
    dx, da, db = torch.autograd.grad(expected, tail, dy[-3:].double())
    assert_tail(found[0][-3:], dx)
    assert not found[0][:-3].any()
    assert_tail(found[1], da)
    assert_tail(found[2], db)


def test_loss_with_a_chunk_beyond_two_to_the_31(room):
    rows, vocab, width = 16_390, 131_072, 64
    hidden = torch.randn(rows, width, **BF16).requires_grad_()
    weight = (torch.randn(vocab, width, **BF16) * 0.3).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    losses = ops.linear_cross_entropy(hidden, weight, labels, reduction="none", chunk_bytes=2**33)
    expected = ops.linear_cross_entropy_reference(hidden[-3:], weight, labels[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:], expected, rtol=1e-3, atol=1e-3)
    total = ops.linear_cross_entropy(hidden, weight, labels, reduction="sum", chunk_bytes=2**33)
    (grad,) = torch.autograd.grad(total, hidden)
    tail = hidden[-3:].detach().double().requires_grad_()
    total = ops.linear_cross_entropy_reference(tail, weight.double(), labels[-3:], reduction="sum")
    assert relative_error(grad[-3:], torch.autograd.grad(total, tail)[0]) < 2e-2  # bf16 logits of a few units


ASSERTIONS = {
    "label": """
        linear_cross_entropy(torch.zeros(3, 8, device="cuda"), torch.zeros(9, 8, device="cuda"),
                             torch.tensor([1, 9, 2], device="cuda"))""",
    "position": """
        x = torch.zeros(1, 2, 3, 8, device="cuda")
        rotary(x, x, torch.zeros(4, 8, device="cuda"), torch.tensor([[0, 1, 4]], device="cuda"))""",
}


@pytest.mark.parametrize(("what", "message"), [("label", "a label is neither"), ("position", "outside the table")])
def test_a_value_out_of_range_asserts_on_the_device(what, message):
    """As in F.cross_entropy and in indexing: no synchronisation, and the process is lost. So: in another process."""
    code = "import torch, textwrap; from m3kernels.ops import *\n" + "\n".join(
        line.strip() for line in ASSERTIONS[what].replace(",\n                             ", ", ").splitlines()
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\ntorch.cuda.synchronize()"], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("case", [c for c in CASES if not c.wrt], ids=lambda c: c.name)
def test_inductor_fullgraph_of_what_has_no_gradient(case):
    torch._dynamo.reset()
    inputs = case.make(case.small[0], torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        for a, b in zip(torch.compile(case.ours, fullgraph=True)(**inputs), case.ours(**inputs)):
            assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("case", [c for c in CASES if c.wrt], ids=lambda c: c.name)
def test_inductor_fullgraph(case):
    torch._dynamo.reset()
    inputs = case.make(case.small[0], torch.bfloat16, torch.Generator("cuda").manual_seed(0))
    leaves = {n: x.requires_grad_(n in case.wrt) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}

    def step(**inputs):
        return sum((o.float() ** 2).sum() for o in case.ours(**inputs) if o.requires_grad)

    eager = torch.autograd.grad(step(**leaves), [leaves[n] for n in case.wrt])
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(**leaves), [leaves[n] for n in case.wrt])
    for a, b in zip(compiled, eager):
        assert relative_error(a, b) < 1e-2
