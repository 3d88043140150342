"""What only an adapter inside the loss promises: chunks, several of them, fp32 beside half precision, frozen parts, refusals."""

import pytest
import torch
from test_linear_cross_entropy import make

from m3kernels.ops import _cross_entropy_chunks as chunks
from m3kernels.ops import linear_cross_entropy, linear_cross_entropy_reference
from m3kernels.ops._common import use_triton
from m3kernels.parity.core import poisoned_allocations, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not use_triton("rms_norm", "auto", torch.empty(1, device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"
)
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


def adapter(rank=5, width=32, vocab=130, dtype=torch.float32, scaling=0.7, seed=8):
    generator = torch.Generator().manual_seed(seed)
    a = (torch.randn(rank, width, generator=generator) * width**-0.5).to(DEVICE, dtype).requires_grad_()
    return a, torch.randn(vocab, rank, generator=generator).to(DEVICE, dtype).requires_grad_(), scaling


def results(op, hidden, weight, labels, adapters, wrt=None, **options):
    wrt = wrt or [hidden, weight, *(t for a, b, _ in adapters for t in (a, b))]
    loss = op(hidden, weight, labels, adapters=adapters, **options)
    return [loss, *torch.autograd.grad(loss, wrt)]


def in_fp64(hidden, weight, adapters):
    wide = lambda t: t.detach().double().requires_grad_()
    return wide(hidden), wide(weight), [(wide(a), wide(b), s) for a, b, s in adapters]


def assert_near(ours, truth, bound):
    for a, t in zip(ours, truth):
        assert relative_error(a, t) < bound, (tuple(t.shape), relative_error(a, t))


@pytest.mark.parametrize("on", ["cpu", DEVICE])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [{}, {"chunk_bytes": 130 * 4 * 5}, {"label_smoothing": 0.1, "z_loss": 1e-2}])
def test_chunks_and_several_adapters(options, count, on):
    hidden, weight, labels = make()
    adapters = [adapter(), adapter(3, scaling=-1.5, seed=9)][:count]
    with poisoned_allocations():
        ours = results(linear_cross_entropy, hidden, weight, labels.to(on), adapters, **options)
    wide = in_fp64(hidden, weight, adapters)
    options.pop("chunk_bytes", None)
    assert_near(ours, results(linear_cross_entropy_reference, *wide[:2], labels, wide[2], **options), 2e-6)


def test_deferred_label_terms_stay_in_the_adapters_gradients(monkeypatch):
    """They are taken out of the chunk for dweight's sake, after dB has read it."""
    monkeypatch.setattr(chunks, "DEFERRING_DTYPES", (torch.float32,))
    hidden, weight, labels = make(rows=40)
    given = [adapter()]
    ours = results(linear_cross_entropy, hidden, weight, labels, given, chunk_bytes=130 * 4 * 7)
    wide = in_fp64(hidden, weight, given)
    assert_near(ours, results(linear_cross_entropy_reference, *wide[:2], labels, wide[2]), 2e-6)


def test_fp32_adapters_keep_their_precision():
    """A gradient in half precision would be off by 2^-11 or 2^-9; one from 16-bit logits is off by what those were rounded."""
    hidden, weight, labels = make(rows=60, dtype=HALF)
    given = [adapter(rank=7)]
    ours = results(linear_cross_entropy, hidden, weight, labels, given)
    eager = results(linear_cross_entropy_reference, hidden, weight, labels, given)
    wide = in_fp64(hidden, weight, given)
    truth = results(linear_cross_entropy_reference, *wide[:2], labels, wide[2])
    assert ours[3].dtype == ours[4].dtype == torch.float32
    for a, e, t in zip(ours, eager, truth):
        assert relative_error(a, t) <= 1.5 * relative_error(e, t) + 1e-6, tuple(t.shape)


def test_a_small_adapter_is_not_lost_beside_a_large_head():
    """B just begun: its part is near the logits' rounding, its gradient is not (fp16 has no finer steps than 6e-8)."""
    hidden, weight, labels = make(rows=60, dtype=HALF)
    a, b, s = adapter()
    given = [(a, (b.detach() * 1e-3).requires_grad_(), s)]
    ours = results(linear_cross_entropy, hidden, weight, labels, given)
    wide = in_fp64(hidden, weight, given)
    truth = results(linear_cross_entropy_reference, *wide[:2], labels, wide[2])
    assert relative_error(ours[3], truth[3]) < 1e-2 and relative_error(ours[4], truth[4]) < 1e-2


@pytest.mark.parametrize("trained", [("hidden",), ("A",), ("B",), ("A", "B"), ("hidden", "weight")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts(trained, reduction):
    hidden, weight, labels = make()
    a, b, s = adapter()
    named = {"hidden": hidden, "weight": weight, "A": a, "B": b}
    whole = dict(zip(named, torch.autograd.grad(
        linear_cross_entropy(hidden, weight, labels, adapters=[(a, b, s)], reduction=reduction).sum(), named.values()
    )))  # fmt: skip
    given = {n: t.detach().requires_grad_(n in trained) for n, t in named.items()}
    loss = linear_cross_entropy(
        given["hidden"], given["weight"], labels, adapters=[(given["A"], given["B"], s)], reduction=reduction
    )
    for name, grad in zip(trained, torch.autograd.grad(loss.sum(), [given[n] for n in trained])):
        torch.testing.assert_close(grad, whole[name], rtol=1e-6, atol=1e-7)


def test_no_more_than_a_chunk_of_logits_and_never_a_merged_head(monkeypatch):
    hidden, weight, labels = make(rows=64, ignored=0)
    given, seen = adapter(), []
    for name in ("empty", "zeros", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, real=real, **kw: (made := real(*args, **kw), seen.append(made.numel()))[0]
        )
    for name in ("new_empty", "new_zeros"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, real=real, **kw: (made := real(*args, **kw), seen.append(made.numel()))[0]
        )
    loss = linear_cross_entropy(hidden, weight.detach(), labels, adapters=[given], chunk_bytes=130 * 4 * 6)
    loss.backward()
    assert seen and max(seen) < weight.numel() and max(seen) < 64 * 130


@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_that_counts(rows):
    hidden = torch.randn(rows, 32, device=DEVICE, requires_grad=True)
    weight = torch.randn(130, 32, device=DEVICE, requires_grad=True)
    ours = results(linear_cross_entropy, hidden, weight, torch.full((rows,), -100), [adapter()])
    assert all(not t.any() for t in ours)


def test_accuracy_counts_the_adapter():
    hidden, weight, labels = make()
    given = adapter()
    ours = linear_cross_entropy(hidden, weight, labels, adapters=[given], return_token_accuracy=True)
    theirs = linear_cross_entropy_reference(hidden, weight, labels, adapters=[given], return_token_accuracy=True)
    bare = linear_cross_entropy(hidden, weight, labels, return_token_accuracy=True)
    assert ours[1] == theirs[1] and ours[0] != bare[0]


def bad_calls():
    hidden, weight, labels = make()
    a, b, s = adapter()
    return {
        "A": ((a[:, :9], b, s), r"A \(R, 32\)"),
        "B": ((a, b[:9], s), r"B \(130, R\)"),
        "rank": ((a.repeat(120, 1), b.repeat(1, 120), s), "add up to 1 to 512, got 600"),
        "dtypes": ((a.half(), b, s), "one dtype"),
    }, (hidden, weight, labels)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", bad_calls()[0])
def test_bad_input(name, backend):
    calls, given = bad_calls()
    with pytest.raises(ValueError, match=calls[name][1]):
        linear_cross_entropy(*given, adapters=[calls[name][0]], backend=backend)
